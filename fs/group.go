package fs

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A volume can be seen as a group's: CSI's VOLUME_MOUNT_GROUP, which is what fsGroup
// is in Kubernetes, at once and however many files there are. Nothing is written for
// that, and what the disk says shows again when it ends.
//
// A file that is of the group on the disk is shown as it is. So what is made or
// given a mode within the view has exactly that mode. Any other is foreign: it is
// shown as of the group, which may read it and write it, and walk through it or run
// it where that is a directory or its owner may run it. That is what kubelet would
// have made of it (pkg/volume/volume_linux.go), but for two things: directories do
// not become set-gid, and a set-gid program is shown as none, for it was made so by
// who was in its own group and never in this one; chgrp(2) has it so as well.
//
// Who changes the mode, the owner or the access ACL of a foreign file makes it the
// group's on the disk, with the mode that was shown if no other is asked for. Who
// gives it to another group, or gives a file of the group's to one, has that stored;
// the file is foreign then, and shown as of the group all the same.
//
// Permission is the kernel's business here too: it goes by what is shown. Where a
// file has an access ACL the kernel goes by that (posix_acl_permission in
// fs/posix_acl.c), of which the view changes nothing: named users and groups may
// what they might. kubelet's chmod would widen the mask, and no more.

// view is whose group a volume's files are seen as: the group, and viewOn; zero is
// the disk's own. It is kept in the volume's record (state.Volume), so that the next
// daemon finds out that it is given another one.
type view uint64

const (
	viewOn view = 1 << (32 + iota)
	// viewStale: the kernel may hold attributes of the view before it.
	viewStale
)

const (
	// answerTime is how long SetGroup waits for the answers that are under way.
	answerTime = time.Second
	// viewTime is when what was under way is expected to have come to an end in the
	// kernel: who is given an answer may not have taken it for a while.
	viewTime = time.Second
)

// viewOf refuses the group that chown(2) takes for none.
func viewOf(group *uint32) (view, error) {
	switch {
	case group == nil:
		return 0, nil
	case *group == math.MaxUint32:
		return 0, fmt.Errorf("group %d: %w", *group, unix.EINVAL)
	}
	return viewOn | view(*group), nil
}

func (v *volume) view() view { return view(v.record.View.Load()) }

// group is the view's, where there is one.
func (w view) group() (gid uint32, ok bool) { return uint32(w), w&viewOn != 0 }

// foreign tells whether a file that is gid's on the disk is shown as another's.
func (w view) foreign(gid uint32) bool {
	group, ok := w.group()
	return ok && group != gid
}

// show makes attributes of the disk those of the view.
func (w view) show(st *unix.Stat_t) {
	if w.foreign(st.Gid) {
		st.Gid, st.Mode = uint32(w), shownMode(st.Mode)
	}
}

func (w view) showStatx(stx *unix.Statx_t) {
	if w.foreign(stx.Gid) {
		stx.Gid, stx.Mode = uint32(w), uint16(shownMode(uint32(stx.Mode)))
	}
}

// shownMode is the mode of a foreign file.
func shownMode(mode uint32) uint32 {
	dir := mode&unix.S_IFMT == unix.S_IFDIR
	if mode&unix.S_IFMT == unix.S_IFLNK {
		return mode
	}
	if mode |= 0o660; dir || mode&unix.S_IXUSR != 0 {
		mode |= 0o110
	}
	if !dir && mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	return mode
}

// maker is whom an inode is made as that the caller makes with that mode. What is
// made in a view is the group's, which need not be one of the caller's. So a set-gid
// bit is lost, unless the group is the one that the caller makes files in anyhow; the
// kernel, which has not heard of the group yet, lets a caller make it (mode_strip_sgid
// in fs/inode.c looks at set-gid directories only). Whether the caller is in the group
// otherwise we are not told: the kernel would say it (FUSE_CREATE_SUPP_GROUP in
// include/uapi/linux/fuse.h), go-fuse does not read it. Who is may chmod(2).
func (w view) maker(c *fuse.Caller, mode uint32) (fuse.Caller, uint32) {
	as := *c
	if w.foreign(c.Gid) {
		as.Gid, _ = w.group()
		mode &^= unix.S_ISGID
	}
	return as, mode
}

// claimMade makes an inode the group's that was just made, and st what it is then: in
// a foreign set-gid directory it has become that one's.
func (w view) claimMade(fd int, st *unix.Stat_t) error {
	if !w.foreign(st.Gid) {
		return nil
	}
	if err := w.chgrp(fd); err != nil {
		return err
	}
	// The view may be younger than the inode, so set-gid is not made good.
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Mode&unix.S_ISUID != 0 {
		if err := unix.Chmod(procPath(fd), st.Mode&^unix.S_ISGID&0o7777); err != nil {
			return err
		}
	}
	return unix.Fstat(fd, st)
}

// claim makes a foreign file the group's on the disk, with the mode that is shown.
// The mode comes first: whoever does it again, having died in between, finds a file
// that is foreign still.
func (w view) claim(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || !w.foreign(st.Gid) {
		return err
	}
	if err := showOnDisk(fd, &st); err != nil {
		return err
	}
	return w.chgrp(fd)
}

func (w view) chgrp(fd int) error {
	group, _ := w.group()
	return unix.Fchownat(fd, "", -1, int(int32(group)), unix.AT_EMPTY_PATH)
}

// showOnDisk stores the mode that a foreign file is shown with.
func showOnDisk(fd int, st *unix.Stat_t) error {
	mode := shownMode(st.Mode)
	if mode == st.Mode {
		return nil
	}
	return unix.Chmod(procPath(fd), mode&0o7777)
}

// claiming returns what a SETATTR is to do to the inode behind fd: with a foreign
// file's mode or owner its group changes too, and with its owner alone the mode that
// is shown is stored here.
func (w view) claiming(fd int, in *fuse.SetAttrIn) (*fuse.SetAttrIn, error) {
	group, ok := w.group()
	if !ok || in.Valid&(fuse.FATTR_MODE|fuse.FATTR_UID|fuse.FATTR_GID) == 0 {
		return in, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || !w.foreign(st.Gid) {
		return in, err
	}
	if in.Valid&fuse.FATTR_MODE == 0 {
		if err := showOnDisk(fd, &st); err != nil {
			return nil, err
		}
	}
	does := *in // the request stays what it was: it may have to be done again
	if in.Valid&fuse.FATTR_GID == 0 {
		does.Valid |= fuse.FATTR_GID
		does.Gid = group
	}
	return &does, nil
}

// SetGroup has a volume's files seen as the group's from now on, or as what they are
// on the disk when group is nil. It may be called while the volume is in use, and
// again; when it returns, whoever asks is told of the new view, also of what the
// kernel had cached. It must not be called from a handler, nor with anything held that
// one waits for. The view lasts as long as the volume is served: see
// VolumeConfig.Group. ErrNoVolume when it is not.
func (f *FS) SetGroup(id string, group *uint32) error {
	v, err := f.volume(id)
	if err != nil {
		return err
	}
	w, err := viewOf(group)
	if err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	for {
		old := v.view()
		if old == w {
			return nil
		}
		if v.record.View.CompareAndSwap(uint64(old), uint64(w|viewStale)) {
			break
		}
	}
	if k := f.kernel.Load(); k != nil {
		since := time.Now().Add(-viewTime)
		k.Answered(answerTime)
		f.settleView(k, v, f.staleAttrs(k, v, nil), since)
	}
	return nil
}

// startView has a volume that is about to be served seen as the group's. The kernel
// may have heard of another view by an earlier daemon.
func (v *volume) startView(w view, kept bool) {
	if kept && v.view() != w {
		w |= viewStale
	}
	v.record.View.Store(uint64(w))
}

// settleViews has the kernel forget what it holds of the views that an earlier daemon had.
func (f *FS) settleViews(k *attachment) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, v := range f.volumes {
		if v.view()&viewStale != 0 {
			go func() { // there may be nobody to serve the kernel yet
				f.staleAttrs(k, v, nil)
				f.settleView(k, v, nil, time.Time{})
			}()
		}
	}
}

// settleView makes the kernel forget a volume's attributes once more, a while from now, but for the nodes that were told.
// An answer from before the view that is still on its way is dropped where it is older than what the node was told; else
// it makes a node, or is one of the unchecked. Not all nodes again: the answer to whoever asks at that moment would be dropped
// as well, and he goes by the attributes of the view before (fuse_permission).
func (f *FS) settleView(k *attachment, v *volume, told map[uint64]bool, since time.Time) {
	w := v.view()
	time.AfterFunc(viewTime, func() {
		k.Answered(time.Minute)
		set, all := v.unchecked.since(since)
		if all {
			told = nil
		}
		for _, id := range set {
			delete(told, id)
		}
		f.staleAttrs(k, v, told)
		f.mu.RLock()
		defer f.mu.RUnlock()
		if f.volumes[v.id] == v { // else the record is not its any more
			v.record.View.CompareAndSwap(uint64(w), uint64(w&^viewStale))
		}
	})
}

// staleAttrs has the kernel ask again for the attributes and ACLs of all that it knows of a volume, but for some nodes. It
// returns those that the kernel knows.
func (f *FS) staleAttrs(k *attachment, v *volume, but map[uint64]bool) (told map[uint64]bool) {
	told = make(map[uint64]bool)
	for _, n := range f.nodes.of(v) {
		if but[n.id] {
			continue
		}
		known, err := k.NotifyInvalInode(n.id, -1, 0)
		if errors.Is(err, os.ErrClosed) {
			return told // there is nobody to forget anything
		} else if err != nil {
			f.log.Sugar().Warnw("invalidate attributes", "volume", v.id, "error", err)
			return told
		}
		if known {
			told[n.id] = true
		}
	}
	return told
}

// unchecked are the nodes of a volume whose attributes went out last in the answer to SETATTR or LINK, which the kernel takes
// without asking how old it is (fuse_do_setattr and create_new_entry in fs/fuse/dir.c).
type unchecked struct {
	mu   sync.Mutex
	last []answer // no more than maxUnchecked; there may be thousands of volumes in which nobody does that
	next int      // is overwritten next
}

type answer struct {
	node uint64
	when time.Time
}

const maxUnchecked = 64

func (u *unchecked) add(node uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	a := answer{node, time.Now()}
	if len(u.last) < maxUnchecked {
		u.last = append(u.last, a)
		return
	}
	u.last[u.next] = a
	u.next = (u.next + 1) % maxUnchecked
}

// since returns the nodes since then; all tells that there were more than are remembered.
func (u *unchecked) since(then time.Time) (nodes []uint64, all bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, each := range u.last {
		if each.when.After(then) {
			nodes = append(nodes, each.node)
		}
	}
	return nodes, len(nodes) == maxUnchecked
}
