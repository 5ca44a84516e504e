package transport

import (
	"bytes"
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

func (m *mounted) device(t testing.TB) uint64 {
	t.Helper()
	entries, err := Mounts(MountFilter{Name: m.opts.Name, Mountpoint: m.dir})
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	return entries[0].Device
}
