package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

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
