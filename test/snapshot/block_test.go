package snapshot_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// attach attaches a block volume and returns its device, which is detached at the test's end.
func attach(t *testing.T, p *kit.Pool, name string, args ...string) string {
	t.Helper()
	device := strings.TrimSpace(p.MustVolume("attach", append([]string{name}, args...)...))
	t.Cleanup(func() {
		if t.Failed() { // else the test has done it
			kit.Exec(t, "losetup", "--detach", device)
		}
	})
	return device
}

// failing runs a command that must fail, and say want.
func failing(t *testing.T, p *kit.Pool, want string, args ...string) {
	t.Helper()
	r := p.Croft(args...)
	if r.Code != 1 || !strings.Contains(r.Stderr, want) {
		t.Errorf("croft %s: %s; want %q", strings.Join(args, " "), r, want)
	}
}

// TestBlock gives a block volume its life: attached, formatted, mounted, grown, attached still when the daemon was
// killed, copied, detached, deleted.
func TestBlock(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		kit.Need(t, "mkfs.ext4", "losetup", "blockdev")
		p := kit.NewPool(t, fstype)
		p.Mount()
		p.MustVolume("create", "b", "--block", "--size", "64Mi")
		var st unix.Stat_t
		kit.OK(t, unix.Stat(filepath.Join(p.Dir, "blocks", "b"), &st))
		if st.Size != 64*kit.Mi || st.Blocks*512 < 64*kit.Mi {
			t.Errorf("its file has %d bytes, and blocks for %d", st.Size, st.Blocks*512)
		}
		if _, err := os.Stat(p.Path("b")); !os.IsNotExist(err) {
			t.Errorf("it is in the mount: %v", err)
		}
		device := attach(t, p, "b")
		if again := attach(t, p, "b"); again != device {
			t.Errorf("attached as %s, and then as %s", device, again)
		}
		failing(t, p, "detach it first", "volume", "attach", "--pool", p.Dir, "b", "--read-only")
		kit.Must(t, "mkfs.ext4", "-q", "-E", "nodiscard", device)
		mnt := kit.TempDir(t)
		kit.Must(t, "mount", "-o", "nodiscard", device, mnt)
		t.Cleanup(func() { kit.Unmount(t, mnt) })
		kit.OK(t, os.WriteFile(mnt+"/file", []byte("in the block volume"), 0o644))
		failing(t, p, "is mounted", "volume", "detach", "--pool", p.Dir, "b")
		failing(t, p, "attached as "+device, "volume", "delete", "--pool", p.Dir, "b")

		p.Daemon().Kill()
		p.Mount()
		if v := p.Show("b"); v.Device != device || v.Kind != "block" || v.Used != v.Limit {
			t.Errorf("after a kill it is %+v", v)
		}
		p.MustVolume("resize", "b", "--size", "96Mi")
		if size := strings.TrimSpace(kit.Must(t, "blockdev", "--getsize64", device)); size != strconv.Itoa(96*kit.Mi) {
			t.Errorf("its device has %s bytes", size)
		}
		failing(t, p, "cannot become smaller", "volume", "resize", "--pool", p.Dir, "b", "--size", "64Mi")
		failing(t, p, "has no inodes", "volume", "resize", "--pool", p.Dir, "b", "--inodes", "10")
		kit.Must(t, "sync", "-f", mnt)

		if fstype == "ext4" {
			failing(t, p, "cannot copy it while it is written", "snapshot", "create", "--pool", p.Dir, "b", "s")
			kit.Unmount(t, mnt)
			p.MustVolume("detach", "b")
			snapshot(t, p, "create", "b", "s")
		} else {
			snapshot(t, p, "create", "b", "s") // as after a power cut: its journal is replayed
			kit.Unmount(t, mnt)
			p.MustVolume("detach", "b")
		}
		p.MustVolume("detach", "b")
		if v := p.Show("b"); v.Device != "" {
			t.Errorf("detached, it is %s", v.Device)
		}
		p.MustVolume("delete", "b")
		p.Check()
		failing(t, p, "is below", "snapshot", "restore", "--pool", p.Dir, "s", "r", "--size", "64Mi")
		snapshot(t, p, "restore", "s", "r", "--size", "128Mi")
		p.MustVolume("clone", "r", "c")
		for _, name := range []string{"r", "c"} {
			device := attach(t, p, name)
			if size := strings.TrimSpace(kit.Must(t, "blockdev", "--getsize64", device)); size != strconv.Itoa(128*kit.Mi) {
				t.Errorf("the device of %s has %s bytes", name, size)
			}
			kit.Must(t, "mount", "-o", "nodiscard", device, mnt)
			if text, err := os.ReadFile(mnt + "/file"); err != nil || string(text) != "in the block volume" {
				t.Errorf("%s holds %q, %v", name, text, err)
			}
			kit.Unmount(t, mnt)
			p.MustVolume("detach", name)
		}
		device = attach(t, p, "c", "--read-only")
		if err := os.WriteFile(device, []byte("x"), 0); err == nil {
			t.Error("a read-only device was written")
		}
		p.MustVolume("detach", "c")

		// On a pool that is not mounted.
		p.Stop()
		device = attach(t, p, "c")
		p.MustVolume("delete", "c", "--force")
		kit.Poll(t, "the end of "+device, func() bool {
			_, err := os.Stat(filepath.Join("/sys/block", filepath.Base(device), "loop"))
			return os.IsNotExist(err)
		})
		p.Check()
	})
}

// TestWipe looks for what volumes held in the image that their pool is in, when they were deleted.
func TestWipe(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		image := filepath.Join(kit.TempDir(t), "image")
		kit.MakeImage(t, image, kit.Gi)
		kit.MakeFS(t, fstype, image)
		p := kit.NewPoolIn(t, kit.MountImage(t, image, "nodiscard"))
		p.Mount()
		// What is wiped, and as a proof that it would be found, what is not.
		for _, name := range []string{"wiped", "kept"} {
			args := []string{}
			if name == "wiped" {
				args = append(args, "--wipe")
			}
			dir := p.Create(name, 64*kit.Mi, args...)
			kit.OK(t, os.Mkdir(dir+"/sub", 0o755))
			for i, file := range []string{"/a", "/sub/b", "/sub/c"} {
				kit.OK(t, os.WriteFile(dir+file, mark(name, 8192<<(4*i)), 0o600))
			}
			kit.OK(t, os.Link(dir+"/a", dir+"/sub/a"))
		}
		snapshot(t, p, "create", "wiped", "s")
		snapshot(t, p, "restore", "s", "r")
		if v := p.Show("r"); !v.Wipe {
			t.Errorf("what was restored from a wiped one: %+v", v)
		}
		p.Idle()
		kit.Must(t, "sync", "-f", p.Backing)
		for _, name := range []string{"wiped", "kept"} {
			if !contains(t, image, mark(name, 512)) {
				t.Errorf("%s is not in the image before it is deleted", name)
			}
		}
		for _, name := range []string{"wiped", "r", "kept"} {
			p.MustVolume("delete", name)
		}
		snapshot(t, p, "delete", "s")
		kit.Poll(t, "an empty trash", func() bool {
			left, err := os.ReadDir(filepath.Join(p.Dir, "trash"))
			return err == nil && len(left) == 0
		})
		kit.Must(t, "sync", "-f", p.Backing)
		if !contains(t, image, mark("kept", 512)) {
			t.Error("what was not wiped is not in the image, so that nothing is proved")
		}
		if contains(t, image, mark("wiped", 512)) {
			t.Error("what was to be wiped is in the image")
		}
	})
}

// mark returns so many bytes that are in no other file.
func mark(name string, size int) []byte {
	return bytes.Repeat([]byte("croft-wipe-test:"+strings.Repeat(name+"!", 16)), size)[:size]
}

// contains tells whether a file has some bytes in a row.
func contains(t *testing.T, path string, what []byte) bool {
	t.Helper()
	f, err := os.Open(path)
	kit.OK(t, err)
	defer f.Close()
	size, err := f.Seek(0, 2)
	kit.OK(t, err)
	buf := make([]byte, 16*kit.Mi)
	for at := int64(0); at < size; at += int64(len(buf) - len(what)) {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return false
		}
		kit.OK(t, err)
		at = max(at, data-int64(len(what)))
		n, _ := f.ReadAt(buf, at)
		if bytes.Contains(buf[:n], what) {
			return true
		}
	}
	return false
}
