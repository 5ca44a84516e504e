package fs

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// The kernel can do the I/O of an open file on the backing file by itself
// (FOPEN_PASSTHROUGH), at the speed of the backing filesystem, and then asks
// the daemon nothing. A write that it does so can be refused by holding it only,
// which is TierGate's and TierHold's business (gate.go). In TierRead, and in volumes
// that are too small for the gate, only files that are opened for reading are passed
// through. All open files of an inode
// must agree (fs/fuse/iomode.c, fuse_file_io_open): while one is open through
// the page cache none can be passed through, and once one is passed through
// every other must name the same backing file. Who writes to such an inode is
// given FOPEN_PASSTHROUGH|FOPEN_DIRECT_IO: read(2) and write(2) come to the
// daemon, only a mapping goes to the backing file.
//
// Three things follow from mappings of the backing file, which outlive the last
// close and of which nobody tells the daemon:
//   - A shared mapping of a file opened for reading and writing stores into
//     the backing file, which nothing refuses. Without a gate, only files without
//     holes are passed through, and one that was opened so gets no hole any more:
//     what would make one allocates blocks instead, and charges them
//     (fillLocked, fillGapLocked).
//   - A removed file keeps its blocks as long as it is mapped. It stays charged
//     until the kernel forgets the node, which it does not while a mapping is
//     there: the backing file holds the path by which it was opened
//     (backing_file_open in fs/file_table.c). See lingersLocked.
//   - What is stored by a mapping of the mount's page cache does not show in a
//     mapping of the backing file. So a file that is still mapped when it is
//     opened again is passed through again. See mappedLocked.

// Tier is how far the daemon is taken out of the data path.
type Tier string

// The tiers, the slowest first.
const (
	// TierDaemon has every read and write come to the daemon.
	TierDaemon Tier = "daemon"
	// TierRead passes through what is opened for reading only.
	TierRead Tier = "read"
	// TierHold passes through writers as well, and holds each system call on what
	// they have open.
	TierHold Tier = "hold"
	// TierGate passes through writers as well, and holds them where a volume has
	// little room. See gate.go.
	TierGate Tier = "gate"
)

// Kernel is the mount's connection; fs/transport's Conn is one.
type Kernel interface {
	NotifyInvalEntry(parent uint64, name string) error
	// NotifyInvalInode has the kernel ask again for the attributes and ACLs of a node,
	// if it knows it, which it tells, and for data unless off is negative; not from a handler.
	NotifyInvalInode(node uint64, off, length int64) (known bool, err error)
	// Answered waits until the requests that are being handled are answered, at most
	// for limit; not from a handler.
	Answered(limit time.Duration) bool
	// OpenBacking registers an open file for passthrough, until CloseBacking.
	OpenBacking(fd int) (id int32, err error)
	CloseBacking(id int32) error
	// Pacer returns what a thread calls for each wake-up of a caller.
	Pacer() func()
	// Refresh has the kernel take new attributes of a node; not from a handler.
	Refresh(nodeID uint64) error
	// Device is the mount's device number.
	Device() (uint64, error)
}

// Attach connects the filesystem with its mount; call it before requests are served.
//
// group is a gate's that an earlier daemon has left (gate.Options.Group), else 0.
func (f *FS) Attach(k Kernel, tier Tier, group int) error {
	f.closeLeaked(k)
	attached := &attachment{k, tier}
	f.kernel.Store(attached)
	f.settleViews(attached)
	f.changedVolumes() // the earlier daemon may have died before it told the kernel
	if tier == TierGate || tier == TierHold {
		f.holdAlways = tier == TierHold
		if err := f.startGate(k, group); err != nil {
			return err
		}
	}
	f.holdLeft()
	return nil
}

// GateFD is the gate's group, -1 in tiers without one.
func (f *FS) GateFD() int {
	if f.gating == nil {
		return -1
	}
	return f.gating.gate.FD()
}

type attachment struct {
	Kernel
	tier Tier
}

// TryPassthrough tells whether the kernel would pass through the pool's files.
func (f *FS) TryPassthrough(k Kernel) error {
	fd, err := openat(int(f.pool.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("a file to try it on: %w", err)
	}
	defer syscall.Close(fd)
	id, err := k.OpenBacking(fd)
	if err != nil {
		return err
	}
	return k.CloseBacking(id)
}

// ioMode is what an inode's open files have in common.
type ioMode uint8

const (
	ioUnknown ioMode = iota // none was open yet: mappings that an earlier daemon has left are possible
	ioNone                  // none is open
	ioCached                // through the page cache of the mount
	ioPassed                // passed through, or FOPEN_PASSTHROUGH|FOPEN_DIRECT_IO
)

// backing is the backing file of an inode whose open files are passed through.
type backing struct {
	id int32 // by which the kernel knows it
	fd int   // of all who read it; -1 when there is none
}

// errChanges is returned by an open that must be one of the volume's changes.
var errChanges = errors.New("the open changes the volume")

func isWriter(flags uint32) bool { return flags&unix.O_ACCMODE != unix.O_RDONLY }

// openFileLocked opens a regular file for the request unique and fills out. errChanges when it has to
// allocate for that and no change was begun.
func (f *FS) openFileLocked(n *node, flags uint32, unique uint64, begun bool, out *fuse.OpenOut) error {
	if !isWriter(flags) && n.io == ioPassed && n.backing.fd >= 0 {
		f.openedLocked(&file{node: n, fd: n.backing.fd, flags: flags, borrowed: true}, unique, out)
		return nil
	}
	writes := isWriter(flags) && f.passesWriterLocked(n)
	if !begun && (writes || n.opensStore(flags)) {
		return errChanges
	}
	defer f.liftLocked(n)()
	fd, err := f.openNode(n, openFlags(flags))
	if err != nil {
		return err
	}
	if err := f.chooseModeLocked(n, fd, flags); err != nil {
		syscall.Close(fd)
		return err
	}
	h := &file{node: n, fd: fd, flags: flags}
	switch {
	case writes && n.io == ioPassed:
		if err := f.startWritingLocked(h); err != nil {
			syscall.Close(fd)
			f.endIOLocked(n)
			return err
		}
	case n.opensStore(flags):
		err := errChanges
		if begun {
			err = f.fillLocked(n, fd, 0, n.size)
		}
		if err != nil {
			syscall.Close(fd)
			f.endIOLocked(n)
			return err
		}
		n.set(shared, true)
	case n.io == ioPassed && !isWriter(flags):
		n.backing.fd, h.borrowed = fd, true
	}
	f.openedLocked(h, unique, out)
	return nil
}

// openedLocked makes a handle of an open file, to which its descriptor belongs
// from then on, and fills out with how the kernel is to treat it.
func (f *FS) openedLocked(h *file, unique uint64, out *fuse.OpenOut) {
	n := h.node
	n.opens++
	out.Fh = f.addHandle(h, unique)
	out.OpenFlags = fuse.FOPEN_NOFLUSH
	if n.io != ioPassed {
		n.setIO(ioCached)
		if !n.has(stale) { // nobody else changes the file
			out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
		}
		return
	}
	out.OpenFlags |= fuse.FOPEN_PASSTHROUGH
	out.BackingID = n.backing.id
	if isWriter(h.flags) {
		n.set(stale, true)
		// Of a gated volume each call would be held, reads as well.
		if !h.writes || n.vol.writers.gated.Load() && !f.holdAlways {
			out.OpenFlags |= fuse.FOPEN_DIRECT_IO
		}
	}
	// By a writer, too: the kernel lets go of its own open file after it has
	// sent RELEASE (fuse_passthrough_release), and the blocks stay as long.
	n.set(mappable, true)
}

// openNewLocked opens a file that was just made, by the descriptor that made it.
func (f *FS) openNewLocked(n *node, fd int, flags uint32, unique uint64, out *fuse.OpenOut) {
	_ = f.chooseModeLocked(n, fd, flags) // nobody has opened it before: it does not fail
	h := &file{node: n, fd: fd, flags: flags}
	if isWriter(flags) && n.io == ioPassed && f.passesWriterLocked(n) {
		if err := f.startWritingLocked(h); err != nil {
			f.log.Sugar().Errorw("gate", "volume", n.vol.id, "error", err)
			f.endIOLocked(n) // through the page cache, then
		}
	}
	f.openedLocked(h, unique, out)
}

// passesWriterLocked tells whether the kernel is to write the inode by itself when
// it is opened for writing.
func (f *FS) passesWriterLocked(n *node) bool {
	return n.writing != nil || n.io != ioCached && f.gates(n.vol)
}

// opensStore tells that such an open is the one that lets mappings store into the
// backing file.
func (n *node) opensStore(flags uint32) bool {
	return n.io == ioPassed && n.writing == nil && flags&unix.O_ACCMODE == unix.O_RDWR && !n.has(shared)
}

// chooseModeLocked sets the mode for one more open file, of which fd is the
// descriptor. The first decides: what is opened for reading or for writing only
// is passed through, for a file that is written through the page cache takes a
// copy more and a question for security.capability before the first write. Who
// opens it for both mostly reads what he has written, which the page cache
// answers without asking.
func (f *FS) chooseModeLocked(n *node, fd int, flags uint32) error {
	if n.io > ioNone {
		return nil
	}
	if f.passesWriterLocked(n) {
		return f.passLocked(n, fd)
	}
	f.findDenseLocked(n, fd)
	passes := f.passesReads() && flags&unix.O_ACCMODE != unix.O_RDWR
	must := false
	if n.io == ioUnknown || !passes || !n.charged || !n.dense { // else it is passed anyway
		must = f.mappedLocked(n, fd) && f.passesReads()
	}
	if !must && !passes {
		n.setIO(ioCached)
		return nil
	}
	var err error
	if !n.charged && !n.unsure {
		err = f.loadLocked(n, fd)
	}
	if err == nil && (must || n.dense) {
		var id int32
		if id, err = f.kernel.Load().OpenBacking(fd); err == nil {
			n.setBacking(backing{id: id, fd: -1})
			n.setIO(ioPassed)
			return nil
		}
	}
	if err != nil && must {
		return err
	}
	if err != nil {
		f.log.Sugar().Warnw("passthrough", "volume", n.vol.id, "error", err)
	}
	n.setIO(ioCached)
	return nil
}

// passLocked has the inode's open files passed through, if the kernel can.
func (f *FS) passLocked(n *node, fd int) error {
	id, err := f.kernel.Load().OpenBacking(fd)
	if err != nil {
		f.log.Sugar().Warnw("passthrough", "volume", n.vol.id, "error", err)
		n.setIO(ioCached)
		return nil
	}
	n.setBacking(backing{id: id, fd: -1})
	n.setIO(ioPassed)
	return nil
}

func (f *FS) passesReads() bool {
	k := f.kernel.Load()
	return k != nil && k.tier != TierDaemon
}

// closedLocked counts a close.
func (f *FS) closedLocked(n *node) {
	if n.opens--; n.opens == 0 {
		f.endIOLocked(n)
	}
}

// endIOLocked lets go of what open files had in common, once none is left.
func (f *FS) endIOLocked(n *node) {
	if n.opens > 0 {
		return
	}
	if n.io == ioPassed {
		if err := f.kernel.Load().CloseBacking(n.backing.id); err != nil && !errors.Is(err, os.ErrClosed) {
			f.log.Sugar().Warnw("passthrough", "volume", n.vol.id, "error", err)
		}
		if n.backing.fd >= 0 {
			syscall.Close(n.backing.fd)
		}
	}
	if n.io == ioCached {
		// Not with the first open's answer: others may be answered before the
		// kernel has dropped its pages for that one.
		n.set(stale, false)
	}
	n.setIO(ioNone)
	n.setBacking(backing{})
}

// mappedLocked tells whether the backing file of a node that nobody has open is
// mapped still, or may be. fd is the only descriptor of it.
//
// Mappings outlive the daemon as well: what may be one that an earlier daemon
// has left is taken for one that stores, but in a file with holes, which none can have.
func (f *FS) mappedLocked(n *node, fd int) bool {
	inherited := n.io == ioUnknown
	n.setIO(ioNone)
	switch {
	case !n.has(mappable) && !inherited:
	case aloneWith(fd):
		n.set(mappable, false)
		n.set(shared, false)
	case inherited && !n.unsure && f.loadLocked(n, fd) == nil && n.dense:
		n.set(mappable, true)
		n.set(shared, true)
	}
	return n.has(mappable)
}

// aloneWith tells whether nothing but this descriptor has the file open: only
// then does the kernel grant a lease for writing (check_conflicting_open in
// fs/locks.c), and a mapping is an open file to it. Whoever opens the file in between waits.
func aloneWith(fd int) bool {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return false
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	return err == nil
}

// fillLocked allocates and charges the holes of a file in [from, to), all or ENOSPC.
func (f *FS) fillLocked(n *node, fd int, from, to uint64) error {
	if err := f.loadLocked(n, fd); err != nil {
		return err
	}
	if from >= to || n.dense && to <= n.size {
		return nil
	}
	_, err := f.growLocked(n, fd, from, to-from, false, func(length uint64) (uint64, error) {
		return length, fallocate(fd, 0, from, length)
	})
	return err
}

// fillGapLocked keeps a file without holes that is about to get data at off. It
// returns where the file ended before, off when that was beyond.
func (f *FS) fillGapLocked(n *node, fd int, off uint64) (end uint64, err error) {
	if !n.has(shared) {
		return off, nil
	}
	if err := f.loadLocked(n, fd); err != nil {
		return 0, err
	}
	end = min(n.size, off)
	return end, f.fillLocked(n, fd, end, off)
}

// lingersLocked tells whether a removed inode that nobody has open is still there,
// because it is mapped. Then it stays charged, outside the tree, until Forget.
func (f *FS) lingersLocked(n *node) bool {
	if !n.has(mappable) || !f.nodes.knows(n) {
		return false
	}
	fd, err := f.openNode(n, unix.O_PATH)
	if err != nil {
		return false
	}
	syscall.Close(fd)
	n.lingers = true
	n.held = quota.Usage{Bytes: n.charge(), Inodes: 1}
	n.vol.float(n.held, 1)
	return true
}

// reapForgotten gives back what a removed inode was charged for its mappings, which are no more.
func (f *FS) reapForgotten(n *node) {
	if n.vol.begin() != nil {
		return // the volume is removed
	}
	defer n.vol.end()
	n.lock()
	defer n.unlock()
	if n.lingers {
		n.lingers = false
		if n.writing != nil {
			f.dropWritingLocked(n.writing) // its descriptor keeps the blocks
		}
		held := n.held
		n.held = quota.Usage{}
		n.vol.float(held, -1)
		f.creditAllLocked(n, held)
	}
}
