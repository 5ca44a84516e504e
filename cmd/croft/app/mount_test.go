package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/pool/control"
)

// fakeMount is a mounted pool without a mount.
type fakeMount struct {
	*fakePool
	served   chan struct{}
	mountErr error
	busy     bool // until its user goes
	once     sync.Once
}

func (f *fakeMount) Mount(o pool.MountOptions) error {
	f.note("mount %s", o.Mountpoint)
	return f.mountErr
}

func (f *fakeMount) Served() <-chan struct{} { return f.served }
func (f *fakeMount) ServeErr() error         { return nil }
func (f *fakeMount) end()                    { f.once.Do(func() { close(f.served) }) }

func (f *fakeMount) Unmount(lazy bool) error {
	f.note("unmount %v", lazy)
	if !f.busy {
		f.end()
	} else if !lazy {
		return unix.EBUSY
	}
	return nil
}

func (f *fakeMount) HandOver(context.Context) error {
	f.note("hand over")
	return nil
}

func (f *fakeMount) Publish(context.Context, string, pool.PublishOptions) error { return nil }
func (f *fakeMount) Unpublish(context.Context, string, string) error            { return nil }
func (f *fakeMount) Publications(context.Context, string) ([]pool.Publication, error) {
	return nil, nil
}

func (f *fakeMount) called(call string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.calls {
		if c == call {
			return true
		}
	}
	return false
}

// daemonTest is a daemon of two pools.
type daemonTest struct {
	t       *testing.T
	a, b    *fakeMount
	signals chan os.Signal
	ready   chan error
	result  chan error
	log     *syncBuffer
	states  *syncBuffer
	runDir  string
	inUse   int // how often the second pool is in use before it can be opened
}

// syncBuffer may be written to and read at a time.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func newDaemonTest(t *testing.T) *daemonTest {
	return &daemonTest{
		t:       t,
		a:       &fakeMount{fakePool: newFakePool(poolDir(t, idA), "a"), served: make(chan struct{})},
		b:       &fakeMount{fakePool: newFakePool(poolDir(t, idB), "b"), served: make(chan struct{})},
		signals: make(chan os.Signal, 2),
		ready:   make(chan error, 1),
		result:  make(chan error, 1),
		log:     new(syncBuffer),
		states:  new(syncBuffer),
	}
}

func (d *daemonTest) start() {
	h := newHost(d.t)
	d.runDir = h.opts.RunDir
	h.opts.notify = func(state string) { d.states.Write([]byte(state + "\n")) }
	s := &server{
		app:     New(h.opts),
		log:     newLogger(d.log, logJSON, zapcore.DebugLevel),
		ready:   func(err error) { d.ready <- err },
		signals: d.signals,
		open: func(o pool.Options) (mountedPool, error) {
			if d.a.called("mount /mnt/a") {
				d.t.Error("mounted before all pools were open")
			}
			if o.Dir == d.a.info.Dir {
				return d.a, nil
			}
			if d.inUse > 0 {
				d.inUse--
				return nil, fmt.Errorf("pool %s: %w", o.Dir, pool.ErrInUse)
			}
			return d.b, nil
		},
	}
	go func() {
		d.result <- s.run(context.Background(), []place{{d.a.info.Dir, "/mnt/a"}, {d.b.info.Dir, "/mnt/b"}})
	}()
}

func (d *daemonTest) waitReady() {
	d.t.Helper()
	select {
	case <-d.ready:
	case err := <-d.result:
		d.t.Fatalf("ended: %v", err)
	}
}

func (d *daemonTest) waitEnd() error {
	d.t.Helper()
	select {
	case err := <-d.result:
		return err
	case <-time.After(20 * time.Second):
		d.t.Fatal("the daemon does not end")
		return nil
	}
}

func (d *daemonTest) eventually(what string, ok func() bool) {
	d.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			d.t.Fatalf("never happened: %s\n%s", what, d.log)
		}
	}
}

// TestServeWaitsForACommand has the second pool held by a volume command: for a
// moment, and for longer than the daemon waits.
func TestServeWaitsForACommand(t *testing.T) {
	d := newDaemonTest(t)
	d.inUse = 1
	d.start()
	d.waitReady()
	d.signals <- unix.SIGTERM
	if err := d.waitEnd(); err != nil {
		t.Error(err)
	}
	d = newDaemonTest(t)
	d.inUse = math.MaxInt
	d.start()
	if err := d.waitEnd(); !errors.Is(err, pool.ErrInUse) {
		t.Errorf("%v", err)
	}
	if d.a.called("mount /mnt/a") {
		t.Error("one pool was mounted though the other could not be opened")
	}
}

func TestServeUntilUnmounted(t *testing.T) {
	d := newDaemonTest(t)
	d.start()
	d.waitReady()
	client := control.NewClient(control.SocketPath(d.runDir, idA))
	defer client.Close()
	if os.Geteuid() == 0 {
		if info, err := client.Info(t.Context()); err != nil || info.ID != idA {
			t.Errorf("%+v, %v", info, err)
		}
	}
	d.a.end()
	d.eventually("pool a is let go", func() bool { return d.a.called("close") })
	if _, err := client.Info(t.Context()); !errors.Is(err, control.ErrNoServer) {
		t.Errorf("the socket of a: %v", err)
	}
	if d.b.called("close") {
		t.Error("pool b was let go")
	}
	d.b.end()
	if err := d.waitEnd(); err != nil {
		t.Error(err)
	}
	if s := d.states.String(); !strings.Contains(s, "READY=1") || !strings.Contains(s, "STATUS=serving "+d.a.info.Dir+" on /mnt/a, ") {
		t.Error(s)
	}
}

func TestServeSignals(t *testing.T) {
	d := newDaemonTest(t)
	d.b.busy = true
	d.start()
	d.waitReady()
	d.signals <- unix.SIGTERM
	d.eventually("a is closed, b detached", func() bool { return d.a.called("close") && d.b.called("unmount true") })
	d.eventually("a word about it", func() bool { return strings.Contains(d.log.String(), "was detached") })
	if s := d.states.String(); !strings.Contains(s, "STOPPING=1") || d.a.called("unmount true") || d.b.called("close") {
		t.Error(s)
	}
	d.b.end()
	if err := d.waitEnd(); err != nil {
		t.Error(err)
	}
}

func TestServeSecondSignal(t *testing.T) {
	d := newDaemonTest(t)
	d.b.busy = true
	d.start()
	d.waitReady()
	d.signals <- unix.SIGINT
	d.signals <- unix.SIGINT
	if err := d.waitEnd(); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Error(err)
	}
}

func TestServeMountFails(t *testing.T) {
	d := newDaemonTest(t)
	d.b.mountErr = errors.New("no such luck")
	d.start()
	if err := d.waitEnd(); err == nil || !strings.Contains(err.Error(), "on /mnt/b: no such luck") {
		t.Error(err)
	}
	if !d.a.called("close") || !d.b.called("close") {
		t.Error("not all was taken back")
	}
	select {
	case <-d.ready:
		t.Error("it said that it was ready")
	default:
	}
	sockets, err := control.Sockets(d.runDir)
	if err != nil || len(sockets) > 0 {
		t.Errorf("%v, %v", sockets, err)
	}
}
