package transport

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// idleConn is a connection of which nothing is mounted, as if n threads served it and none was idle.
func idleConn(t *testing.T, n int32) *Conn {
	t.Helper()
	o := Options{Mountpoint: "/nowhere", MinThreads: 1, MaxThreads: 4}
	o.EnsureDefaults()
	c, err := newConn(newTestFS(), o, o.Mountpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.release(); err != nil {
			t.Error(err)
		}
	})
	c.crew.threads.Store(n)
	c.dead.Store(true) // so that none is really started
	return c
}

// wants tells whether relieve would start a thread.
func (c *Conn) wants() bool {
	before := c.crew.needed.Load()
	time.Sleep(time.Microsecond)
	c.relieve()
	return c.crew.needed.Load() != before
}

func TestThreadsComeOnlyForWhoWaits(t *testing.T) {
	c := idleConn(t, 1)
	w := &c.crew
	if c.wants() {
		t.Error("a second thread beside one that computes")
	}
	w.slow.Store(1)
	w.threads.Store(2)
	if c.wants() {
		t.Error("a third beside one that waits and one that computes")
	}
	w.slow.Store(2)
	if !c.wants() {
		t.Error("none for two that wait")
	}
	w.slow.Store(0)
	for range 2 * slowWeight {
		w.weigh(true)
	}
	if !c.wants() {
		t.Error("none though all handlers wait")
	}
	w.idle.Store(1)
	if c.wants() {
		t.Error("one beside an idle one")
	}
	w.idle.Store(0)
	w.threads.Store(slowThreads)
	if c.wants() {
		t.Error("more than slowThreads")
	}
	for i := 0; w.slowShare.Load() > 0; i++ {
		if w.weigh(false); i > 100*slowWeight {
			t.Fatalf("slowShare stays at %d", w.slowShare.Load())
		}
	}
	// Every third handler waits: the others are better off with few threads.
	for i := range 100 * slowWeight {
		w.weigh(i%3 == 0)
	}
	w.threads.Store(1)
	if c.wants() {
		t.Errorf("a share of %d of %d is no reason", w.slowShare.Load(), slowScale)
	}
}

// fsyncBlocks has FSYNC wait.
type fsyncBlocks struct {
	*testFS
	begun, end chan struct{}
}

func (f *fsyncBlocks) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	close(f.begun)
	<-f.end
	return fuse.OK
}

func TestFsyncHoldsUpNobody(t *testing.T) {
	fs := &fsyncBlocks{newTestFS(), make(chan struct{}), make(chan struct{})}
	m := mountTest(t, fs, Options{MinThreads: 1}).serve()
	fd, err := unix.Open(m.path(fileName), unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	synced := make(chan error, 1)
	go func() { synced <- unix.Fsync(fd) }()
	<-fs.begun
	for range 100 {
		within(t, "a request beside an fsync", func() error { return stat(m.path(fileName)) })
	}
	close(fs.end)
	if err := <-synced; err != nil {
		t.Error(err)
	}
	eventually(t, "the second thread does not end", func() bool {
		_ = stat(m.path(fileName))
		return m.crew.threads.Load() == 1 && m.crew.slow.Load() == 0
	})
}

// TestAllocations pins what a request allocates: go-fuse's request, the channel by
// which it could be cancelled, and two for a name.
func TestAllocations(t *testing.T) {
	c := idleConn(t, 1)
	c.protocol.HandleRequest([][]byte{initRequest()}, [][]byte{make([]byte, 4096)})
	th, err := newThread(c)
	if err != nil {
		t.Fatal(err)
	}
	const getattr, lookup, allowed = 3, 1, 2
	for name, test := range map[string]struct {
		op      uint32
		body    []byte
		allowed float64
	}{
		"GETATTR": {getattr, make([]byte, 16), allowed},
		"LOOKUP":  {lookup, []byte(fileName + "\x00"), allowed + 2},
	} {
		n := th.receive(test.op, test.body)
		if reply := th.handle(n); replyStatus(reply) != 0 {
			t.Fatalf("%s answers %d", name, replyStatus(reply))
		}
		if got := testing.AllocsPerRun(1000, func() { th.handle(n) }); got > test.allowed {
			t.Errorf("%s allocates %v times, want %v", name, got, test.allowed)
		}
	}
}

// receive makes a request for the root as if it had been read, and returns its length.
func (t *thread) receive(op uint32, body []byte) int {
	in := t.in[:inHeaderSize]
	clear(in)
	binary.NativeEndian.PutUint32(in, uint32(inHeaderSize+len(body)))
	binary.NativeEndian.PutUint32(in[4:], op)
	binary.NativeEndian.PutUint64(in[8:], 2)
	binary.NativeEndian.PutUint64(in[16:], fuse.FUSE_ROOT_ID)
	return inHeaderSize + copy(t.in[inHeaderSize:], body)
}

// TestWatchOnlyIfNobodyIsIdle: watch wakes a processor each millisecond.
func TestWatchOnlyIfNobodyIsIdle(t *testing.T) {
	c := idleConn(t, 2)
	c.protocol.HandleRequest([][]byte{initRequest()}, [][]byte{make([]byte, 4096)})
	th, err := newThread(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		last  bool
		idle  int32 // once one was started for it
		watch uint64
	}{{false, 1, 0}, {true, 1, 0}, {true, 0, 1}} {
		c.crew.alone.Store(0)
		c.crew.idle.Store(test.idle)
		th.serveTimed(th.receive(3, make([]byte, 16)), test.last) // GETATTR
		if got := c.crew.alone.Load(); got != test.watch {
			t.Errorf("%+v: %d reasons to watch", test, got)
		}
	}
}

// initRequest is an INIT of the protocol's present version that offers nothing.
func initRequest() []byte {
	b := make([]byte, inHeaderSize+64)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], opInit)
	binary.NativeEndian.PutUint64(b[8:], 1)
	binary.NativeEndian.PutUint32(b[inHeaderSize:], 7)
	binary.NativeEndian.PutUint32(b[inHeaderSize+4:], 40)
	return b
}

// latency is a stand-in for latencyDevice; the test reads what it was told.
func fakeWaker(t *testing.T) (k *waker, told func() (last uint32)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "latency")
	device, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	k = &waker{device: device, epoch: time.Now()}
	return k, func() uint32 {
		b, err := os.ReadFile(path)
		if err != nil || len(b) < 4 {
			return 1
		}
		return binary.NativeEndian.Uint32(b[len(b)-4:])
	}
}

func TestWakerHoldsWhileRequestsComeFast(t *testing.T) {
	k, told := fakeWaker(t)
	defer k.close()
	k.sampled(time.Second) // 64 requests a second
	if told() == 0 {
		t.Error("processors are kept awake for slow requests")
	}
	k.sampled(time.Millisecond)
	if told() != 0 {
		t.Error("processors sleep though requests come fast")
	}
	eventually(t, "processors stay awake", func() bool { return told() != 0 && !k.awake.Load() })
}

func TestWakeups(t *testing.T) {
	requireFuse(t)
	if WakeupsPlain.wanted() || !WakeupsFast.wanted() {
		t.Error("plain and fast are not what they say")
	}
	m := mountTest(t, newTestFS(), Options{Wakeups: WakeupsPlain}).serve()
	if m.waker != nil {
		t.Error("there is a waker for plain wake-ups")
	}
	o := Options{Mountpoint: "/x", Wakeups: "soon"}
	o.EnsureDefaults()
	if err := o.Validate(); err == nil || !strings.Contains(err.Error(), "soon") {
		t.Errorf("unknown wake-ups: %v", err)
	}
}

// BenchmarkClients is the rate of requests of several clients, which are threads here.
func BenchmarkClients(b *testing.B) {
	for _, clients := range []int{1, 2, 8, 32} {
		b.Run(fmt.Sprint(clients), func(b *testing.B) {
			fs := newTestFS()
			m := mountTest(b, fs, Options{}).serve()
			b.ResetTimer()
			done := make(chan error, clients)
			for range clients {
				go func() {
					var st unix.Statx_t
					for range b.N/clients + 1 {
						if err := unix.Statx(unix.AT_FDCWD, m.path(fileName), unix.AT_STATX_FORCE_SYNC, unix.STATX_SIZE, &st); err != nil {
							done <- err
							return
						}
					}
					done <- nil
				}()
			}
			for range clients {
				if err := <-done; err != nil {
					b.Error(err)
				}
			}
		})
	}
}
