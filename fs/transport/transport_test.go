package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

const (
	fileNode = 2
	fileName = "file"
	patience = 10 * time.Second
)

// testFS is a root directory with one file. Hooks, set before it is mounted, change single operations.
type testFS struct {
	fuse.RawFileSystem

	mu      sync.Mutex
	content []byte // guarded by mu
	maxIO   int    // guarded by mu: largest read or write
	askew   int    // guarded by mu: reads and writes whose buffer was not page-aligned

	entryValid uint64 // seconds
	lookup     func(cancel <-chan struct{}, header *fuse.InHeader, name string) fuse.Status
	read       func(buf []byte) fuse.ReadResult
	open       func(out *fuse.OpenOut) fuse.Status
	getattr    func() fuse.Status

	lookups   atomic.Int64
	unmounted atomic.Int64
}

func newTestFS() *testFS {
	return &testFS{RawFileSystem: fuse.NewDefaultRawFileSystem()}
}

func (f *testFS) String() string { return "test" }

func (f *testFS) OnUnmount() { f.unmounted.Add(1) }

func (f *testFS) unmounts() int64 { return f.unmounted.Load() }

// unmountCounter is a testFS, or made of one.
type unmountCounter interface {
	fuse.RawFileSystem
	unmounts() int64
}

func (f *testFS) attr(node uint64, out *fuse.Attr) {
	out.Ino, out.Mode, out.Nlink = node, unix.S_IFDIR|0o755, 2
	if node == fileNode {
		f.mu.Lock()
		defer f.mu.Unlock()
		out.Mode, out.Nlink, out.Size = unix.S_IFREG|0o644, 1, uint64(len(f.content))
	}
}

func (f *testFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if f.getattr != nil {
		if status := f.getattr(); status != fuse.OK {
			return status
		}
	}
	f.attr(in.NodeId, &out.Attr)
	out.AttrValid = f.entryValid
	return fuse.OK
}

func (f *testFS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if size, ok := in.GetSize(); ok {
		f.mu.Lock()
		f.content = append(f.content[:min(size, uint64(len(f.content)))], make([]byte, max(size, uint64(len(f.content)))-uint64(len(f.content)))...)
		f.mu.Unlock()
	}
	f.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

func (f *testFS) Lookup(cancel <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.lookups.Add(1)
	if f.lookup != nil {
		if status := f.lookup(cancel, header, name); status != fuse.OK {
			return status
		}
	}
	if name != fileName {
		return fuse.ENOENT
	}
	out.NodeId, out.EntryValid, out.AttrValid = fileNode, f.entryValid, f.entryValid
	f.attr(fileNode, &out.Attr)
	return fuse.OK
}

func (f *testFS) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	if f.open != nil {
		return f.open(out)
	}
	return fuse.OK
}

func (f *testFS) noteLocked(buf []byte) {
	f.maxIO = max(f.maxIO, len(buf))
	if uintptr(unsafe.Pointer(&buf[0]))%uintptr(os.Getpagesize()) != 0 {
		f.askew++
	}
}

func (f *testFS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if f.read != nil {
		return f.read(buf), fuse.OK
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.noteLocked(buf)
	if in.Offset > uint64(len(f.content)) {
		return fuse.ReadResultData(nil), fuse.OK
	}
	return fuse.ReadResultData(buf[:copy(buf, f.content[in.Offset:])]), fuse.OK
}

func (f *testFS) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.noteLocked(data)
	if end := int(in.Offset) + len(data); end > len(f.content) {
		f.content = append(f.content, make([]byte, end-len(f.content))...)
	}
	copy(f.content[in.Offset:], data)
	return uint32(len(data)), fuse.OK
}

// mounted is a mount of a test, whose end is checked for leaks.
type mounted struct {
	*Conn
	dir    string
	logs   *observer.ObservedLogs
	served chan error
}

func (m *mounted) path(name string) string { return filepath.Join(m.dir, name) }

// requireFuse fails the test where nothing can be mounted.
func requireFuse(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a filesystem: it must run as root")
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("this test needs /dev/fuse: %v", err)
	}
	unix.Close(fd)
}

func mountTest(t testing.TB, fs unmountCounter, o Options) *mounted {
	t.Helper()
	requireFuse(t)
	checkLeaks(t)
	core, logs := observer.New(zapcore.InfoLevel)
	o.Logger = zap.New(core)
	o.Mountpoint = t.TempDir()
	c, err := Mount(fs, o)
	if err != nil {
		t.Fatal(err)
	}
	m := &mounted{Conn: c, dir: o.Mountpoint, logs: logs, served: make(chan error, 1)}
	device := m.device(t)
	unguard := guardConnection(device)
	t.Cleanup(func() {
		if t.Failed() { // whoever still waits for an answer must not wait for ever
			_ = abortConnection(device)
		}
		if err := m.Unmount(true); err != nil {
			t.Error(err)
		}
		m.waitServed(t)
		unguard()
		if n := fs.unmounts(); n != 1 {
			t.Errorf("OnUnmount was called %d times", n)
		}
		if threads, idle := c.crew.threads.Load(), c.crew.idle.Load(); threads != 0 || idle != 0 {
			t.Errorf("after Serve %d threads, %d idle", threads, idle)
		}
	})
	return m
}

// serve starts Serve, to be called once the test has set the Conn up.
func (m *mounted) serve() *mounted {
	go func() { m.served <- m.Serve() }()
	return m
}

func (m *mounted) waitServed(t testing.TB) {
	t.Helper()
	select {
	case err := <-m.served:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
		m.served <- nil
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		t.Fatalf("Serve does not end\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// checkLeaks compares descriptors, mounts and serving threads now and at the end of the test.
func checkLeaks(t testing.TB) {
	t.Helper()
	r, w, err := os.Pipe() // the runtime's poller takes its descriptors now, not later
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	dir := filepath.Dir(t.TempDir()) // where all mounts of the test are
	before := resources(t, dir)
	t.Cleanup(func() {
		var after string
		eventually(t, "resources are left over", func() bool {
			after = resources(t, dir)
			return after == before
		}, func() string { return fmt.Sprintf("before:\n%s\nafter:\n%s", before, after) })
	})
}

// resources lists what this process holds, and the mounts below dir.
func resources(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil { // all but ReadDir's own
			fmt.Fprintln(&b, fd.Name(), target)
		}
	}
	mounts, err := Mounts(MountFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, dir+"/") { // not those of other processes
			fmt.Fprintln(&b, m)
		}
	}
	fmt.Fprintln(&b, servingThreads(t), "threads")
	return b.String()
}

func servingThreads(t testing.TB) (n int) {
	t.Helper()
	names, err := filepath.Glob("/proc/self/task/*/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if comm, err := os.ReadFile(name); err == nil && string(bytes.TrimSpace(comm)) == threadName {
			n++
		}
	}
	return n
}

func eventually(t testing.TB, complaint string, holds func() bool, more ...func() string) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, f := range more {
				complaint += "\n" + f()
			}
			t.Fatal(complaint)
		}
	}
}

func stat(path string) error {
	var st unix.Stat_t
	return unix.Stat(path, &st)
}

// within fails the test unless fn returns in time.
func within(t testing.TB, what string, fn func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	case <-time.After(patience):
		t.Fatalf("%s hangs", what)
	}
}

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

// blocker is a lookup hook that holds names that begin with "block" until released.
type blocker struct {
	entered chan uint64 // unique ids
	held    chan struct{}
	release func() // may be called again
}

func newBlocker() *blocker {
	held := make(chan struct{})
	return &blocker{entered: make(chan uint64, 1000), held: held, release: sync.OnceFunc(func() { close(held) })}
}

func (b *blocker) lookup(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if strings.HasPrefix(name, "block") {
		b.entered <- h.Unique
		<-b.held
	}
	return fuse.OK
}

// wait waits until n lookups are being held.
func (b *blocker) wait(t *testing.T, n int) (unique uint64) {
	t.Helper()
	for i := range n {
		select {
		case unique = <-b.entered:
		case <-time.After(patience):
			t.Fatalf("%d of %d handlers run", i, n)
		}
	}
	return unique
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

func (panickyResult) Size() int                          { return 1 }
func (panickyResult) Done()                              {}
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

func TestNotify(t *testing.T) {
	fs := newTestFS()
	fs.entryValid = 3600
	m := mountTest(t, fs, Options{}).serve()
	look := func(want int64) {
		t.Helper()
		if err := stat(m.path(fileName)); err != nil {
			t.Fatal(err)
		}
		if n := fs.lookups.Load(); n != want {
			t.Fatalf("%d lookups, want %d", n, want)
		}
	}
	look(1)
	look(1)
	if err := m.NotifyInvalEntry(fuse.FUSE_ROOT_ID, fileName); err != nil {
		t.Fatal(err)
	}
	look(2)
	if err := m.NotifyDelete(fuse.FUSE_ROOT_ID, fileNode, fileName); err != nil {
		t.Fatal(err)
	}
	look(3)

	attrs := m.Counts()["GETATTR"]
	if err := m.NotifyInvalInode(fileNode, 0, 0); err != nil {
		t.Fatal(err)
	}
	look(3)
	if n := m.Counts()["GETATTR"]; n != attrs+1 {
		t.Errorf("%d GETATTR requests after an invalidation", n-attrs)
	}
	for what, err := range map[string]error{
		"entry":  m.NotifyInvalEntry(fuse.FUSE_ROOT_ID, "unknown"),
		"parent": m.NotifyInvalEntry(99, "unknown"),
		"inode":  m.NotifyInvalInode(99, 0, 0),
		"delete": m.NotifyDelete(fuse.FUSE_ROOT_ID, 99, "unknown"),
	} {
		if err != nil {
			t.Errorf("unknown %s: %v", what, err)
		}
	}
	if err := m.NotifyInvalEntry(fuse.FUSE_ROOT_ID, strings.Repeat("n", 5000)); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Errorf("too long a name: %v", err)
	}

	if err := m.Unmount(false); err != nil {
		t.Fatal(err)
	}
	m.waitServed(t)
	if err := m.NotifyInvalEntry(fuse.FUSE_ROOT_ID, fileName); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	if _, err := m.OpenBacking(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	if fd := m.FD(); fd != -1 {
		t.Errorf("after the end the descriptor is %d", fd)
	}
}

func TestNotifyResend(t *testing.T) {
	b, fs := newBlocker(), newTestFS()
	fs.lookup = b.lookup
	m := mountTest(t, fs, Options{}).serve()
	t.Cleanup(b.release)
	result := make(chan error, 1)
	go func() { result <- stat(m.path("block")) }()
	first := b.wait(t, 1)
	if err := m.NotifyResend(); err != nil {
		t.Fatal(err)
	}
	if again := b.wait(t, 1); again != first|1<<63 {
		t.Errorf("sent as %x, and again as %x", first, again)
	}
	b.release()
	if err := <-result; err != unix.ENOENT {
		t.Error(err)
	}
	if n := m.logs.Len(); n != 0 {
		t.Errorf("the reply that came too late was logged: %v", m.logs.All())
	}
}

func TestBacking(t *testing.T) {
	fs := newTestFS()
	m := mountTest(t, fs, Options{})
	if m.Capabilities()&fuse.CAP_PASSTHROUGH == 0 {
		t.Fatal("this test needs a kernel with FUSE passthrough")
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "backing"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString("backing"); err != nil {
		t.Fatal(err)
	}
	fs.content = []byte("daemon!")
	id, err := m.OpenBacking(int(file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if id <= 0 {
		t.Errorf("backing id %d", id)
	}
	fs.open = func(out *fuse.OpenOut) fuse.Status {
		out.OpenFlags, out.BackingID = fuse.FOPEN_PASSTHROUGH, id
		return fuse.OK
	}
	m.serve()
	fd, err := unix.Open(m.path(fileName), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := m.CloseBacking(id); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 20)
	if n, err := unix.Read(fd, buf); err != nil || string(buf[:n]) != "backing" {
		t.Errorf("read %q, %v", buf[:max(n, 0)], err)
	}
	if err := m.CloseBacking(id); !errors.Is(err, unix.ENOENT) {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := m.OpenBacking(-1); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
}

func TestUnmount(t *testing.T) {
	fs := newTestFS()
	fs.content = []byte("content")
	m := mountTest(t, fs, Options{}).serve()
	fd, err := unix.Open(m.path(fileName), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Unmount(false); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("unmount of a busy mount: %v", err)
	}
	if err := m.Unmount(true); err != nil {
		t.Fatal(err)
	}
	if err := stat(m.path(fileName)); err != unix.ENOENT {
		t.Errorf("after a lazy unmount the file is found: %v", err)
	}
	buf := make([]byte, 7)
	if n, err := unix.Read(fd, buf); err != nil || string(buf[:n]) != "content" {
		t.Errorf("after a lazy unmount: %q, %v", buf[:max(n, 0)], err)
	}
	if err := m.Unmount(false); err != nil {
		t.Errorf("the second unmount: %v", err)
	}
	select {
	case err := <-m.served:
		t.Fatalf("Serve ended under an open file: %v", err)
	default:
	}
	unix.Close(fd)
	m.waitServed(t)
	if err := m.Serve(); !errors.Is(err, ErrServed) {
		t.Errorf("the second Serve: %v", err)
	}
}

func TestUnmountBeforeServe(t *testing.T) {
	m := mountTest(t, newTestFS(), Options{})
	if err := m.Unmount(false); err != nil {
		t.Fatal(err)
	}
	m.serve().waitServed(t)
}

func TestUnmountByOthers(t *testing.T) {
	m := mountTest(t, newTestFS(), Options{}).serve()
	if err := unix.Unmount(m.dir, 0); err != nil {
		t.Fatal(err)
	}
	m.waitServed(t)
	if err := m.Unmount(false); err != nil {
		t.Error(err)
	}
}

func TestUnmountWithRunningHandler(t *testing.T) {
	b, fs := newBlocker(), newTestFS()
	fs.lookup = b.lookup
	m := mountTest(t, fs, Options{}).serve()
	t.Cleanup(b.release)
	result := make(chan error, 1)
	go func() { result <- stat(m.path("block")) }()
	b.wait(t, 1)
	if err := abortConnection(m.device(t)); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err != unix.ECONNABORTED && err != unix.ENOTCONN {
		t.Errorf("an aborted request answers %v", err)
	}
	select {
	case <-m.served:
		t.Fatal("Serve ended before a handler")
	case <-time.After(50 * time.Millisecond):
	}
	if n := fs.unmounted.Load(); n != 0 {
		t.Error("OnUnmount was called before a handler ended")
	}
	b.release()
	m.waitServed(t)
	if err := Detach(m.dir); err != nil {
		t.Error(err)
	}
}

func TestAnswered(t *testing.T) {
	b, fs := newBlocker(), newTestFS()
	fs.lookup = b.lookup
	m := mountTest(t, fs, Options{}).serve()
	t.Cleanup(b.release)
	if !m.Answered(0) {
		t.Error("nothing is asked, and is not answered")
	}
	result := make(chan error, 1)
	go func() { result <- stat(m.path("block")) }()
	b.wait(t, 1)
	if m.Answered(20 * time.Millisecond) {
		t.Error("a handler runs, and its request is answered")
	}
	answered := make(chan bool, 1)
	go func() { answered <- m.Answered(time.Minute) }()
	// What is asked after that is not waited for.
	within(t, "a request beside", func() error { return stat(m.path(fileName)) })
	select {
	case <-answered:
		t.Error("it did not wait")
	case <-time.After(20 * time.Millisecond):
	}
	b.release()
	within(t, "the answer", func() error {
		if !<-answered {
			t.Error("it gave up")
		}
		return nil
	})
	if err := <-result; err != unix.ENOENT {
		t.Error(err)
	}
}

func (m *mounted) device(t testing.TB) uint64 {
	t.Helper()
	entries, err := Mounts(MountFilter{Name: m.opts.Name, Mountpoint: m.dir})
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	return entries[0].Device
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

func TestInit(t *testing.T) {
	m := mountTest(t, newTestFS(), Options{}).serve()
	msg := bytes.Clone(m.state.Init())
	if len(msg) < inHeaderSize || requestOpcode(msg) != opInit || int(binary.NativeEndian.Uint32(msg)) != len(msg) {
		t.Errorf("INIT message: %x", msg)
	}
	const want = wantedCapabilities | fuse.CAP_EXPLICIT_INVAL_DATA | fuse.CAP_POSIX_ACL | fuse.CAP_ALLOW_IDMAP |
		fuse.CAP_READDIRPLUS | fuse.CAP_PASSTHROUGH
	offered := uint64(binary.NativeEndian.Uint32(msg[52:])) | uint64(binary.NativeEndian.Uint32(msg[56:]))<<32
	if got := m.Capabilities(); got&want != want&offered {
		t.Errorf("capabilities %x, want %x", got, want&offered)
	}
	if got := m.Capabilities() & refusedCapabilities; got != 0 {
		t.Errorf("capabilities %x are not wanted", got)
	}
	if offered>>39&1 == 1 != m.Resends() {
		t.Errorf("offered %x, and Resends says %v", offered, m.Resends())
	}
	if names := missingCapabilities(0, fuse.CAP_PASSTHROUGH); len(names) != len(capabilityNames)-1 {
		t.Errorf("missing: %v", names)
	}
}

func TestMountFlags(t *testing.T) {
	for _, c := range []struct {
		name  string
		o     Options
		flags int64
	}{
		{"default", Options{}, unix.ST_NODEV},
		{"no suid", Options{NoSuid: true}, unix.ST_NODEV | unix.ST_NOSUID},
		{"named", Options{AllowDevices: true, Name: "croft-test", FsName: "some,pool"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) { // one at a time: checkLeaks counts the process's threads
			m := mountTest(t, newTestFS(), c.o).serve()
			var st unix.Statfs_t
			if err := unix.Statfs(m.dir, &st); err != unix.ENOSYS { // the test's filesystem has no STATFS
				t.Error(err)
			}
			entries, err := Mounts(MountFilter{Name: c.o.Name, Source: c.o.FsName, Mountpoint: m.dir})
			if err != nil || len(entries) != 1 {
				t.Fatal(entries, err)
			}
			if e := entries[0]; e.Root != "/" || e.Type != "fuse."+m.opts.Name || e.Source != m.opts.FsName {
				t.Errorf("mountinfo shows %+v", e)
			}
			options := mountOptions(t, m.dir)
			if strings.Contains(options, "nodev") != (c.flags&unix.ST_NODEV != 0) || strings.Contains(options, "nosuid") != (c.flags&unix.ST_NOSUID != 0) {
				t.Errorf("options %s with %+v", options, c.o)
			}
		})
	}
}

func mountOptions(t *testing.T, dir string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == dir {
			return f[3]
		}
	}
	t.Fatalf("no mount on %s", dir)
	return ""
}

func TestMountFaults(t *testing.T) {
	requireFuse(t)
	checkLeaks(t)
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "plain")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		o    Options
		want error
	}{
		"absent":     {Options{Mountpoint: filepath.Join(dir, "absent")}, unix.ENOENT},
		"plain file": {Options{Mountpoint: file}, unix.ENOTDIR},
		"link":       {Options{Mountpoint: link}, nil},
		"empty":      {Options{}, nil},
		"root":       {Options{Mountpoint: "/"}, nil},
	} {
		if _, err := Mount(newTestFS(), c.o); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	o := Options{Mountpoint: "x", Name: "a,b", MaxWrite: 1, MaxBackground: 1 << 16, MinThreads: 4, MaxThreads: 3}
	o.EnsureDefaults()
	if err := o.Validate(); err == nil || len(strings.Split(err.Error(), "\n")) != 4 {
		t.Errorf("not every fault is reported: %v", err)
	}
}

// TestStaleMounts looks for mounts that answer nothing: one whose daemon is silent, one whose daemon is gone.
func TestStaleMounts(t *testing.T) {
	requireFuse(t)
	checkLeaks(t)
	var o Options
	o.EnsureDefaults()
	dir := t.TempDir()
	silent, err := mountFuse(&o, dir)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := mountFuse(&o, dir)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(gone)
	within(t, "looking for stale mounts", func() error {
		entries, err := StaleMounts(dir)
		if err == nil && (len(entries) != 2 || entries[0].ID == entries[1].ID || entries[0].Parent != entries[1].ID) {
			err = fmt.Errorf("found %+v", entries)
		}
		return err
	})
	within(t, "detaching", func() error { return errors.Join(Detach(dir), Detach(dir)) })
	unix.Close(silent)
	if entries, err := StaleMounts(dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := Detach(dir); !errors.Is(err, unix.EINVAL) {
		t.Errorf("nothing to detach: %v", err)
	}
	if entries, err := StaleMounts(filepath.Join(dir, "absent", "absent")); err != nil || len(entries) != 0 {
		t.Errorf("absent: %v, %v", entries, err)
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
