package fs

import (
	"errors"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

// parent returns the node of a directory inside a volume. EPERM for the
// directory of volumes: only `croft volume` changes it.
func (f *FS) parent(id uint64) (*node, error) {
	if id == rootIno {
		return nil, unix.EPERM
	}
	n := f.nodes.get(id)
	if n == nil {
		return nil, unix.ESTALE
	}
	return n, nil
}

// Lookup finds a name. A name that is not there is cached by the kernel too.
func (f *FS) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if in.NodeId == rootIno {
		return f.lookupVolume(f.request(in), name, out)
	}
	n, err := f.parent(in.NodeId)
	if err != nil {
		return toStatus(err)
	}
	if err := checkName(name); err != nil {
		return toStatus(err)
	}
	d, err := f.dir(n)
	if err != nil {
		return toStatus(err)
	}
	defer f.putDir(d)
	err = f.lookupChild(f.request(in), n.vol, d.fd, name, out)
	if err == unix.ENOENT {
		*out = fuse.EntryOut{}
		out.SetEntryTimeout(cacheTimeout)
		return fuse.OK
	}
	return toStatus(err)
}

// lookupChild fills out for a name and counts a lookup of its node, for the request q.
func (f *FS) lookupChild(q *state.Request, v *volume, dirfd int, name string, out *fuse.EntryOut) error {
	key, st, err := describeAt(dirfd, name)
	if err != nil {
		return err
	}
	fillEntry(out, f.nodes.lookup(q, v, key, st.Mode, nil), &st)
	return nil
}

func (f *FS) lookupVolume(q *state.Request, name string, out *fuse.EntryOut) fuse.Status {
	v, err := f.volume(name)
	if err != nil {
		// Not cached: the volume may be made at any time.
		return fuse.ENOENT
	}
	var st unix.Stat_t
	err = f.withFD(v.root, func(fd int) error { return unix.Fstat(fd, &st) })
	if err != nil {
		return toStatus(err)
	}
	n := f.nodes.lookup(q, v, v.root.key, st.Mode, nil)
	fillEntry(out, n, &st)
	return fuse.OK
}

// make performs what makes an inode: it reserves the inode and worst bytes,
// calls create in the parent's directory, finds out what came of it and charges
// that. create returns a descriptor of the inode, or -1 to have it looked up by
// name; made tells it that an earlier daemon has made the inode already. done gets
// the node, looked up once, and the descriptor; one that create returned is done's
// from then on.
func (f *FS) make(in *fuse.InHeader, name string, worst uint64, create func(d *dirFD, made bool) (int, error), done func(*node, *unix.Stat_t, int)) error {
	p, err := f.parent(in.NodeId)
	if err != nil {
		return err
	}
	v := p.vol
	if err := v.begin(); err != nil {
		return err
	}
	defer v.end()
	d, err := f.dir(p)
	if err != nil {
		return err
	}
	defer f.putDir(d)
	t := f.try(in)
	made := t.again && name != "" && exists(d.fd, name)
	reserved, err := t.reserve(v, quota.Usage{Bytes: worst, Inodes: 1})
	if err != nil {
		return err
	}
	t.trying()
	fd, err := create(d, made)
	if err != nil {
		t.failed(v, reserved)
		return err
	}
	t.step("made")
	if err := f.adopt(t, d, name, fd, reserved, done); err != nil {
		// It is there and was not seen: all that was reserved stays charged.
		t.settle(v, reserved, quota.Delta{Bytes: int64(worst), Inodes: 1})
		return err
	}
	return nil
}

// exists tells whether there is such a name.
func exists(dirfd int, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// adopt charges a new inode and makes its node.
func (f *FS) adopt(t *attempt, d *dirFD, name string, fd int, reserved quota.Usage, done func(*node, *unix.Stat_t, int)) error {
	kept := fd >= 0
	if !kept {
		var err error
		if fd, err = openChild(d.fd, name); err != nil {
			return err
		}
		defer syscall.Close(fd)
	}
	key, st, err := describe(fd)
	var charge uint64
	if err == nil {
		err = d.node.vol.view().claimMade(fd, &st)
	}
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		_, charge, _, err = f.measure(fd)
	}
	if err != nil {
		if kept {
			syscall.Close(fd)
		}
		return err
	}
	v := d.node.vol
	// The charge is in the ledger before the node has it: see fs/state.
	t.settle(v, reserved, quota.Delta{Bytes: int64(charge), Inodes: 1})
	n := f.nodes.lookup(t.request, v, key, st.Mode, func(n *node) {
		n.setChargeLocked(charge)
		n.charged, n.size = true, uint64(st.Size)
		n.dense = n.isRegular()
		n.setIO(ioNone)
		n.set(nocaps, true)
	})
	done(n, &st, fd)
	return nil
}

// makeEntry is make for what is not opened at once.
func (f *FS) makeEntry(in *fuse.InHeader, umask, mode uint32, name string, worst uint64, out *fuse.EntryOut, create func(dirfd int, mode uint32) error) fuse.Status {
	if err := checkName(name); err != nil {
		return toStatus(err)
	}
	return toStatus(f.make(in, name, worst, func(d *dirFD, made bool) (int, error) {
		if made {
			return -1, nil
		}
		caller, mode := d.node.vol.view().maker(&in.Caller, mode)
		return -1, asCaller(&caller, umask, func() error { return create(d.fd, mode) })
	}, func(n *node, st *unix.Stat_t, _ int) { fillEntry(out, n, st) }))
}

// Mknod serves mknod(2): regular files, FIFOs, sockets and devices.
func (f *FS) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.makeEntry(&in.InHeader, in.Umask, in.Mode, name, 0, out, func(dirfd int, mode uint32) error {
		return unix.Mknodat(dirfd, name, mode, int(in.Rdev))
	})
}

// Mkdir serves mkdir(2).
func (f *FS) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.makeEntry(&in.InHeader, in.Umask, in.Mode, name, f.rule.Block, out, func(dirfd int, mode uint32) error {
		return unix.Mkdirat(dirfd, name, mode)
	})
}

// Symlink serves symlink(2).
func (f *FS) Symlink(_ <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return f.makeEntry(in, 0, 0, name, f.rule.Block, out, func(dirfd int, _ uint32) error {
		return unix.Symlinkat(target, dirfd, name)
	})
}

// Readlink serves readlink(2).
func (f *FS) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n, err := f.parent(in.NodeId)
	if err != nil {
		return nil, fuse.EINVAL
	}
	var target []byte
	err = f.withFD(n, func(fd int) error {
		buf := make([]byte, unix.PathMax)
		size, err := unix.Readlinkat(fd, "", buf)
		target = buf[:max(size, 0)]
		return err
	})
	return target, toStatus(err)
}

// Link serves link(2) and linkat(2) of an O_TMPFILE file. EXDEV between volumes.
func (f *FS) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if err := checkName(name); err != nil {
		return toStatus(err)
	}
	p, err := f.parent(in.NodeId)
	if err != nil {
		return toStatus(err)
	}
	n, err := f.parent(in.Oldnodeid)
	if err != nil {
		return toStatus(err)
	}
	if p.vol != n.vol {
		return fuse.EXDEV
	}
	v := p.vol
	if err := v.begin(); err != nil {
		return toStatus(err)
	}
	defer v.end()
	d, err := f.dir(p)
	if err != nil {
		return toStatus(err)
	}
	defer f.putDir(d)
	t := f.try(&in.InHeader)
	if !t.again || !exists(d.fd, name) {
		t.trying()
		if err := f.link(t, n, d, name); err != nil {
			return toStatus(err)
		}
	}
	v.unchecked.add(n.id)
	return toStatus(f.lookupChild(t.request, v, d.fd, name, out))
}

func (f *FS) link(t *attempt, n *node, d *dirFD, name string) error {
	n.lock()
	defer n.unlock()
	defer f.liftLocked(n)()
	if n.exclusive {
		return unix.ENOENT
	}
	if n.orphan != "" {
		// Its first name: it moves out of the orphans in one step.
		err := f.withFD(n.vol.orphans, func(orphans int) error {
			return unix.Renameat2(orphans, n.orphan, d.fd, name, unix.RENAME_NOREPLACE)
		})
		t.step("made")
		if err != nil {
			return err
		}
		n.setOrphanLocked("")
		return nil
	}
	cost := quota.Usage{Bytes: quota.LinkCharge}
	if err := f.reserve(n.vol, cost); err != nil {
		return err
	}
	fd, err := f.openNode(n, unix.O_PATH)
	if err == nil {
		err = unix.Linkat(fd, "", d.fd, name, unix.AT_EMPTY_PATH)
		syscall.Close(fd)
	}
	t.step("made")
	if err != nil {
		n.vol.ledger.Settle(cost, quota.Delta{})
		return err
	}
	n.settleLocked(cost.Bytes, quota.LinkCharge)
	return nil
}

// victim is what a name leads to while it is about to lose that name.
//
// st stays true until then, but for the times: the kernel holds the lock of the
// inode whenever one of its names is made or taken (vfs_link, vfs_unlink and
// vfs_rename in fs/namei.c).
type victim struct {
	n  *node
	st unix.Stat_t
	fd int // O_PATH; -1 when it is not open
}

func (f *FS) victim(d *dirFD, name string) (*victim, error) {
	key, st, err := describeAt(d.fd, name)
	if err != nil {
		return nil, err
	}
	return &victim{n: f.nodes.find(d.node.vol, key, st.Mode), st: st, fd: -1}, nil
}

func (f *FS) openVictim(w *victim) (err error) {
	if w.fd < 0 {
		w.fd, err = f.openNode(w.n, unix.O_PATH)
	}
	return err
}

func (w *victim) close() {
	if w.fd >= 0 {
		syscall.Close(w.fd)
		w.fd = -1
	}
}

// loadVictimLocked makes the victim's charge known.
func (f *FS) loadVictimLocked(w *victim) error {
	n := w.n
	f.unmappedWritingLocked(n)
	if n.writing != nil {
		return f.readWrittenLocked(n.writing)
	}
	if n.charged {
		return nil
	}
	err := f.openVictim(w)
	if err != nil {
		return err
	}
	if n.unsure {
		return f.loadLocked(n, w.fd)
	}
	// Only the charge is wanted: charged stays false.
	_, charge, _, err := f.measure(w.fd)
	if err == nil {
		n.setChargeLocked(charge)
	}
	return err
}

// orphanedLocked tells whether the victim must live on without a name.
func (w *victim) orphanedLocked() bool {
	return !w.n.isDir() && w.n.opens > 0 && w.st.Nlink == 1
}

// removedLocked credits what the loss of the name has freed. The victim's
// charge was loaded before. A file with another link gives back the link; the
// last link gives back all (an open file was made an orphan and does not come here). The credit comes
// after the victim's descriptor is closed, which is what frees the blocks.
func (f *FS) removedLocked(w *victim) {
	n := w.n
	if !n.isDir() && w.st.Nlink > 1 {
		n.settleLocked(0, -quota.LinkCharge)
		return
	}
	n.setGoneLocked(w.lastStat())
	if n.isDir() {
		f.dirs.drop(n)
	}
	w.close()
	f.creditLocked(n)
}

// creditLocked gives back what a removed inode was charged, once nothing of ours
// keeps its blocks, unless a mapping does.
func (f *FS) creditLocked(n *node) {
	if f.lingersLocked(n) {
		return
	}
	if n.writing != nil {
		f.dropWritingLocked(n.writing)
	}
	f.creditAllLocked(n, quota.Usage{Bytes: n.charge(), Inodes: 1})
}

// creditAllLocked gives back what an inode that is no more was charged.
func (f *FS) creditAllLocked(n *node, u quota.Usage) {
	n.rec().Known = false // whoever takes over does not do it again
	n.vol.ledger.Settle(quota.Usage{}, quota.Delta{Bytes: -int64(u.Bytes), Inodes: -int64(u.Inodes)})
}

// lastStat returns the attributes of an inode that has just lost its last name.
func (w *victim) lastStat() *unix.Stat_t {
	st := w.st
	st.Nlink = 0
	st.Ctim = unix.NsecToTimespec(time.Now().UnixNano())
	return &st
}

// Unlink serves unlink(2). The last name of an open file becomes a name in the
// orphans directory.
func (f *FS) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return toStatus(f.remove(in, name, 0))
}

// Rmdir serves rmdir(2).
func (f *FS) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return toStatus(f.remove(in, name, unix.AT_REMOVEDIR))
}

func (f *FS) remove(in *fuse.InHeader, name string, flags int) error {
	if err := checkName(name); err != nil {
		return err
	}
	p, err := f.parent(in.NodeId)
	if err != nil {
		return err
	}
	if err := p.vol.begin(); err != nil {
		return err
	}
	defer p.vol.end()
	d, err := f.dir(p)
	if err != nil {
		return err
	}
	defer f.putDir(d)
	t := f.try(in)
	w, err := f.victim(d, name)
	if err == unix.ENOENT && t.again {
		return nil // the earlier daemon has removed it
	} else if err != nil {
		return err
	}
	defer w.close()
	n := w.n
	if isDir := flags&unix.AT_REMOVEDIR != 0; isDir != n.isDir() {
		if isDir {
			return unix.ENOTDIR
		}
		return unix.EISDIR
	}
	n.lock()
	defer n.unlock()
	defer f.liftLocked(n)()
	if err := f.loadVictimLocked(w); err != nil {
		return err
	}
	t.trying()
	if w.orphanedLocked() {
		orphan := orphanName(w.st.Ino)
		err := f.withFD(n.vol.orphans, func(orphans int) error {
			return unix.Renameat2(d.fd, name, orphans, orphan, unix.RENAME_NOREPLACE)
		})
		t.step("made")
		if err != nil {
			return err
		}
		n.setOrphanLocked(orphan)
		return nil
	}
	if n.isDir() && f.nodes.knows(n) { // somebody may be in it
		n.keepStat(w.lastStat()) // before there is nothing to be read
	}
	if err := unix.Unlinkat(d.fd, name, flags); err != nil {
		return err
	}
	t.step("made")
	f.removedLocked(w)
	return nil
}

// Rename serves renameat2(2) with RENAME_NOREPLACE, RENAME_EXCHANGE and
// RENAME_WHITEOUT. EXDEV between volumes.
func (f *FS) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	return toStatus(f.rename(in, oldName, newName))
}

func (f *FS) rename(in *fuse.RenameIn, oldName, newName string) error {
	if err := errors.Join(checkName(oldName), checkName(newName)); err != nil {
		return err
	}
	from, err := f.parent(in.NodeId)
	if err != nil {
		return err
	}
	to, err := f.parent(in.Newdir)
	if err != nil {
		return err
	}
	v := from.vol
	if v != to.vol {
		return unix.EXDEV
	}
	if err := v.begin(); err != nil {
		return err
	}
	defer v.end()
	src, err := f.dir(from)
	if err != nil {
		return err
	}
	defer f.putDir(src)
	dst, err := f.dir(to)
	if err != nil {
		return err
	}
	defer f.putDir(dst)
	defer f.liftName(src, oldName)()
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		defer f.liftName(dst, newName)()
	}
	t := f.try(&in.InHeader)
	var moved unix.Stat_t
	err = unix.Fstatat(src.fd, oldName, &moved, unix.AT_SYMLINK_NOFOLLOW)
	if t.again && t.moved(dst.fd, newName) {
		if in.Flags&unix.RENAME_WHITEOUT != 0 {
			t.settle(v, t.claimed, quota.Delta{Inodes: 1})
		}
		return nil
	} else if err != nil {
		return err
	}
	t.note(moved.Ino)
	move := func() error {
		t.trying()
		err := unix.Renameat2(src.fd, oldName, dst.fd, newName, uint(in.Flags))
		t.step("made")
		return err
	}
	if in.Flags&unix.RENAME_WHITEOUT != 0 {
		plain := move
		move = func() error { return f.whiteout(t, v, plain) }
	}
	if in.Flags&(unix.RENAME_EXCHANGE|unix.RENAME_NOREPLACE) != 0 {
		return move() // nothing loses its last name
	}
	w, err := f.victim(dst, newName)
	if err == unix.ENOENT {
		return move()
	} else if err != nil {
		return err
	}
	defer w.close()
	if moved.Ino == w.st.Ino && moved.Dev == w.st.Dev {
		return nil // two names of one inode: rename(2) does nothing
	}
	return f.replace(w, move)
}

// replace performs a rename that takes the victim's name away.
func (f *FS) replace(w *victim, move func() error) error {
	n := w.n
	n.lock()
	defer n.unlock()
	defer f.liftLocked(n)()
	if err := errors.Join(f.openVictim(w), f.loadVictimLocked(w)); err != nil {
		return err
	}
	if !w.orphanedLocked() {
		if err := move(); err != nil {
			return err
		}
		if !f.buryLocked(w) {
			f.removedLocked(w)
		}
		return nil
	}
	// The rename stays one step: the open file gets its second name first, and
	// a crash between the two leaves an orphan entry that is swept.
	orphan := orphanName(w.st.Ino)
	err := f.withFD(n.vol.orphans, func(orphans int) error {
		if err := unix.Linkat(w.fd, "", orphans, orphan, unix.AT_EMPTY_PATH); err != nil {
			return err
		}
		if err := move(); err != nil {
			return errors.Join(err, unix.Unlinkat(orphans, orphan, 0))
		}
		return nil
	})
	if err != nil {
		return err
	}
	n.setOrphanLocked(orphan)
	n.replaced = true
	n.set(markReplaced, true)
	return nil
}

// whiteout performs a rename that leaves a whiteout device behind: one inode.
func (f *FS) whiteout(t *attempt, v *volume, move func() error) error {
	cost, err := t.reserve(v, quota.Usage{Inodes: 1})
	if err != nil {
		return err
	}
	if err = move(); err != nil {
		t.failed(v, cost)
		return err
	}
	t.settle(v, cost, quota.Delta{Inodes: 1})
	return nil
}
