package transport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// ResolveMountpoint returns the path that mountinfo will show: absolute, the
// links above it resolved. A mount point that is itself a link is refused. It asks nothing of
// the filesystem that may already be mounted there: that one may be dead or hung.
func ResolveMountpoint(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	abs = filepath.Join(parent, filepath.Base(abs))
	// readlink(2) fails at once on a directory; no request is sent for it.
	if target, err := os.Readlink(abs); err == nil {
		return "", fmt.Errorf("%s is a symbolic link to %s: name the directory itself", abs, target)
	}
	return abs, nil
}

// mountFuse opens the device and mounts it on mountpoint, which is resolved.
func mountFuse(o *Options, mountpoint string) (fd int, err error) {
	fd, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w", err)
	}
	var flags uintptr
	if !o.AllowDevices {
		flags |= unix.MS_NODEV
	}
	if o.NoSuid {
		flags |= unix.MS_NOSUID
	}
	// The kernel's parameters: fuse_fs_parameters in fs/fuse/inode.c.
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=%d", fd, o.MaxWrite)
	if err := unix.Mount(o.FsName, mountpoint, "fuse."+o.Name, flags, data); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount %s: %w", mountpoint, err)
	}
	return fd, nil
}

// Unmount takes the mount out of the tree. Without lazy it fails with EBUSY while
// files or directories are in use through it; when it returns nil, and there are no
// bind mounts of it, the connection has ended and Serve is about to return.
// With lazy it returns at once: new lookups no longer find the mount, and those
// who have files or directories of it keep them.
//
// Bind mounts, and copies in other mount namespaces, are mounts of their own: they do not
// make this one busy, and they are not taken away with it. Serve goes on until the last
// of them, and the last file of a lazily unmounted one, is gone.
//
// It is not an error to unmount what was unmounted before, lazily or by others.
// It must not be called from a handler.
func (c *Conn) Unmount(lazy bool) error {
	if c.dead.Load() || c.detached.Load() {
		return nil
	}
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	if err := unix.Unmount(c.mountpoint, flags); err != nil {
		if errors.Is(err, unix.EINVAL) && c.dead.Load() {
			return nil // somebody else was quicker
		}
		return fmt.Errorf("unmount %s: %w", c.mountpoint, err)
	}
	c.detached.Store(true)
	return nil
}

// MountEntry is one mount of this process's mount namespace.
type MountEntry struct {
	Mountpoint string // absolute, seen from the process's root
	Root       string // directory of the filesystem that is mounted; "/" unless it is a bind mount of a part
	Source     string // Options.FsName at the time of mounting
	Type       string // "fuse.<Options.Name>"
	ID, Parent int    // mount ids; they are reused after an unmount
	Device     uint64 // as in Stat_t.Dev, and the name of the connection in /sys/fs/fuse/connections
}

// MountFilter selects mounts. An empty field selects all, but an empty Name means "croft".
type MountFilter struct {
	Name       string // Options.Name
	Source     string // Options.FsName
	Mountpoint string // absolute and free of symbolic links, as mountinfo shows it
}

// Mounts returns the mounts of Croft that the filter selects, the latest first: the order in
// which they can be taken away. It reads mountinfo only and sends no request to
// any filesystem, so it does not hang on a dead mount.
func Mounts(f MountFilter) ([]MountEntry, error) {
	setDefault(&f.Name, defaultName)
	return mounts(func(m *mountinfo.Info) bool {
		return m.FSType == "fuse."+f.Name &&
			(f.Source == "" || m.Source == f.Source) &&
			(f.Mountpoint == "" || m.Mountpoint == f.Mountpoint)
	})
}

// MountsOn is Mounts for whatever is mounted on a mountpoint.
func MountsOn(mountpoint string) ([]MountEntry, error) {
	return mounts(func(m *mountinfo.Info) bool { return m.Mountpoint == mountpoint })
}

func mounts(selects func(*mountinfo.Info) bool) ([]MountEntry, error) {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !selects(m), false })
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	var entries []MountEntry
	for _, m := range slices.Backward(infos) {
		entries = append(entries, MountEntry{
			Mountpoint: m.Mountpoint,
			Root:       m.Root,
			Source:     m.Source,
			Type:       m.FSType,
			ID:         m.ID,
			Parent:     m.Parent,
			Device:     unix.Mkdev(uint32(m.Major), uint32(m.Minor)),
		})
	}
	return entries, nil
}

// StaleMounts returns the fuse.croft mounts on mountpoint, the latest first, or all of
// them if mountpoint is empty. It cannot tell a live mount from a dead one. A
// caller that has not mounted yet and knows that no other process serves the
// place, because it holds the pool's lock, may take them all for stale.
// The mount point is not touched: see Mounts.
func StaleMounts(mountpoint string) ([]MountEntry, error) {
	if mountpoint != "" {
		resolved, err := ResolveMountpoint(mountpoint)
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		mountpoint = resolved
	}
	return Mounts(MountFilter{Mountpoint: mountpoint})
}

// Detach lazily unmounts the topmost mount on mountpoint, dead or alive, and ends its connection if that is a mount
// of FUSE. It fails with EINVAL if nothing is mounted there.
func Detach(mountpoint string) error {
	if err := unix.Unmount(mountpoint, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("detach %s: %w", mountpoint, err)
	}
	return nil
}
