package transport

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func TestReadWrite(t *testing.T) {
	fs := newTestFS()
	m := mountTest(t, fs, Options{}).serve()
	const size = 1 << 20
	mem, err := unix.Mmap(-1, 0, 2*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	data, back := mem[:size], mem[size:]
	for i := range data {
		data[i] = byte(i ^ i>>8 ^ i>>16)
	}
	fd, err := unix.Open(m.path(fileName), unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if n, err := unix.Pwrite(fd, data, 4096); n != size || err != nil {
		t.Fatal(n, err)
	}
	if n, err := unix.Pread(fd, back, 4096); n != size || err != nil {
		t.Fatal(n, err)
	}
	if !bytes.Equal(data, back) {
		t.Error("other bytes were read than written")
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.maxIO != size {
		t.Errorf("the largest request has %d bytes, want %d", fs.maxIO, size)
	}
	if fs.askew != 0 {
		t.Errorf("%d payloads were not page-aligned", fs.askew)
	}
}

func TestSmallMaxWriteStillHoldsXattrs(t *testing.T) {
	fs := &xattrFS{testFS: newTestFS()}
	m := mountTest(t, fs, Options{MaxWrite: minMaxWrite}).serve()
	dir := m.dir
	value := bytes.Repeat([]byte("v"), maxXattr)
	if err := unix.Setxattr(dir, "trusted.t", value, 0); err != nil {
		t.Error("set:", err)
	}
	back := make([]byte, maxXattr)
	if n, err := unix.Getxattr(dir, "trusted.t", back); err != nil || !bytes.Equal(value, back[:n]) {
		t.Error("get:", n, err)
	}
	if err := m.Unmount(false); err != nil {
		t.Error(err)
	}
	m.waitServed(t)
}

type xattrFS struct {
	*testFS
	value []byte
}

func (f *xattrFS) SetXAttr(_ <-chan struct{}, _ *fuse.SetXAttrIn, _ string, data []byte) fuse.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.value = bytes.Clone(data)
	return fuse.OK
}

func (f *xattrFS) GetXAttr(_ <-chan struct{}, _ *fuse.InHeader, _ string, dest []byte) (uint32, fuse.Status) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(dest) < len(f.value) {
		return uint32(len(f.value)), fuse.ERANGE
	}
	return uint32(copy(dest, f.value)), fuse.OK
}

func TestHandlerThread(t *testing.T) {
	umaskBefore := unix.Umask(0o22)
	unix.Umask(umaskBefore)
	fs := newTestFS()
	faults := make(chan string, 10)
	fs.lookup = func(<-chan struct{}, *fuse.InHeader, string) fuse.Status {
		if unix.Gettid() == unix.Getpid() {
			faults <- "a handler runs on the first thread"
		}
		if mask := unix.Umask(0o17); mask != 0 {
			faults <- fmt.Sprintf("umask %o", mask)
		}
		defer unix.Umask(0)
		unix.SetfsuidRetUid(1000)
		defer unix.SetfsuidRetUid(0)
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capget(&header, &caps[0]); err != nil || caps[0].Effective&(1<<unix.CAP_DAC_OVERRIDE) == 0 {
			faults <- fmt.Sprintf("capabilities %x after setfsuid, %v", caps[0].Effective, err)
		}
		return fuse.OK
	}
	m := mountTest(t, fs, Options{}).serve()
	for range 10 {
		if err := stat(m.path(fileName)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case fault := <-faults:
		t.Error(fault)
	default:
	}
	if mask := unix.Umask(umaskBefore); mask != umaskBefore {
		t.Errorf("the process's umask became %o", mask)
	}
}

func TestBlockedHandlers(t *testing.T) {
	for _, maxThreads := range []int{8, defaultMaxThreads} {
		t.Run(fmt.Sprint(maxThreads), func(t *testing.T) {
			b, fs := newBlocker(), newTestFS()
			fs.lookup = b.lookup
			m := mountTest(t, fs, Options{MaxThreads: maxThreads}).serve()
			t.Cleanup(b.release)
			var wg sync.WaitGroup
			block := func(i int) {
				wg.Go(func() {
					if err := stat(m.path(fmt.Sprint("block", i))); err != unix.ENOENT {
						t.Error(err)
					}
				})
			}
			for i := range maxThreads - 1 {
				block(i)
			}
			b.wait(t, maxThreads-1)
			within(t, "a request beside blocked ones", func() error { return stat(m.path(fileName)) })

			block(maxThreads)
			b.wait(t, 1)
			if n := m.crew.threads.Load(); int(n) != maxThreads {
				t.Errorf("%d threads run, want %d", n, maxThreads)
			}
			late := make(chan error, 1)
			wg.Go(func() { late <- stat(m.path(fileName)) })
			select {
			case <-late:
				t.Error("more than MaxThreads handlers run")
			case <-time.After(50 * time.Millisecond):
			}
			b.release()
			if err := <-late; err != nil {
				t.Error(err)
			}
			wg.Wait()
		})
	}
}

func TestSurplusThreadsEnd(t *testing.T) {
	b, fs := newBlocker(), newTestFS()
	fs.lookup = b.lookup
	m := mountTest(t, fs, Options{MinThreads: 3})
	t.Cleanup(b.release)
	m.crew.linger = 50 * time.Millisecond
	m.serve()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() { _ = stat(m.path(fmt.Sprint("block", i))) })
	}
	b.wait(t, 20)
	if n := m.crew.threads.Load(); n < 20 {
		t.Errorf("%d threads run in a burst of 20", n)
	}
	b.release()
	wg.Wait()
	eventually(t, "surplus threads do not end", func() bool {
		_ = stat(m.path(fileName))
		return m.crew.threads.Load() == 3 && servingThreads(t) == 3
	})
	for range 1000 {
		_ = stat(m.path(fileName))
	}
	if n := m.crew.threads.Load(); n < 3 {
		t.Errorf("%d threads are left, fewer than MinThreads", n)
	}
}

type panickyResult struct{ fuse.ReadResult }

func (panickyResult) Size() int { return 1 }

func (panickyResult) Done() {}

func (panickyResult) Bytes([]byte) ([]byte, fuse.Status) { panic("in a result") }

func TestPanic(t *testing.T) {
	fs := newTestFS()
	fs.lookup = func(_ <-chan struct{}, _ *fuse.InHeader, name string) fuse.Status {
		if name == "panic" {
			panicHere()
		}
		return fuse.OK
	}
	fs.content = []byte("x")
	fs.read = func([]byte) fuse.ReadResult { return panickyResult{} }
	m := mountTest(t, fs, Options{MaxThreads: 4}).serve()
	for range 20 {
		if err := stat(m.path("panic")); err != unix.EIO {
			t.Fatalf("a panic answers %v", err)
		}
		if err := stat(m.path(fileName)); err != nil {
			t.Fatalf("after a panic: %v", err)
		}
	}
	fd, err := unix.Open(m.path(fileName), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Read(fd, make([]byte, 1)); err != unix.EIO {
		t.Errorf("a panic in a result answers %v", err)
	}
	unix.Close(fd)
	logged := m.logs.FilterMessage("panic in a request handler").All()
	if len(logged) != 21 {
		t.Fatalf("%d panics are logged", len(logged))
	}
	if stack := fmt.Sprint(logged[0].ContextMap()["stack"]); !strings.Contains(stack, "panicHere") {
		t.Errorf("the stack does not show where: %s", stack)
	}
}

func panicHere() { panic("on purpose") }

// TestUnparsableReply: the caller must not hang on a status that the kernel does not take.
func TestUnparsableReply(t *testing.T) {
	fs := newTestFS()
	fs.lookup = func(_ <-chan struct{}, _ *fuse.InHeader, name string) fuse.Status {
		if name == "bad" {
			return fuse.Status(100_000)
		}
		return fuse.OK
	}
	m := mountTest(t, fs, Options{}).serve()
	within(t, "stat", func() error {
		if err := stat(m.path("bad")); err != unix.EIO {
			return fmt.Errorf("got %v, want EIO", err)
		}
		return nil
	})
	logged := m.logs.FilterMessage("the kernel refused a reply").All()
	if len(logged) != 1 || logged[0].ContextMap()["opcode"] != "LOOKUP" {
		t.Errorf("logged: %v", m.logs.All())
	}
}

func TestInterrupt(t *testing.T) {
	fs := newTestFS()
	entered := make(chan struct{})
	fs.lookup = func(cancel <-chan struct{}, _ *fuse.InHeader, name string) fuse.Status {
		if name != "wait" {
			return fuse.OK
		}
		close(entered)
		select {
		case <-cancel:
			return fuse.EINTR
		case <-time.After(patience):
			return fuse.EIO
		}
	}
	m := mountTest(t, fs, Options{}).serve()
	tid, result := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		var st unix.Stat_t
		_, _, errno := unix.Syscall(unix.SYS_STATFS, 0, 0, 0) // the thread is in use before it is signalled
		_ = errno
		result <- unix.Lstat(m.path("wait"), &st)
	}()
	id := <-tid
	<-entered
	if err := unix.Tgkill(unix.Getpid(), id, unix.SIGURG); err != nil { // the runtime ignores it
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, unix.EINTR) {
		t.Errorf("an interrupted request answers %v", err)
	}
}

func TestCounts(t *testing.T) {
	m := mountTest(t, newTestFS(), Options{}).serve()
	for range 5 {
		_ = stat(m.path("absent"))
	}
	counts := m.Counts()
	if counts["LOOKUP"] != 5 || counts["INIT"] != 1 || counts["WRITE"] != 0 {
		t.Errorf("counts: %v", counts)
	}
	m.count(1000)
	if n := m.Counts()["OTHER"]; n != 1 {
		t.Errorf("%d unknown requests", n)
	}
}

func TestDisablePoll(t *testing.T) {
	m := mountTest(t, newTestFS(), Options{}).serve()
	if err := m.DisablePoll(); err != nil {
		t.Fatal(err)
	}
	polls := m.Counts()["POLL"]
	within(t, "use through os.File", func() error {
		if err := os.WriteFile(m.path(fileName), []byte("text"), 0o600); err != nil {
			return err
		}
		text, err := os.ReadFile(m.path(fileName))
		if err == nil && string(text) != "text" {
			err = fmt.Errorf("read %q", text)
		}
		return err
	})
	if n := m.Counts()["POLL"]; n != polls {
		t.Errorf("%d more POLL requests", n-polls)
	}
}

// BenchmarkGetattr measures a round trip without work in the handler.
func BenchmarkGetattr(b *testing.B) {
	m := mountTest(b, newTestFS(), Options{}).serve()
	var st unix.Stat_t
	for b.Loop() {
		if err := unix.Stat(m.dir, &st); err != nil {
			b.Fatal(err)
		}
	}
}
