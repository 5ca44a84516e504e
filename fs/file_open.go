package fs

import (
	"errors"
	"strconv"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
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

func (f *FS) addHandle(h *file, unique uint64) uint64 {
	h.node.vol.openings.Add(1)
	f.nodes.hold(h.node)
	return f.handles.add(h, unique)
}

// Open serves open(2) of a regular file. It holds node.mu, so that an unlink
// either sees the open or is seen by it.
func (f *FS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	return toStatus(f.open(n, in, out))
}

func (f *FS) open(n *node, in *fuse.OpenIn, out *fuse.OpenOut) error {
	if !n.isRegular() {
		return unix.EINVAL
	}
	if err := f.handleRoom(n.vol); err != nil {
		return err
	}
	try := func(begun bool) error {
		n.lock()
		defer n.unlock()
		if n.lostLocked() {
			return unix.ESTALE
		}
		return f.openFileLocked(n, in.Flags, in.Unique, begun, out)
	}
	err := try(false)
	if err != errChanges {
		return err
	}
	if err := n.vol.begin(); err != nil {
		return err
	}
	defer n.vol.end()
	return try(true)
}

// Create serves open(2) with O_CREAT for a name that is not there.
func (f *FS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if err := checkName(name); err != nil {
		return toStatus(err)
	}
	err := f.make(&in.InHeader, name, 0, func(d *dirFD, made bool) (fd int, err error) {
		if err := f.handleRoom(d.node.vol); err != nil {
			return -1, err
		}
		if made {
			return openat(d.fd, name, openFlags(in.Flags)|unix.O_NOFOLLOW, 0)
		}
		caller, mode := d.node.vol.view().maker(&in.Caller, in.Mode)
		err = asCaller(&caller, in.Umask, func() error {
			fd, err = openat(d.fd, name, openFlags(in.Flags)|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, mode&0o7777)
			return err
		})
		return fd, err
	}, func(n *node, st *unix.Stat_t, fd int) {
		fillEntry(&out.EntryOut, n, st)
		n.lock()
		defer n.unlock()
		f.openNewLocked(n, fd, in.Flags, in.Unique, &out.OpenOut)
	})
	if errors.Is(err, unix.EEXIST) && in.Flags&unix.O_EXCL == 0 {
		// The kernel took the name for absent, so it has not checked whether
		// the caller may open what is there. ESTALE makes it look again.
		return fuse.Status(unix.ESTALE)
	}
	return toStatus(err)
}

// Tmpfile serves open(2) with O_TMPFILE. The file gets a name in the orphans
// directory at once, so that it is charged, counted and reaped like any other
// file without a name.
func (f *FS) Tmpfile(_ <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	var orphan string
	err := f.make(&in.InHeader, "", 0, func(d *dirFD, _ bool) (fd int, err error) {
		if err := f.handleRoom(d.node.vol); err != nil {
			return -1, err
		}
		t := f.try(&in.InHeader)
		caller, mode := d.node.vol.view().maker(&in.Caller, in.Mode)
		err = asCaller(&caller, in.Umask, func() error {
			fd, err = openat(d.fd, ".", openFlags(in.Flags)&^unix.O_ACCMODE|unix.O_RDWR|unix.O_TMPFILE, mode&0o7777)
			return err
		})
		if err != nil {
			return -1, err
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		orphan = orphanName(st.Ino)
		t.noteOrphan(st.Ino)
		if err == nil {
			err = f.withFD(d.node.vol.orphans, func(orphans int) error {
				return unix.Linkat(fd, "", orphans, orphan, unix.AT_EMPTY_PATH)
			})
		}
		if err != nil {
			syscall.Close(fd)
			return -1, err
		}
		return fd, nil
	}, func(n *node, st *unix.Stat_t, fd int) {
		st.Nlink = 0
		fillEntry(&out.EntryOut, n, st)
		n.lock()
		defer n.unlock()
		n.setOrphanLocked(orphan)
		n.exclusive = in.Flags&unix.O_EXCL != 0
		n.set(markExclusive, n.exclusive)
		f.openNewLocked(n, fd, in.Flags, in.Unique, &out.OpenOut)
	})
	return toStatus(err)
}

// orphanName names an inode in the orphans directory: by its inode number,
// which no other file there can have.
func orphanName(ino uint64) string { return strconv.FormatUint(ino, 16) }

// Release serves the last close of an open file.
func (f *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { f.release(in.Fh) }

func (f *FS) release(fh uint64) {
	h := f.handles.take(fh)
	if h == nil {
		return
	}
	n := h.node
	defer f.handles.forget(h)
	defer n.vol.openings.Add(-1)
	defer f.nodes.drop(n)
	h.close()
	if h.writes {
		n.vol.enter()
		n.lock()
		f.stopWritingLocked(h)
		n.unlock()
		n.vol.end()
	}
	if !f.lastOfNameless(n) {
		return
	}
	// An orphan's end changes the volume; closing any other file does not, and
	// must not make an idle volume dirty.
	err := n.vol.begin()
	if err == nil {
		defer n.vol.end()
	}
	n.lock()
	defer n.unlock()
	if f.closedLocked(n); n.opens > 0 || err != nil {
		return // opened again; or the volume was removed, its trees go as a whole
	}
	switch {
	case n.grave >= 0:
		if !f.nodes.knows(n) {
			f.emptyGraveLocked(n)
		}
	case n.orphan != "": // else it was given a name meanwhile
		if err := f.removeOrphanLocked(n); err != nil {
			f.log.Sugar().Errorw("reap orphan", "volume", n.vol.id, "orphan", n.orphan, "error", err)
		}
	}
}

// lastOfNameless tells whether this close is the last one of an inode without a
// name; if not, the close is counted here.
func (f *FS) lastOfNameless(n *node) bool {
	n.lock()
	defer n.unlock()
	if n.opens == 1 && (n.orphan != "" || n.grave >= 0) {
		return true
	}
	f.closedLocked(n)
	return false
}

// removeOrphanLocked frees an orphan that nobody has open any more, and credits
// it once no descriptor keeps its blocks. One that was replaced is buried.
func (f *FS) removeOrphanLocked(n *node) error {
	fd, err := f.openNode(n, unix.O_PATH)
	if err != nil {
		return err
	}
	w := &victim{n: n, fd: fd}
	defer w.close()
	if err := errors.Join(unix.Fstat(fd, &w.st), f.loadVictimLocked(w)); err != nil {
		return err
	}
	err = f.withFD(n.vol.orphans, func(orphans int) error { return unix.Unlinkat(orphans, n.orphan, 0) })
	if err != nil {
		return err
	}
	if !n.replaced || !f.buryLocked(w) {
		f.removedLocked(w)
	}
	return nil
}
