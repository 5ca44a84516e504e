package fs

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

func (f *FS) roundUp(n uint64) uint64   { return (n + f.rule.Block - 1) / f.rule.Block * f.rule.Block }
func (f *FS) roundDown(n uint64) uint64 { return n / f.rule.Block * f.rule.Block }

// small tells whether the charge of a file of that size may follow st_blocks
// (see quota.Rule.Charge), so that it is read back after each change.
func (f *FS) small(size uint64) bool { return size <= 4*f.rule.Block }

// measure returns what the rule charges the inode behind fd now. fd may be
// O_PATH.
func (f *FS) measure(fd int) (st unix.Stat_t, charge, prealloc uint64, err error) {
	if err = unix.Fstat(fd, &st); err != nil {
		return
	}
	if f.rule.NeedsMap(&st) {
		// Also where st_blocks is below the size: a sparse file may have more
		// beyond its end than inside it.
		if prealloc, err = quota.ReadPrealloc(fd); err != nil {
			return
		}
	}
	charge, err = f.rule.Charge(&st, func() (int, func(), error) { return reopen(fd) }, prealloc)
	return
}

// reopen opens the regular file behind fd, which may be O_PATH, for reading.
func reopen(fd int) (int, func(), error) {
	r, err := openat(unix.AT_FDCWD, procPath(fd), unix.O_RDONLY, 0)
	return r, func() { syscall.Close(r) }, err
}

// loadLocked makes the node's charge known, and settles what an earlier
// recount could not find out.
func (f *FS) loadLocked(n *node, fd int) error {
	switch {
	case n.unsure:
		return f.recountLocked(n, fd, 0)
	case n.writing != nil:
		return f.readWrittenLocked(n.writing)
	case n.charged:
		return nil
	}
	charge, err := f.reloadLocked(n, fd)
	if err == nil {
		n.setChargeLocked(charge)
	}
	return err
}

// reloadLocked reads from the disk what the node is to be charged, and what else is
// known of it then; the caller sets the charge.
func (f *FS) reloadLocked(n *node, fd int) (uint64, error) {
	charge, doubtful, err := f.reloadNowLocked(n, fd)
	if doubtful {
		awaitAllocation(fd)
		charge, _, err = f.reloadNowLocked(n, fd)
	}
	return charge, err
}

// awaitAllocation is quota's, for the file behind fd, which may be O_PATH.
func awaitAllocation(fd int) {
	if r, done, err := reopen(fd); err == nil {
		quota.AwaitAllocation(r)
		done()
	}
}

// reloadNowLocked is reloadLocked once. doubtful tells that st_blocks was the size, but perhaps for a moment only.
func (f *FS) reloadNowLocked(n *node, fd int) (charge uint64, doubtful bool, err error) {
	st, charge, prealloc, err := f.measure(fd)
	if err != nil {
		return 0, false, err
	}
	data := charge - min(charge, linkCharge(uint64(st.Nlink)))
	dense := n.isRegular() && prealloc == 0 && data == f.roundUp(uint64(st.Size))
	if dense && data > 0 && !f.rule.NeedsMap(&st) {
		// Perhaps by blocks that st_blocks counts and the file does not hold,
		// or holds beyond its end.
		if dense, err = f.allMapped(fd, uint64(st.Size)); err != nil {
			return 0, false, err
		}
		if prealloc, err = quota.ReadPrealloc(fd); err != nil {
			return 0, false, err
		}
		doubtful = !f.isBtrfs && prealloc > 0 || f.isXFS && !dense
		dense = dense && prealloc == 0
	}
	n.size, n.charged, n.dense = uint64(st.Size), true, dense
	n.setPreallocLocked(prealloc)
	n.setUnsureLocked(false)
	return charge, doubtful, nil
}

// findDenseLocked looks whether a file has no holes any more: many programs set
// the size first and write then. A small file's charge may be of blocks that the
// file does not hold, so it is left alone.
//
// What it cannot find out stays a file with holes, which is slower and as safe.
func (f *FS) findDenseLocked(n *node, fd int) {
	if n.dense || !n.charged || n.prealloc > 0 || f.small(n.size) || n.charge() < f.roundUp(n.size) {
		return
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || n.charge() != f.roundUp(n.size)+linkCharge(uint64(st.Nlink)) {
		return
	}
	dense, err := f.allMapped(fd, n.size)
	n.dense = dense && err == nil
}

func (f *FS) allMapped(fd int, size uint64) (bool, error) {
	r, done, err := reopen(fd)
	if err != nil {
		return false, err
	}
	defer done()
	gaps, err := f.rule.Unmapped(r, 0, size)
	return len(gaps) == 0, err
}

func linkCharge(nlink uint64) uint64 {
	if nlink <= 1 {
		return 0
	}
	return (nlink - 1) * quota.LinkCharge
}

// recountLocked reads the node's charge after a change for which reserved was
// taken, and settles it.
func (f *FS) recountLocked(n *node, fd int, reserved uint64) error {
	charge, err := f.reloadLocked(n, fd)
	if err != nil {
		// What the disk holds is unknown: count all that was reserved as
		// used, so that the ledger errs to the safe side until it is known.
		n.charged, n.dense = false, false
		n.setUnsureLocked(true)
		n.settleLocked(reserved, int64(reserved))
		return err
	}
	n.settleLocked(reserved, int64(charge)-int64(n.charge()))
	return nil
}

// settleLocked gives back reserved and charges change bytes to the node. Whoever takes
// over in between finds too much in the ledger rather than too little.
func (n *node) settleLocked(reserved uint64, change int64) {
	charge := uint64(int64(n.charge()) + change)
	if change < 0 {
		n.setChargeLocked(charge)
	}
	n.vol.ledger.Settle(quota.Usage{Bytes: reserved}, quota.Delta{Bytes: change})
	if change >= 0 {
		n.setChargeLocked(charge)
	}
}

// chargedEndLocked is where the node's charged blocks can end at the most:
// mapped blocks beyond it are the backing filesystem's speculation.
func (f *FS) chargedEndLocked(n *node) uint64 { return max(f.roundUp(n.size), f.roundUp(n.prealloc)) }

// unmappedLocked lists the block-aligned parts of [from, to) that are not
// charged yet. The node's charge is loaded.
func (f *FS) unmappedLocked(n *node, fd int, from, to uint64) ([]quota.Range, error) {
	lo, hi := f.roundDown(from), f.roundUp(to)
	if lo >= hi {
		return nil, nil
	}
	end := f.chargedEndLocked(n)
	var ranges []quota.Range
	if lo < end && !n.dense {
		var err error
		if ranges, err = f.rule.Unmapped(fd, lo, min(hi, end)); err != nil {
			return nil, err
		}
	}
	if hi > end {
		ranges = append(ranges, quota.Range{From: max(lo, end), To: hi})
	}
	return ranges, nil
}

func total(ranges []quota.Range) (bytes uint64) {
	for _, r := range ranges {
		bytes += r.To - r.From
	}
	return bytes
}

// prefix returns how far [.., to) can be written when only granted bytes of the
// unmapped ranges are to be had.
func prefix(ranges []quota.Range, granted, to uint64) uint64 {
	for _, r := range ranges {
		if n := r.To - r.From; n > granted {
			return min(to, r.From+granted)
		} else {
			granted -= n
		}
	}
	return to
}

// hiddenLocked returns what the charge of a small file of that size could rise
// by because of blocks that st_blocks counts and the file does not hold: a block
// of attributes, or speculation. Reserving it keeps the ledger under its limit.
func (f *FS) hiddenLocked(n *node, fd int, size uint64) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	data := n.charge() - min(n.charge(), linkCharge(uint64(st.Nlink)))
	size = f.roundUp(size)
	hides := func() bool { return uint64(st.Blocks)*512 > data }
	if data < size && !hides() && f.rule.MayHide(fd) {
		awaitAllocation(fd)
		if err := unix.Fstat(fd, &st); err != nil {
			return 0, err
		}
	}
	if hides() {
		return size - min(size, data), nil
	}
	return 0, nil
}

// dropSpeculationLocked removes the blocks that xfs holds ready beyond the end
// of the file before the end jumps over them: they would become part of the
// file without having been charged.
func (f *FS) dropSpeculationLocked(n *node, fd int, to uint64) error {
	end := f.chargedEndLocked(n)
	to = f.roundDown(to)
	if !f.isXFS || to <= end {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	// In blocks smaller than the rule's, st_blocks can be below the charge
	// though some of them are beyond the end.
	if !f.smallBlocks && uint64(st.Blocks)*512 <= n.charge()-min(n.charge(), linkCharge(uint64(st.Nlink))) {
		return nil
	}
	return fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, end, to-end)
}

// holeAtLocked tells whether [roundDown(at), at) is part of a block that is not
// mapped. btrfs maps such a block, to put zeros into it, where a file begins to
// end there or no longer ends there, or a hole is punched from there.
func (f *FS) holeAtLocked(n *node, fd int, at uint64) (bool, error) {
	if !f.isBtrfs || n.dense || at%f.rule.Block == 0 || at > n.size {
		return false, nil
	}
	ranges, err := f.rule.Unmapped(fd, at, at+1)
	return len(ranges) > 0, err
}

// tailLocked returns what growth from its present end can cost a file there.
func (f *FS) tailLocked(n *node, fd int) (uint64, error) {
	hole, err := f.holeAtLocked(n, fd, n.size)
	if !hole {
		return 0, err
	}
	return f.rule.Block, nil
}

func fallocate(fd int, mode uint32, off, length uint64) error {
	for {
		if err := unix.Fallocate(fd, mode, int64(off), int64(length)); err != unix.EINTR {
			return err
		}
	}
}

// growLocked performs a change that puts data into [off, off+length) of a
// regular file: it reserves the blocks that are not charged yet, calls do with
// the length that fits, and settles what do says it has written. With partial
// it shortens the range to what fits, as a disk does; else it is all or
// ENOSPC. do's count may be less than it was given.
func (f *FS) growLocked(n *node, fd int, off, length uint64, partial bool, do func(length uint64) (uint64, error)) (uint64, error) {
	if err := f.loadLocked(n, fd); err != nil {
		return 0, err
	}
	end := off + length
	if n.dense && end <= n.size {
		done, err := do(length)
		if err != nil { // a failed ZERO_RANGE may have left a hole
			if rerr := f.recountLocked(n, fd, 0); err == nil {
				err = rerr
			}
		}
		return done, err
	}
	if err := f.dropSpeculationLocked(n, fd, off); err != nil {
		return 0, err
	}
	ranges, err := f.unmappedLocked(n, fd, off, end)
	if err != nil {
		return 0, err
	}
	need := total(ranges)
	var tail uint64
	if end > n.size && f.roundDown(off) > n.size {
		if tail, err = f.tailLocked(n, fd); err != nil {
			return 0, err
		}
	}
	// A small file with a gap may show a hidden block (see hiddenLocked), unless
	// neither its blocks nor its size change: it is reserved beside the data.
	var hidden uint64
	changes := need > 0 || f.roundUp(end) > f.roundUp(n.size)
	if gap := !n.dense || f.roundDown(off) > f.chargedEndLocked(n); gap && changes && f.small(n.size) {
		// The file may stay small although the range is long: only the beginning
		// of it may fit, and a preallocation leaves the size as it is.
		if hidden, err = f.hiddenLocked(n, fd, min(max(end, n.size), 4*f.rule.Block)); err != nil {
			return 0, err
		}
	}
	if hidden += tail; hidden > 0 {
		if err := f.reserve(n.vol, quota.Usage{Bytes: hidden}); err != nil {
			return 0, err
		}
	}
	ledger := n.vol.ledger
	reserved := need
	if err := f.reserve(n.vol, quota.Usage{Bytes: need}); err != nil {
		if !partial {
			ledger.Settle(quota.Usage{Bytes: hidden}, quota.Delta{})
			return 0, err
		}
		reserved = ledger.ReserveUpTo(need, f.rule.Block)
		if end = prefix(ranges, reserved, end); end <= off {
			ledger.Settle(quota.Usage{Bytes: reserved + hidden}, quota.Delta{})
			return 0, err
		}
	}
	oldEnd := f.chargedEndLocked(n)
	staysDense := n.dense && f.roundDown(off) <= oldEnd
	// ext4 that runs out of blocks half way frees what is preallocated beyond the
	// end, and then goes on with that (ext4_truncate_failed_write).
	mayLose := n.prealloc > n.size && end > n.size
	done, err := do(end - off)
	// Of a small file that is not dense, st_blocks may be the charge.
	if err != nil || done != end-off || f.small(n.size) && !staysDense || tail > 0 || mayLose {
		if rerr := f.recountLocked(n, fd, reserved+hidden); err == nil {
			err = rerr
		}
		return done, err
	}
	n.size = max(n.size, end)
	n.dense = staysDense
	// What was shortened was shortened to use all that was granted.
	n.settleLocked(reserved, int64(reserved))
	if need > 0 {
		f.findDenseLocked(n, fd)
	}
	return done, nil
}

// changeLocked performs a change that can cost up to worst bytes more and
// reads back what it did cost.
func (f *FS) changeLocked(n *node, fd int, worst uint64, do func() error) error {
	if err := f.loadLocked(n, fd); err != nil {
		return err
	}
	if err := f.reserve(n.vol, quota.Usage{Bytes: worst}); err != nil {
		return err
	}
	err := do()
	if rerr := f.recountLocked(n, fd, worst); err == nil {
		err = rerr
	}
	return err
}

// changeHiddenLocked performs a change of a block that st_blocks counts and the
// file does not hold, such as one of attributes. It moves the charge of small
// files and symbolic links only, which is read back.
func (f *FS) changeHiddenLocked(n *node, fd int, do func() error) error {
	if n.lostLocked() {
		return unix.ESTALE
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if n.isDir() || n.isRegular() && !f.small(uint64(st.Size)) {
		return do()
	}
	if err := f.loadLocked(n, fd); err != nil {
		return err
	}
	size, data := f.roundUp(n.size), n.charge()-min(n.charge(), linkCharge(uint64(st.Nlink)))
	return f.changeLocked(n, fd, size-min(size, data), do)
}
