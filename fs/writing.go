package fs

import (
	"errors"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/quota/gate"
)

// writing is a backing inode that the kernel may write without asking: it is, or
// was, opened for writing and passed through in TierGate. It is node.writing.
//
// It is native or held (quota/gate). Held, each system call that could make it
// grow reserves that first, and node.charge is exact. Native, the sampler adds to
// node.charge what the inode may have grown by, and what it does hold is read
// when somebody needs to know.
type writing struct {
	n   *node
	ino uint64
	// fd was opened before the inode was marked: what is done by it raises no events.
	fd int

	// left tells that an earlier daemon has left it open: it is held always. See left.go.
	left bool

	// marked tells that the inode was marked by an earlier daemon, and may be held.
	marked bool

	// held is changed together with the inode's mark, under writers.mu.
	held atomic.Bool
	// holds counts how often it was held; ended is that count when all was over that had been begun before.
	holds, ended atomic.Uint64

	// What follows is guarded by node.mu.

	// opens counts the handles that write.
	opens uint32
	// stores tells that one of them could be mapped, for stores.
	stores bool
	// appends tells that calls which cannot be told from others may append: a handle is
	// O_APPEND, or the inode has grown without asking.
	appends bool
	// exact tells that since events are raised node.charge was read, settled that it was after all
	// that had been begun before.
	exact, settled bool
	// size and blocks (of 512 bytes) are what stat said when node.charge was read last.
	size, blocks int64
	// excess is by how much the estimate was above node.charge then.
	excess uint64
	// permits are what held calls were allowed and may not have used yet.
	permits []*permit
	// braked tells that the inode may not grow, whoever asks; see setBrakeLocked.
	// lifts counts the operations that need it not to be immutable.
	braked bool
	lifts  int
}

// startWritingLocked is called before an open for writing is answered: h's
// descriptor was opened before the inode was marked if it is the first.
func (f *FS) startWritingLocked(h *file) error {
	n := h.node
	w := n.writing
	if w == nil {
		if err := f.loadLocked(n, h.fd); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstat(h.fd, &st); err != nil {
			return err
		}
		w = &writing{n: n, ino: st.Ino, fd: h.fd}
		w.noteLocked(f, &st)
		if err := f.addWriting(w); err != nil {
			return err
		}
		h.borrowed = true
		n.ownRareLocked().writing = w
		n.set(markWritten, true)
	}
	h.setWrites(true)
	w.opens++
	w.appends = w.appends || h.flags&unix.O_APPEND != 0
	if h.flags&unix.O_ACCMODE == unix.O_RDWR && !w.stores {
		w.stores = true
		n.set(stores, true)
	}
	return nil
}

// stopWritingLocked counts the close of a handle that writes. After the last the
// inode is the daemon's alone again, unless it may be mapped: then the sampler
// finds out when it is not.
func (f *FS) stopWritingLocked(h *file) {
	w := h.node.writing
	h.setWrites(false)
	if w.opens--; w.opens > 0 {
		return
	}
	if !w.stores {
		f.endWritingLocked(w)
	}
}

// unmappedWritingLocked ends the writing of an inode that nobody has open and nobody maps.
func (f *FS) unmappedWritingLocked(n *node) (ended bool) {
	w := n.writing
	if w == nil || n.opens > 0 || !aloneWith(w.fd) {
		return false
	}
	n.set(mappable, false)
	f.endWritingLocked(w)
	return true
}

func (f *FS) endWritingLocked(w *writing) {
	n := w.n
	if err := f.readWrittenLocked(w); err != nil {
		f.log.Sugar().Errorw("charge of a written file", "volume", n.vol.id, "error", err)
	}
	f.dropWritingLocked(w)
}

// dropWritingLocked ends a writing as it is: its charge stays what the ledger holds.
func (f *FS) dropWritingLocked(w *writing) {
	n := w.n
	f.dropPermitsLocked(w, w.permits)
	if w.braked {
		f.setBrakeLocked(w, false)
	}
	f.removeWriting(w)
	n.writing = nil
	n.set(stores|markWritten|markLeft, false)
	syscall.Close(w.fd)
	if w.left {
		f.leftEndedLocked(n)
	}
}

// noteLocked remembers what stat says of an inode whose charge was just read.
func (w *writing) noteLocked(f *FS, st *unix.Stat_t) {
	w.size, w.blocks = st.Size, st.Blocks
	w.excess = 0
	w.excess = f.estimateLocked(w, st) - w.n.charge()
}

// readWrittenLocked makes the charge of an inode that the kernel writes what the
// disk holds, and settles the difference. It waits for what is being written.
func (f *FS) readWrittenLocked(w *writing) error {
	n := w.n
	var st unix.Stat_t
	if err := unix.Fstat(w.fd, &st); err != nil {
		return err
	}
	if n.charged && n.dense && st.Size == w.size && w.size == int64(n.size) && len(w.permits) == 0 && n.charge() == f.roundUp(n.size)+linkCharge(uint64(st.Nlink)) {
		w.exact = true
		return nil
	}
	used, charge, err := f.readPermitsLocked(w, &st)
	if err != nil {
		n.charged, n.dense = false, false
		n.setUnsureLocked(true)
		n.vol.ledger.Settle(quota.Usage{Bytes: used}, quota.Delta{})
		return err
	}
	grown := int64(charge) - int64(n.charge())
	n.settleLocked(used, min(grown, int64(used)))
	n.findLocked(uint64(max(0, grown-int64(used))))
	w.growHeldLocked(grown)
	w.noteLocked(f, &st)
	w.exact = true
	return nil
}

// findLocked charges bytes that were written without asking, or may have been.
func (n *node) findLocked(bytes uint64) {
	n.vol.ledger.Find(bytes)
	n.setChargeLocked(n.charge() + bytes)
}

// readChargeLocked reads what is to be charged. Of a file that was dense only what came after.
func (f *FS) readChargeLocked(w *writing, st *unix.Stat_t) (charge uint64, err error) {
	n := w.n
	if n.charged && n.dense && n.prealloc == 0 && uint64(st.Size) >= n.size {
		gaps, err := f.rule.Unmapped(w.fd, f.roundDown(n.size), uint64(st.Size))
		if err != nil {
			return 0, err
		}
		if len(gaps) == 0 {
			n.size = uint64(st.Size)
			return f.roundUp(n.size) + linkCharge(uint64(st.Nlink)), nil
		}
	}
	if charge, err = f.reloadLocked(n, w.fd); err != nil {
		return 0, err
	}
	// What was written since then is not missed by the next look.
	st.Size = int64(n.size)
	return charge, nil
}

// resetWritingLocked is ResetCharges for an inode that the kernel writes: its charge
// must always be what the ledger holds.
func (f *FS) resetWritingLocked(w *writing) {
	var st unix.Stat_t
	charge, err := f.reloadLocked(w.n, w.fd)
	if err = errors.Join(err, unix.Fstat(w.fd, &st)); err != nil {
		w.n.setUnsureLocked(true)
		f.log.Sugar().Errorw("charge of a written file", "volume", w.n.vol.id, "error", err)
		return
	}
	w.n.setChargeLocked(charge)
	w.noteLocked(f, &st)
	w.exact = true
}

// growHeldLocked keeps what a removed inode's charge is noted under (node.held) in step.
func (w *writing) growHeldLocked(by int64) {
	n := w.n
	if !n.lingers || by == 0 {
		return
	}
	n.held.Bytes += uint64(by)
	n.vol.float(quota.Usage{Bytes: uint64(by)}, 1)
}

// estimateLocked returns what the inode may be charged at the most, in bytes,
// by what stat says. It never falls below the charge.
func (f *FS) estimateLocked(w *writing, st *unix.Stat_t) uint64 {
	n := w.n
	links := linkCharge(uint64(st.Nlink))
	data := n.charge() - min(n.charge(), links)
	size, blocks := f.roundUp(uint64(st.Size)), uint64(st.Blocks)*512
	switch {
	case f.isBtrfs && n.dense:
		// A file that is compressed has fewer blocks than are charged.
		blocks = size
	case f.isBtrfs:
		// Likewise, so only what comes in addition counts.
		blocks = data + uint64(max(0, st.Blocks-w.blocks))*512
	}
	if !n.dense {
		size = max(size, f.roundUp(n.prealloc))
		// Of ext4 that is its trees of extents, which grow with the file only. xfs
		// gives back what it has ahead.
		if f.isExt4 || w.exact {
			blocks -= min(blocks, w.excess)
		}
	}
	return links + max(data, min(blocks, size))
}

// sampleLocked charges what the inode may have grown by, and returns that in bytes.
func (f *FS) sampleLocked(w *writing) (grown uint64) {
	n := w.n
	var st unix.Stat_t
	// It does not sleep, so the scheduler need not know: there may be thousands.
	_, _, errno := unix.RawSyscall(unix.SYS_FSTAT, uintptr(w.fd), uintptr(unsafe.Pointer(&st)), 0)
	if errno != 0 {
		return 0
	}
	known := n.charge() + w.reserved()
	estimate := f.estimateLocked(w, &st)
	if estimate <= known {
		if f.isBtrfs && !w.exact {
			w.blocks = st.Blocks
		}
		return 0
	}
	grown = estimate - known
	if f.isBtrfs && w.exact && grown < btrfsNoise {
		return 0 // it counts blocks that are being replaced twice
	}
	w.blocks = st.Blocks
	n.findLocked(grown)
	w.appends = w.appends || w.held.Load() && w.exact
	w.growHeldLocked(int64(grown))
	w.exact = false
	return grown
}

// putsOffLocked tells whether what calls without an end have used is found out when
// room is wanted only: to look is to wait for them, on btrfs.
func (f *FS) putsOffLocked(w *writing, call gate.Call) bool {
	loose := w.looseLocked()
	return f.isBtrfs && call.Access == gate.Unknown && loose != nil && len(loose.ranges) <= maxLoose
}

// maxLoose is how many ranges calls without an end may have before it is looked what
// they have used.
const maxLoose = 256

// btrfsNoise is what btrfs's count of blocks moves by without a file's growing.
const btrfsNoise = 1 << 20

// judgeLocked answers a held call.
func (f *FS) judgeLocked(w *writing, ev *gate.Event) gate.Verdict {
	n, v := w.n, w.n.vol
	if verdict := f.judgeLeftLocked(w, ev); verdict != gate.Later {
		return verdict
	}
	switch {
	case n.writing != w || !w.held.Load() || ev.Len == 0:
		return gate.Allow
	case v.removed.Load():
		return gate.Deny(unix.EIO)
	case !f.holdAlways && !w.left && !v.writers.gated.Load() && ev.Len <= calmCall:
		f.freeLocked(w)
		return gate.Allow
	}
	verdict, err := f.permitLocked(w, ev)
	switch {
	case err == nil:
	case errors.Is(err, quota.ErrNoSpace):
		return gate.Deny(unix.ENOSPC)
	default:
		f.log.Sugar().Errorw("held system call", "volume", v.id, "error", err)
		return gate.Deny(unix.EIO)
	}
	if verdict == gate.Allow && w.braked && w.lifts == 0 {
		f.setBrakeLocked(w, false)
	}
	return verdict
}

// settlesLocked tells whether a held call is the first by which all is over that had been begun before.
func (w *writing) settlesLocked(f *FS, ev *gate.Event) bool {
	return !w.settled && f.gating.callers.CallOf(ev).HasLock()
}

// catchUpLocked makes the size known from which a held inode goes on.
func (f *FS) catchUpLocked(w *writing, ev *gate.Event) error {
	n := w.n
	if w.settlesLocked(f, ev) {
		w.exact, w.settled = false, true
	}
	var st unix.Stat_t
	if err := unix.Fstat(w.fd, &st); err != nil {
		return err
	}
	size := uint64(st.Size)
	if len(w.permits) == 0 && (size < n.size || f.roundUp(size) > f.chargedEndLocked(n)) {
		w.exact = false // something has gone on without asking
	}
	if !w.exact {
		holds := w.holds.Load()
		err := f.readWrittenLocked(w)
		if err == nil && w.settled {
			w.ended.Store(holds)
		}
		return err
	}
	if len(w.permits) == 0 { // else they say what the file has grown into
		n.size = max(n.size, size) // within its last block
	}
	return nil
}
