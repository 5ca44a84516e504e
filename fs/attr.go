package fs

import (
	"errors"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// stat returns a node's attributes as its users are to see them, but for the volume's
// view. h may be nil.
func (f *FS) stat(n *node, h *file) (unix.Stat_t, error) {
	var st unix.Stat_t
	var err error
	if h != nil {
		err = unix.Fstat(h.fd, &st)
	} else {
		err = f.withFD(n, func(fd int) error { return unix.Fstat(fd, &st) })
	}
	return f.visible(n, st, err)
}

// visible corrects attributes for an inode that has lost its last name: an
// orphan's only link is ours, and of one that is gone the last ones are kept.
func (f *FS) visible(n *node, st unix.Stat_t, err error) (unix.Stat_t, error) {
	if !n.has(nameless) {
		return st, err
	}
	n.lock()
	defer n.unlock()
	switch {
	case err == nil && n.orphan != "":
		st.Nlink = 0
	case err != nil && n.gone != nil && isGone(err):
		return *n.gone, nil
	}
	return st, err
}

func fillAttr(a *fuse.Attr, st *unix.Stat_t) {
	a.Ino = st.Ino
	a.Size = uint64(st.Size)
	a.Blocks = uint64(st.Blocks)
	a.Atime, a.Atimensec = uint64(st.Atim.Sec), uint32(st.Atim.Nsec)
	a.Mtime, a.Mtimensec = uint64(st.Mtim.Sec), uint32(st.Mtim.Nsec)
	a.Ctime, a.Ctimensec = uint64(st.Ctim.Sec), uint32(st.Ctim.Nsec)
	a.Mode = st.Mode
	a.Nlink = uint32(st.Nlink)
	a.Uid, a.Gid = st.Uid, st.Gid
	// FUSE carries a device number as new_encode_dev does (fs/fuse/inode.c),
	// which is what stat's 32 low bits hold.
	a.Rdev = uint32(st.Rdev)
	a.Blksize = uint32(st.Blksize)
}

func fillEntry(out *fuse.EntryOut, n *node, st *unix.Stat_t) {
	out.NodeId = n.id
	out.SetEntryTimeout(cacheTimeout)
	out.SetAttrTimeout(n.attrTimeout())
	shown := *st
	n.vol.view().show(&shown)
	fillAttr(&out.Attr, &shown)
}

func fillAttrOut(out *fuse.AttrOut, n *node, st *unix.Stat_t) {
	n.vol.view().show(st)
	fillAttr(&out.Attr, st)
	out.SetTimeout(n.attrTimeout())
}

// attrTimeout is how long the kernel may keep the attributes: stores by way of a
// passed mapping change the times and tell nobody.
func (n *node) attrTimeout() time.Duration {
	if n.has(shared) || n.has(stores) {
		return storeTimeout
	}
	return cacheTimeout
}

// noGroup is a group that nobody is in.
const noGroup = 1<<32 - 2

// rootStat makes up the attributes of the directory that lists the volumes; its times are changedVolumes'.
// Everybody may walk through it and list it. A mode with bits for the group
// would have the kernel ask for its ACL at each step of a path: it has made the
// inode before it learned that there are ACLs, and does not cache one for it
// (fuse_init_inode in fs/fuse/inode.c, acl_permission_check in fs/namei.c).
func (f *FS) rootStat() unix.Stat_t {
	changed := unix.NsecToTimespec(f.changed.Load())
	f.mu.RLock()
	volumes := len(f.volumes)
	f.mu.RUnlock()
	return unix.Stat_t{
		Ino: rootIno, Mode: unix.S_IFDIR | 0o705, Gid: noGroup, Nlink: uint64(2 + volumes), Blksize: 4096,
		Atim: changed, Mtim: changed, Ctim: changed,
	}
}

// GetAttr answers stat(2).
func (f *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId == rootIno {
		st := f.rootStat()
		fillAttr(&out.Attr, &st)
		out.SetTimeout(time.Second)
		return fuse.OK
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	var h *file
	if in.Flags()&fuse.FUSE_GETATTR_FH != 0 {
		var err error
		if h, err = f.useHandle(in.Fh()); err == nil {
			defer h.done()
		} else if err != unix.EBADF || !n.has(nameless) { // else an earlier daemon had the last descriptor
			return toStatus(err)
		}
	}
	st, err := f.stat(n, h)
	if err != nil {
		return toStatus(err)
	}
	fillAttrOut(out, n, &st)
	return fuse.OK
}

// Statx answers statx(2) when more than stat's fields is asked (the birth time).
func (f *FS) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	if in.NodeId == rootIno {
		stx := statxOf(f.rootStat())
		out.FromStatx(&stx)
		out.SetTimeout(time.Second)
		return fuse.OK
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	var stx unix.Statx_t
	err := f.withFD(n, func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, int(in.SxMask), &stx)
	})
	if err != nil {
		st, err := f.visible(n, unix.Stat_t{}, err)
		if err != nil {
			return toStatus(err)
		}
		stx = statxOf(st)
	}
	if n.has(nameless) {
		stx.Nlink = 0
	}
	n.vol.view().showStatx(&stx)
	out.FromStatx(&stx)
	out.SetTimeout(n.attrTimeout())
	return fuse.OK
}

// statxOf puts stat's fields into statx's; it does not know the birth time.
func statxOf(st unix.Stat_t) unix.Statx_t {
	stamp := func(t unix.Timespec) unix.StatxTimestamp {
		return unix.StatxTimestamp{Sec: t.Sec, Nsec: uint32(t.Nsec)}
	}
	return unix.Statx_t{
		Mask: unix.STATX_BASIC_STATS, Blksize: uint32(st.Blksize), Nlink: uint32(st.Nlink),
		Uid: st.Uid, Gid: st.Gid, Mode: uint16(st.Mode), Ino: st.Ino,
		Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: stamp(st.Atim), Mtime: stamp(st.Mtim), Ctime: stamp(st.Ctim),
		Rdev_major: unix.Major(st.Rdev), Rdev_minor: unix.Minor(st.Rdev),
	}
}

// SetAttr serves chmod, chown, truncate and utimensat. The kernel has checked
// permission (setattr_prepare) and the set-gid rule of chmod.
func (f *FS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId == rootIno {
		return fuse.EPERM
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	v := n.vol
	if err := v.begin(); err != nil {
		return toStatus(err)
	}
	defer v.end()
	defer f.lift(n)()
	if size, ok := in.GetSize(); ok {
		if err := f.setSize(n, in, size); err != nil {
			return toStatus(err)
		}
	}
	err := f.withFD(n, func(fd int) error { return f.setAttr(fd, n, in) })
	if isGone(err) && n.setGoneAttr(in) {
		err = nil
	}
	if err != nil {
		return toStatus(err)
	}
	st, err := f.stat(n, nil)
	if err != nil {
		return toStatus(err)
	}
	v.unchecked.add(n.id)
	fillAttrOut(out, n, &st)
	return fuse.OK
}

// setAttr sets owner, then mode (chown clears set-id bits, a mode given with
// it is final), then times. A foreign file becomes the group's: see group.go.
func (f *FS) setAttr(fd int, n *node, in *fuse.SetAttrIn) error {
	in, err := n.vol.view().claiming(fd, in)
	if err != nil {
		return err
	}
	uid, hasUID := in.GetUID()
	gid, hasGID := in.GetGID()
	if hasUID || hasGID {
		// Also clears set-id bits and capabilities, as FUSE_HANDLE_KILLPRIV_V2
		// wants of us. The capabilities' block of attributes may go with them.
		n.lock()
		err := f.changeHiddenLocked(n, fd, func() error {
			return unix.Fchownat(fd, "", int(int32(uid)), int(int32(gid)), unix.AT_EMPTY_PATH)
		})
		n.unlock()
		if err != nil {
			return err
		}
	}
	if mode, ok := in.GetMode(); ok {
		if n.isSymlink() {
			return unix.EOPNOTSUPP
		}
		if err := unix.Chmod(procPath(fd), mode); err != nil {
			return err
		}
	}
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) != 0 {
		times := []unix.Timespec{
			timespec(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec),
			timespec(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec),
		}
		return unix.UtimesNanoAt(fd, "", times, unix.AT_EMPTY_PATH)
	}
	return nil
}

// setGoneAttr is setAttr for a directory that was removed while somebody has it open; false
// for all else. The next daemon does not know of it.
func (n *node) setGoneAttr(in *fuse.SetAttrIn) bool {
	n.lock()
	defer n.unlock()
	if !n.isDir() || n.gone == nil {
		return false
	}
	st, now := *n.gone, unix.NsecToTimespec(time.Now().UnixNano())
	st.Ctim = now
	if uid, ok := in.GetUID(); ok {
		st.Uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		st.Gid = gid
	}
	if mode, ok := in.GetMode(); ok {
		st.Mode = unix.S_IFDIR | mode&0o7777
	}
	set := func(to *unix.Timespec, t unix.Timespec) {
		switch t.Nsec {
		case unix.UTIME_OMIT:
		case unix.UTIME_NOW:
			*to = now
		default:
			*to = t
		}
	}
	set(&st.Atim, timespec(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec))
	set(&st.Mtim, timespec(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec))
	n.gone = &st
	return true
}

func timespec(valid, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// setSize truncates or extends. What a truncation frees is credited after it.
func (f *FS) setSize(n *node, in *fuse.SetAttrIn, size uint64) error {
	cut := func(fd int) error {
		if in.Valid&fuse.FATTR_KILL_SUIDGID != 0 {
			if err := dropSetID(fd); err != nil {
				return err
			}
		}
		n.lock()
		defer n.unlock()
		if n.lostLocked() {
			return unix.ESTALE
		}
		return f.truncateLocked(n, fd, size)
	}
	if fh, ok := in.GetFh(); ok {
		h, err := f.useHandle(fh)
		if err != nil {
			return err
		}
		defer h.done()
		return cut(h.fd)
	}
	return f.withFile(n, unix.O_RDWR, cut)
}

func (f *FS) truncateLocked(n *node, fd int, size uint64) error {
	if err := f.loadLocked(n, fd); err != nil {
		return err
	}
	truncate := func() error {
		for {
			if err := unix.Ftruncate(fd, int64(size)); err != unix.EINTR {
				return err
			}
		}
	}
	grows := size > n.size
	if grows && n.opens == 0 { // fd is the only one
		f.mappedLocked(n, fd)
	}
	if grows && n.has(shared) {
		_, err := f.fillGapLocked(n, fd, size)
		return err
	}
	if grows {
		if err := f.dropSpeculationLocked(n, fd, f.roundUp(size)); err != nil {
			return err
		}
	}
	if grows && n.dense && !f.small(n.size) {
		// Only a hole is added: nothing is mapped, nothing is charged.
		if err := truncate(); err != nil {
			return errors.Join(err, f.recountLocked(n, fd, 0))
		}
		n.dense = f.roundUp(size) == f.roundUp(n.size)
		n.size = size
		return nil
	}
	if !grows && n.dense && !f.small(size) {
		if err := truncate(); err != nil {
			return errors.Join(err, f.recountLocked(n, fd, 0))
		}
		freed := f.roundUp(n.size) - f.roundUp(size)
		n.size = size
		n.settleLocked(0, -int64(freed))
		return nil
	}
	var hidden uint64
	if f.small(size) && n.isRegular() {
		var err error
		if hidden, err = f.hiddenLocked(n, fd, size); err != nil {
			return err
		}
	}
	cut := truncate
	if grows {
		tail, err := f.tailLocked(n, fd)
		if err != nil {
			return err
		}
		hidden += tail
	} else if hole, err := f.holeAtLocked(n, fd, size); err != nil {
		return err
	} else if hole {
		// By way of the block's start nothing is mapped, so that a cut does not
		// need room.
		cut = func() error {
			return errors.Join(unix.Ftruncate(fd, int64(f.roundDown(size))), truncate())
		}
	}
	hadPrealloc := n.prealloc > 0
	return f.changeLocked(n, fd, hidden, func() error {
		if err := cut(); err != nil {
			return err
		}
		if hadPrealloc && !grows {
			// The preallocation beyond the end is gone or moot.
			return quota.WritePrealloc(fd, 0)
		}
		return nil
	})
}

// dropSetID clears the set-id bits as a write or truncation by an
// unprivileged caller does: set-uid always, set-gid where the group may
// execute (fs/inode.c, setattr_should_drop_suidgid).
func dropSetID(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	drop := st.Mode & unix.S_ISUID
	if st.Mode&unix.S_IXGRP != 0 {
		drop |= st.Mode & unix.S_ISGID
	}
	if drop == 0 {
		return nil
	}
	return unix.Fchmod(fd, st.Mode&^drop&0o7777)
}
