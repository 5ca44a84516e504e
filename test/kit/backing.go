package kit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Filesystems are the backing filesystems that a pool may be on.
var Filesystems = []string{"ext4", "xfs", "btrfs"}

// EachFS runs a test on each backing filesystem.
func EachFS(t *testing.T, test func(t *testing.T, fstype string)) {
	t.Helper()
	for _, fstype := range Filesystems {
		t.Run(fstype, func(t *testing.T) { test(t, fstype) })
	}
}

// Gi is 2^30, Mi 2^20, Ki 2^10.
const (
	Ki = 1 << 10
	Mi = 1 << 20
	Gi = 1 << 30
)

// Backing makes a filesystem in a sparse image, mounts it and returns where. It
// is gone with the test.
func Backing(t testing.TB, fstype string, size int64) string {
	t.Helper()
	Need(t, "mkfs."+fstype, "mount", "umount", "losetup")
	image := filepath.Join(TempDir(t), "image")
	MakeImage(t, image, size)
	MakeFS(t, fstype, image)
	return MountImage(t, image, "nodiscard")
}

// MakeImage makes a sparse file.
func MakeImage(t testing.TB, path string, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	OK(t, err)
	defer f.Close()
	OK(t, f.Truncate(size))
}

// MakeFS formats a file or a device.
func MakeFS(t testing.TB, fstype, path string) {
	t.Helper()
	switch fstype {
	case "ext4":
		Must(t, "mkfs.ext4", "-q", "-F", "-E", "nodiscard", path)
	case "xfs":
		Must(t, "mkfs.xfs", "-q", "-f", "-K", path)
	case "btrfs":
		Must(t, "mkfs.btrfs", "-q", "-f", "-K", path)
	default:
		t.Fatalf("no such filesystem: %s", fstype)
	}
}

// MountImage mounts an image through a loop device of its own, which goes when
// it is unmounted at the test's end.
func MountImage(t testing.TB, image, options string) string {
	t.Helper()
	dir := TempDir(t)
	t.Cleanup(func() { checkLoop(t, image) })
	Must(t, "mount", "-o", "loop,"+options, image, dir)
	t.Cleanup(func() { Unmount(t, dir) })
	return dir
}

// MountDevice mounts a device until the test's end.
func MountDevice(t testing.TB, device, options string) string {
	t.Helper()
	dir := TempDir(t)
	Must(t, "mount", "-o", options, device, dir)
	t.Cleanup(func() { Unmount(t, dir) })
	return dir
}

// AttachLoop makes a loop device of an image, detached at the test's end.
func AttachLoop(t testing.TB, image string, options ...string) string {
	t.Helper()
	args := append([]string{"--find", "--show"}, options...)
	device := strings.TrimSpace(Must(t, "losetup", append(args, image)...))
	t.Cleanup(func() {
		Must(t, "losetup", "--detach", device)
		checkLoop(t, image)
	})
	return device
}

// Unmount takes away what is mounted on dir. What is still in use is a fault of
// the test or of the daemon; it is then detached so that the next test can go on.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	var err error
	for {
		if err = unix.Unmount(dir, 0); err != unix.EINTR {
			break
		}
	}
	if err == nil || err == unix.EINVAL { // EINVAL: nothing is mounted there any more
		return
	}
	t.Errorf("unmount %s: %v", dir, err)
	_ = unix.Unmount(dir, unix.MNT_DETACH)
}

// checkLoop fails the test when a loop device still has the image. The kernel
// frees the device after the unmount has returned, so it is waited for.
func checkLoop(t testing.TB, image string) {
	t.Helper()
	var left []string
	gone := poll(func() bool {
		left = nil
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, file := range files {
			name, err := os.ReadFile(file)
			if err == nil && strings.HasPrefix(string(name), image) {
				left = append(left, file)
			}
		}
		return len(left) == 0
	})
	if !gone {
		t.Errorf("loop devices are left: %v", left)
	}
}

// MountsOn lists all that is mounted on a path, by mountinfo: a dead FUSE mount must not be touched.
func MountsOn(t testing.TB, path string) []*mountinfo.Info {
	t.Helper()
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != path, false })
	if err != nil {
		t.Fatalf("mountinfo: %v", err)
	}
	return infos
}
