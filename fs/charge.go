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
	if st.Mode&unix.S_IFMT == unix.S_IFREG && uint64(st.Blocks)*512 > f.roundUp(uint64(st.Size)) {
		if prealloc, err = quota.ReadPrealloc(fd); err != nil {
			return
		}
	}
	charge, err = f.rule.Charge(&st, func() (int, func(), error) {
		r, err := openat(unix.AT_FDCWD, procPath(fd), unix.O_RDONLY, 0)
		return r, func() { syscall.Close(r) }, err
	}, prealloc)
	return
}

// loadLocked makes the node's charge known.
func (f *FS) loadLocked(n *node, fd int) error {
	if n.charged {
		return nil
	}
	return f.reloadLocked(n, fd)
}

// reloadLocked reads the node's charge from the disk; the caller settles a difference.
func (f *FS) reloadLocked(n *node, fd int) error {
	st, charge, prealloc, err := f.measure(fd)
	if err != nil {
		return err
	}
	n.size, n.prealloc, n.charge, n.charged = uint64(st.Size), prealloc, charge, true
	n.dense = n.isRegular() && prealloc == 0 && charge == f.roundUp(n.size)+linkCharge(uint64(st.Nlink))
	return nil
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
	before := n.charge
	if err := f.reloadLocked(n, fd); err != nil {
		// What the disk holds is unknown: count all that was reserved as
		// used, so that the ledger errs to the safe side until it is known.
		n.charge, n.charged, n.dense = before+reserved, false, false
		n.vol.ledger.Settle(quota.Usage{Bytes: reserved}, quota.Delta{Bytes: int64(reserved)})
		return err
	}
	n.vol.ledger.Settle(quota.Usage{Bytes: reserved}, quota.Delta{Bytes: int64(n.charge) - int64(before)})
	return nil
}

// settleLocked gives back reserved and charges change bytes to the node.
func (n *node) settleLocked(reserved uint64, change int64) {
	n.charge = uint64(int64(n.charge) + change)
	n.vol.ledger.Settle(quota.Usage{Bytes: reserved}, quota.Delta{Bytes: change})
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
	data := n.charge - min(n.charge, linkCharge(uint64(st.Nlink)))
	if blocks := uint64(st.Blocks) * 512; blocks > data {
		return f.roundUp(size) - min(f.roundUp(size), data), nil
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
	if uint64(st.Blocks)*512 <= n.charge-min(n.charge, linkCharge(uint64(st.Nlink))) {
		return nil
	}
	return fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, end, to-end)
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
		return do(length)
	}
	if err := f.dropSpeculationLocked(n, fd, off); err != nil {
		return 0, err
	}
	ranges, err := f.unmappedLocked(n, fd, off, end)
	if err != nil {
		return 0, err
	}
	// A small file with a gap may show a hidden block (see hiddenLocked): it
	// is reserved beside the data.
	var hidden uint64
	if gap := !n.dense || f.roundDown(off) > f.chargedEndLocked(n); gap && f.small(n.size) && f.small(end) {
		if hidden, err = f.hiddenLocked(n, fd, max(end, n.size)); err != nil {
			return 0, err
		}
		if err := n.vol.ledger.Reserve(quota.Usage{Bytes: hidden}); err != nil {
			return 0, err
		}
	}
	need := total(ranges)
	ledger := n.vol.ledger
	reserved := need
	if err := ledger.Reserve(quota.Usage{Bytes: need}); err != nil {
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
	oldSize, oldEnd := n.size, f.chargedEndLocked(n)
	done, err := do(end - off)
	if err != nil || done != end-off || f.small(oldSize) {
		if rerr := f.recountLocked(n, fd, reserved+hidden); err == nil {
			err = rerr
		}
		return done, err
	}
	n.size = max(n.size, end)
	n.dense = n.dense && f.roundDown(off) <= oldEnd
	// What was shortened was shortened to use all that was granted.
	n.settleLocked(reserved, int64(reserved))
	return done, nil
}

// changeLocked performs a change that can cost up to worst bytes more and
// reads back what it did cost.
func (f *FS) changeLocked(n *node, fd int, worst uint64, do func() error) error {
	if err := f.loadLocked(n, fd); err != nil {
		return err
	}
	if err := n.vol.ledger.Reserve(quota.Usage{Bytes: worst}); err != nil {
		return err
	}
	err := do()
	if rerr := f.recountLocked(n, fd, worst); err == nil {
		err = rerr
	}
	return err
}
