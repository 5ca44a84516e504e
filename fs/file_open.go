package fs

import (
	"errors"
	"strconv"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// openFlags are the caller's flags that the backing descriptor gets: how to
// access and how durable a write is. Not O_APPEND (the kernel sends offsets,
// and Linux's pwrite would ignore them), not O_DIRECT (its alignment rules are
// the backing filesystem's, FUSE has none), not O_TRUNC (it comes as SETATTR).
func openFlags(flags uint32) int {
	access := int(flags) & unix.O_ACCMODE
	if access == unix.O_WRONLY {
		access = unix.O_RDWR
	}
	return access | int(flags)&(unix.O_SYNC|unix.O_DSYNC|unix.O_NOATIME)
}

// fileOpenOut is how the kernel is to treat an open file: everything comes to
// the daemon, and the page cache stays valid between opens because nobody else
// changes the file. Here the open modes with passthrough will be chosen.
func fileOpenOut(out *fuse.OpenOut, fh uint64) {
	out.Fh = fh
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
}

// addHandle makes a handle of fd, which belongs to it from then on.
func (f *FS) addHandle(n *node, fd int, flags uint32) uint64 {
	n.vol.openings.Add(1)
	return f.handles.add(&file{node: n, fd: fd, flags: flags})
}

// Open serves open(2) of a regular file. It holds node.mu, so that an unlink
// either sees the open or is seen by it.
func (f *FS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	fh, err := f.open(n, in.Flags)
	if err != nil {
		return toStatus(err)
	}
	fileOpenOut(out, fh)
	return fuse.OK
}

func (f *FS) open(n *node, flags uint32) (uint64, error) {
	if !n.isRegular() {
		return 0, unix.EINVAL
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	fd, err := f.openNode(n, openFlags(flags))
	if err != nil {
		return 0, err
	}
	n.opens++
	return f.addHandle(n, fd, flags), nil
}

// Create serves open(2) with O_CREAT for a name that is not there.
func (f *FS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	err := f.make(in.NodeId, name, 0, func(d *dirFD) (fd int, err error) {
		err = asCaller(&in.Caller, in.Umask, func() error {
			fd, err = openat(d.fd, name, openFlags(in.Flags)|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, in.Mode&0o7777)
			return err
		})
		return fd, err
	}, func(n *node, st *unix.Stat_t, fd int) {
		n.mu.Lock()
		n.opens++
		n.mu.Unlock()
		fillEntry(&out.EntryOut, n, st)
		fileOpenOut(&out.OpenOut, f.addHandle(n, fd, in.Flags))
	})
	if errors.Is(err, unix.EEXIST) && in.Flags&unix.O_EXCL == 0 {
		return f.openExisting(in, name, out)
	}
	return toStatus(err)
}

// openExisting opens a name that turned out to be there.
func (f *FS) openExisting(in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if status := f.Lookup(nil, &in.InHeader, name, &out.EntryOut); status != fuse.OK {
		return status
	}
	fh, err := f.open(f.nodes.get(out.NodeId), in.Flags)
	if err != nil {
		f.nodes.forget(out.NodeId, 1)
		return toStatus(err)
	}
	fileOpenOut(&out.OpenOut, fh)
	return fuse.OK
}

// Tmpfile serves open(2) with O_TMPFILE. The file gets a name in the orphans
// directory at once, so that it is charged, counted and reaped like any other
// file without a name.
func (f *FS) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	var orphan string
	err := f.make(in.NodeId, "", 0, func(d *dirFD) (fd int, err error) {
		err = asCaller(&in.Caller, in.Umask, func() error {
			fd, err = openat(d.fd, ".", openFlags(in.Flags)&^unix.O_ACCMODE|unix.O_RDWR|unix.O_TMPFILE, in.Mode&0o7777)
			return err
		})
		if err != nil {
			return -1, err
		}
		orphan = f.orphanName(fd)
		if err := unix.Linkat(fd, "", int(d.node.vol.orphans.Fd()), orphan, unix.AT_EMPTY_PATH); err != nil {
			syscall.Close(fd)
			return -1, err
		}
		return fd, nil
	}, func(n *node, st *unix.Stat_t, fd int) {
		n.mu.Lock()
		n.opens++
		n.setOrphanLocked(orphan)
		n.exclusive = in.Flags&unix.O_EXCL != 0
		n.mu.Unlock()
		st.Nlink = 0
		fillEntry(&out.EntryOut, n, st)
		fileOpenOut(&out.OpenOut, f.addHandle(n, fd, in.Flags))
	})
	return toStatus(err)
}

// orphanName names the inode behind fd in the orphans directory: by its inode
// number, which no other file there can have.
func (f *FS) orphanName(fd int) string {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "0" // linkat of the same descriptor fails as well
	}
	return strconv.FormatUint(st.Ino, 16)
}

// Release serves the last close of an open file.
func (f *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { f.release(in.Fh) }

// ReleaseDir serves the last close of an open directory.
func (f *FS) ReleaseDir(in *fuse.ReleaseIn) { f.release(in.Fh) }

func (f *FS) release(fh uint64) {
	h := f.handles.take(fh)
	if h == nil {
		return
	}
	n := h.node
	if n.vol == nil { // the directory of volumes
		h.close()
		return
	}
	defer n.vol.openings.Add(-1)
	h.close()
	if !f.lastOfNameless(n) {
		return
	}
	// An orphan's end changes the volume; closing any other file does not, and
	// must not make an idle volume dirty.
	err := n.vol.begin()
	if err == nil {
		defer n.vol.end()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.opens--; n.opens > 0 || err != nil {
		return // opened again; or the volume was removed, its trees go as a whole
	}
	if err := f.reapLocked(n); err != nil {
		f.log.Sugar().Errorw("reap orphan", "volume", n.vol.id, "orphan", n.orphan, "error", err)
	}
}

// lastOfNameless tells whether this close is the last one of an inode without a
// name; if not, the close is counted here.
func (f *FS) lastOfNameless(n *node) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.opens == 1 && (n.orphan != "" || n.held != (quota.Usage{})) {
		return true
	}
	n.opens--
	return false
}

// reapLocked frees what the last close of a nameless inode frees, then credits it.
func (f *FS) reapLocked(n *node) error {
	held := n.held
	n.held = quota.Usage{}
	if n.orphan != "" {
		fd, err := f.openNode(n, unix.O_PATH)
		if err != nil {
			return err
		}
		defer syscall.Close(fd)
		if err := f.loadLocked(n, fd); err != nil {
			return err
		}
		if err := unix.Unlinkat(int(n.vol.orphans.Fd()), n.orphan, 0); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		n.setGoneLocked(&st)
		held = quota.Usage{Bytes: n.charge, Inodes: 1}
	} else {
		n.vol.float(held, -1)
	}
	n.vol.ledger.Settle(quota.Usage{}, quota.Delta{Bytes: -int64(held.Bytes), Inodes: -int64(held.Inodes)})
	return nil
}
