package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var filesystems = []string{"ext4", "xfs", "btrfs"}

// imageSize has room for the trees of all systems and rounds, which are never deleted.
const imageSize = 32 << 30

// The image never discards, neither when it is made nor when it is mounted: discards of a
// loop device punch holes in its file, under which many disks stall. ext4 would go on
// to write its inode tables in the background, and has too few inodes by default for a
// million files beside all the rest.
var (
	mkfs = map[string][]string{
		"ext4":  {"mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-i", "8192"},
		"xfs":   {"mkfs.xfs", "-q", "-K"},
		"btrfs": {"mkfs.btrfs", "-q", "-K"},
	}
	mountOptions = map[string]string{
		"ext4":  "nodiscard,noinit_itable",
		"xfs":   "nodiscard",
		"btrfs": "nodiscard",
	}
)

// makeImage makes a filesystem in dir/image and mounts it at the directory it returns.
func makeImage(ctx context.Context, run *runner, clean *cleanup, o *options, dir string) (string, error) {
	file, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := allocate(file, imageSize); err != nil {
		return "", err
	}
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return "", err
	}
	attach := []string{"losetup", "--find", "--show", file}
	if o.directIO {
		attach = append(attach, "--direct-io=on")
	}
	out, err := run.output(ctx, attach...)
	if err != nil {
		return "", err
	}
	loop := strings.TrimSpace(out)
	clean.add(func() error {
		_, err := run.quick("losetup", "--detach", loop)
		return err
	})
	if _, err := run.output(ctx, append(mkfs[o.fs], loop)...); err != nil {
		return "", err
	}
	if _, err := run.output(ctx, "mount", "-t", o.fs, "-o", mountOptions[o.fs], loop, mnt); err != nil {
		return "", err
	}
	clean.add(func() error { return unmount(mnt) })
	return mnt, nil
}

// allocate makes the file with its space reserved, so that writes in it neither fail nor
// wait for blocks to be found on the disk below; where that cannot be had, a sparse one.
func allocate(file string, size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(file), &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; free < size {
		return fmt.Errorf("%s has %d GiB free, and the image takes %d: name another place with --dir",
			filepath.Dir(file), free>>30, size>>30)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); errors.Is(err, unix.EOPNOTSUPP) {
		return f.Truncate(size)
	} else if err != nil {
		return fmt.Errorf("allocate %s: %w", file, err)
	}
	return nil
}

// unmount waits a little for the last user to go; then it only detaches, and says so.
func unmount(mnt string) error {
	var err error
	for range 100 {
		if err = unix.Unmount(mnt, unix.UMOUNT_NOFOLLOW); err == nil || errors.Is(err, unix.EINVAL) {
			return nil // EINVAL: it is not mounted
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if lazy := unix.Unmount(mnt, unix.MNT_DETACH); lazy != nil {
		return fmt.Errorf("unmount %s: %w", mnt, lazy)
	}
	return fmt.Errorf("unmount %s: %w; it was detached", mnt, err)
}

// syncFS writes back what is dirty, so that one run does not pay for the one before it.
func syncFS(mnt string) error {
	f, err := os.Open(mnt)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// dropInodes makes the kernel forget names and inodes that are not in use. FORGETs reach
// a daemon in the background; they get a moment to.
func dropInodes(mnt string) error {
	if err := syncFS(mnt); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2\n"), 0); err != nil {
		return err
	}
	time.Sleep(200 * time.Millisecond)
	return nil
}
