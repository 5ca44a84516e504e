package transport

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

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
	if known, err := m.NotifyInvalInode(fileNode, 0, 0); err != nil || !known {
		t.Fatal(err)
	}
	look(3)
	if n := m.Counts()["GETATTR"]; n != attrs+1 {
		t.Errorf("%d GETATTR requests after an invalidation", n-attrs)
	}
	for what, err := range map[string]error{
		"entry":  m.NotifyInvalEntry(fuse.FUSE_ROOT_ID, "unknown"),
		"parent": m.NotifyInvalEntry(99, "unknown"),
		"delete": m.NotifyDelete(fuse.FUSE_ROOT_ID, 99, "unknown"),
	} {
		if err != nil {
			t.Errorf("unknown %s: %v", what, err)
		}
	}
	if known, err := m.NotifyInvalInode(99, 0, 0); known || err != nil {
		t.Errorf("unknown inode: %t, %v", known, err)
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
