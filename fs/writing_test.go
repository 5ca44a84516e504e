package fs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/quota/gate"
)

const permitted = 64 << 10

// testWriting is a file of 1 MiB that is held, with a permit to append to it.
func testWriting(t *testing.T) (*FS, *writing, *permit) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_APPEND|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	table, v := testTable()
	v.writers.init()
	v.ledger = quota.NewLedger(quota.Usage{Bytes: 1 << 30, Inodes: 10}, quota.Usage{Bytes: 1 << 20, Inodes: 1})
	f := &FS{log: zap.NewNop(), rule: quota.Rule{Block: quota.MinBlock}, gating: &gating{later: make(map[*gate.Event]*writing)}}
	t.Cleanup(f.gating.callers.Close)
	n := table.lookup(nil, v, keyOf(1), unix.S_IFREG, nil)
	n.size, n.charged, n.dense = 1<<20, true, true
	n.setChargeLocked(1 << 20)
	p := &permit{ranges: []quota.Range{{From: 1 << 20, To: 1<<20 + permitted}}}
	if err := v.ledger.Reserve(quota.Usage{Bytes: permitted}); err != nil {
		t.Fatal(err)
	}
	w := &writing{n: n, fd: fd, exact: true, permits: []*permit{p}}
	w.held.Store(true)
	n.ownRareLocked().writing = w
	v.writers.all[w] = struct{}{}
	v.writers.count.Add(1)
	return f, w, p
}

// TestFoldOfCallThatEnds holds that a call which ends while its permit is looked at is charged.
func TestFoldOfCallThatEnds(t *testing.T) {
	f, w, _ := testWriting(t)
	err := f.foldLocked(w, func(*permit) bool {
		if _, err := unix.Write(w.fd, make([]byte, permitted)); err != nil {
			t.Error(err)
		}
		return true
	})
	ledger := w.n.vol.ledger
	if used := ledger.Used().Bytes; err != nil || used != 1<<20+permitted || ledger.Reserved().Bytes != 0 || len(w.permits) != 0 {
		t.Errorf("%d bytes are charged, %d reserved, by %d permits: %v", used, ledger.Reserved().Bytes, len(w.permits), err)
	}
}

// TestReadWhileUsed holds that a block for which a permit is used while the charge is read counts once.
func TestReadWhileUsed(t *testing.T) {
	const size = 8 << 20
	f, w, p := testWriting(t)
	n, ledger := w.n, w.n.vol.ledger
	holes, err := unix.Open(procPath(w.fd), unix.O_RDWR|unix.O_CLOEXEC, 0) // without O_APPEND
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(holes)
	if err := unix.Ftruncate(holes, size); err != nil {
		t.Fatal(err)
	}
	ledger.Settle(quota.Usage{Bytes: permitted}, quota.Delta{})
	if err := ledger.Reserve(quota.Usage{Bytes: size - 1<<20}); err != nil {
		t.Fatal(err)
	}
	p.ranges = []quota.Range{{From: 1 << 20, To: size}}
	n.size, n.dense = size, false
	// As many as may be under way while no further call is allowed.
	for blocks := range slices.Chunk(rand.New(rand.NewPCG(1, 2)).Perm((size-1<<20)/quota.MinBlock), maxReads/2) {
		written := make(chan error)
		go func() {
			var err error
			for _, i := range blocks {
				_, writeErr := unix.Pwrite(holes, make([]byte, quota.MinBlock), 1<<20+int64(i)*quota.MinBlock)
				err = errors.Join(err, writeErr)
			}
			written <- err
		}()
		err := f.readWrittenLocked(w)
		if charge, reserved := n.charge(), w.reserved(); err != nil || charge+reserved != size || ledger.Used().Bytes != charge || ledger.Reserved().Bytes != reserved {
			t.Errorf("%d bytes are charged, %d reserved, of %d; by the ledger %d and %d: %v", charge, reserved, size, ledger.Used().Bytes, ledger.Reserved().Bytes, err)
		}
		if err := <-written; err != nil || t.Failed() {
			t.Fatal(err)
		}
	}
}

// blockedWrite is a thread that sleeps in write(2) until end.
func blockedWrite(t *testing.T, f *FS) (tid int, call gate.Call, end func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	size, err := unix.FcntlInt(w.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan int)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // it ends with its goroutine
		started <- unix.Gettid()
		_, _ = unix.Write(int(w.Fd()), bytes.Repeat([]byte{0}, size+1))
	}()
	tid = <-started
	for call.Access != gate.Writes { // it does not sleep yet
		call = f.gating.callers.Of(tid)
	}
	return tid, call, func() {
		_, _ = r.Read(make([]byte, size+1))
		<-ended
	}
}

// TestFreezeWaitsForWhatWasAllowed has a volume freeze while a call may still do what it was allowed.
func TestFreezeWaitsForWhatWasAllowed(t *testing.T) {
	f, w, p := testWriting(t)
	v := w.n.vol
	tid, call, end := blockedWrite(t, f)
	p.tid, p.call = tid, call
	wantUnderWay := func(want int, when string) {
		t.Helper()
		if got := f.underWay(v); got != want {
			t.Errorf("%s: thread %d is under way, want %d", when, got, want)
		}
	}
	wantUnderWay(tid, "in its call")
	anew := &gate.Event{TID: tid}
	f.gating.setLater(anew, w)
	wantUnderWay(0, "in its next")
	f.gating.setLater(anew, nil)
	reader := &gate.Event{TID: unix.Gettid()}
	f.gating.setLater(reader, w)
	wantUnderWay(tid, "while another reads")
	f.gating.setLater(reader, nil)
	other, _, endOther := blockedWrite(t, f)
	writer := &gate.Event{TID: other}
	f.gating.setLater(writer, w)
	wantUnderWay(0, "while another has the lock to write")
	f.gating.setLater(writer, nil)
	endOther()
	wantUnderWay(tid, "alone")

	frozen := make(chan error)
	go func() { frozen <- f.freeze(v) }()
	select {
	case err := <-frozen:
		t.Fatal("it does not wait: ", err)
	case <-time.After(20 * settlePause):
	}
	if _, err := unix.Write(w.fd, make([]byte, permitted)); err != nil {
		t.Error(err)
	}
	end()
	if err := <-frozen; err != nil {
		t.Error(err)
	}
	if used := v.ledger.Used().Bytes; used != 1<<20+permitted {
		t.Errorf("%d bytes are charged", used)
	}
}

// TestFreezeGivesUp has a volume freeze while a call does not end: whatever it has allocated by then is charged, and what it may
// allocate yet stays reserved.
func TestFreezeGivesUp(t *testing.T) {
	defer func(d time.Duration) { maxUnderWay = d }(maxUnderWay)
	maxUnderWay = 50 * time.Millisecond
	f, w, p := testWriting(t)
	core, logged := observer.New(zap.WarnLevel)
	f.log = zap.New(core)
	tid, call, end := blockedWrite(t, f)
	defer end()
	p.tid, p.call = tid, call
	if _, err := unix.Write(w.fd, make([]byte, permitted/2)); err != nil {
		t.Error(err)
	}
	if err := f.freeze(w.n.vol); err != nil {
		t.Error(err)
	}
	warned := logged.FilterMessage("a write does not come to an end").FilterField(zap.Int("thread", tid)).Len()
	ledger := w.n.vol.ledger
	if used, reserved := ledger.Used().Bytes, ledger.Reserved().Bytes; warned != 1 || used != 1<<20+permitted/2 || reserved != permitted/2 {
		t.Errorf("warned %d times; %d bytes are charged, %d reserved", warned, used, reserved)
	}
}

func TestUnchecked(t *testing.T) {
	var u unchecked
	start := time.Now()
	for i := range uint64(maxUnchecked - 1) {
		u.add(i)
	}
	if nodes, all := u.since(start); len(nodes) != maxUnchecked-1 || all {
		t.Errorf("%d nodes, all: %t", len(nodes), all)
	}
	u.add(1)
	u.add(2)
	if _, all := u.since(start); !all {
		t.Error("more than are remembered are not all")
	}
	if nodes, all := u.since(time.Now()); len(nodes) != 0 || all {
		t.Errorf("since now: %d nodes, all: %t", len(nodes), all)
	}
}
