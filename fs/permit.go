package fs

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/quota/gate"
)

// permit is what one held system call may still make an inode grow by. As long as
// it exists the blocks are reserved, so that it does not matter when the call
// makes use of it, or whether it does.
type permit struct {
	// tid is the thread whose call it is; 0 when nobody can tell when it is over.
	tid  int
	call gate.Call
	// ranges are the blocks, whole ones; extra is what else the call could cost, in bytes.
	ranges []quota.Range
	extra  uint64
	// gap tells that it may begin beyond the end of the file.
	gap bool
}

func (p *permit) reserved() uint64 { return total(p.ranges) + p.extra }

func (w *writing) reserved() (bytes uint64) {
	for _, p := range w.permits {
		bytes += p.reserved()
	}
	return bytes
}

// dropPermitsLocked gives back what permits have reserved, and forgets them and those that are used up.
func (f *FS) dropPermitsLocked(w *writing, over []*permit) {
	w.permits = slices.DeleteFunc(w.permits, func(p *permit) bool {
		drop := p.reserved() == 0 || slices.Contains(over, p)
		if drop {
			w.n.vol.ledger.Settle(quota.Usage{Bytes: p.reserved()}, quota.Delta{})
		}
		return drop
	})
}

// maxReads is how often a charge is read at the most because permits were used meanwhile. No new call is allowed until then, so
// that it is soon over.
const maxReads = 16

// readPermitsLocked reads what is to be charged, and takes from the permits what of that they have been used for, in bytes. What
// is used between the two looks would count twice, so they are repeated until nothing was.
func (f *FS) readPermitsLocked(w *writing, st *unix.Stat_t) (used, charge uint64, err error) {
	lefts, before, err := f.leftOfPermitsLocked(w)
	for read := 1; err == nil; read++ {
		if charge, err = f.readChargeLocked(w, st); err != nil || len(w.permits) == 0 || read == maxReads {
			break
		}
		again, after, lookErr := f.leftOfPermitsLocked(w)
		if lookErr != nil || after == before {
			err = lookErr
			break
		}
		lefts, before = again, after
		if err = unix.Fstat(w.fd, st); err != nil {
			break
		}
	}
	for i, left := range lefts {
		p := w.permits[i]
		used += total(p.ranges) - total(left)
		p.ranges = left
	}
	return used, charge, err
}

// leftOfPermitsLocked returns what is left of each permit, and of all in bytes.
func (f *FS) leftOfPermitsLocked(w *writing) (lefts [][]quota.Range, bytes uint64, err error) {
	if len(w.permits) == 0 {
		return nil, 0, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(w.fd, &st); err != nil {
		return nil, 0, err
	}
	for _, p := range w.permits {
		left, err := f.leftLocked(w, p.ranges, uint64(st.Size))
		if err != nil {
			return nil, 0, err
		}
		lefts, bytes = append(lefts, left), bytes+total(left)
	}
	return lefts, bytes, nil
}

// leftLocked returns what of ranges is not in use: not mapped, or beyond the end of the file.
func (f *FS) leftLocked(w *writing, ranges []quota.Range, size uint64) (left []quota.Range, err error) {
	end := f.roundUp(size)
	for _, r := range ranges {
		if r.From < end {
			gaps, err := f.rule.Unmapped(w.fd, r.From, min(r.To, end))
			if err != nil {
				return nil, err
			}
			left = append(left, gaps...)
			r.From = end
		}
		if r.From < r.To {
			left = append(left, r)
		}
	}
	return left, nil
}

// foldLocked charges what calls have used of their permits, and gives back the
// rest where isOver says that the call is over.
func (f *FS) foldLocked(w *writing, isOver func(*permit) bool) error {
	n := w.n
	if len(w.permits) == 0 {
		return nil
	}
	// In this order: what ends after the file was looked at may have been used since.
	var over []*permit
	for _, p := range w.permits {
		if isOver(p) {
			over = append(over, p)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(w.fd, &st); err != nil {
		return err
	}
	size := uint64(st.Size)
	exact := f.small(size) || n.prealloc > 0 || size < n.size
	for _, p := range w.permits {
		exact = exact || p.extra > 0
	}
	if exact {
		if err := f.readWrittenLocked(w); err != nil {
			return err
		}
		f.dropPermitsLocked(w, over)
		return nil
	}
	var used uint64
	for _, p := range w.permits {
		left, err := f.leftLocked(w, p.ranges, size)
		if err != nil {
			return err
		}
		used += total(p.ranges) - total(left)
		if p.gap && size > n.size || len(left) > 0 && left[0].From < f.roundUp(size) {
			n.dense = false
		}
		p.ranges = left
	}
	n.size = size
	n.settleLocked(used, int64(used))
	w.growHeldLocked(int64(used))
	w.noteLocked(f, &st)
	f.dropPermitsLocked(w, over)
	return nil
}

// permitLocked reserves what a held call can make the inode grow by.
func (f *FS) permitLocked(w *writing, ev *gate.Event) (gate.Verdict, error) {
	n := w.n
	if err := f.catchUpLocked(w, ev); err != nil {
		return 0, err
	}
	end := ev.Off + ev.Len
	if end < ev.Off || end > 1<<63-1 {
		return gate.Allow, nil // the kernel refuses it
	}
	inPlace, err := f.unmappedLocked(n, w.fd, ev.Off, end)
	if err != nil {
		return 0, err
	}
	appended, err := f.unmappedLocked(n, w.fd, n.size, n.size+ev.Len)
	if err != nil {
		return 0, err
	}
	if len(inPlace) == 0 && len(appended) == 0 {
		return gate.Allow, nil
	}
	call := f.gating.callers.CallOf(ev)
	if call.Access == gate.Reads {
		return gate.Allow, nil
	}
	length := ev.Len // in whole pages, which may be more than is appended
	if call.Len > 0 {
		length = min(length, call.Len)
	}
	// A thread that makes a new call has ended its last.
	over := func(p *permit) bool {
		return p.tid > 0 && (p.tid == ev.TID || call.HasLock())
	}
	if len(w.permits) > 0 && !f.putsOffLocked(w, call) {
		if err := f.foldLocked(w, over); err != nil {
			return 0, err
		}
		// What has been used of them may be what this one was to need.
		if inPlace, err = f.unmappedLocked(n, w.fd, ev.Off, end); err != nil {
			return 0, err
		}
	}
	if appended, err = f.unmappedLocked(n, w.fd, n.size, n.size+length); err != nil {
		return 0, err
	}
	p := &permit{tid: ev.TID, call: call}
	switch call.Access {
	case gate.Unknown:
		p.tid = 0
		p.ranges = union(inPlace, appended)
		if loose := w.looseLocked(); loose != nil {
			p.ranges = subtract(p.ranges, loose.ranges)
		}
	case gate.Appends:
		p.ranges = appended
	default:
		p.ranges = union(inPlace, appended)
	}
	if err = f.grantLocked(w, p, ev); errors.Is(err, quota.ErrNoSpace) && call.Access == gate.Writes {
		// It is one or the other.
		if p.ranges = inPlace; call.Appending(ev.TID) {
			p.ranges = appended
		}
		err = f.grantLocked(w, p, ev)
	}
	if errors.Is(err, quota.ErrNoSpace) {
		before := n.vol.ledger.Free()
		if err := f.foldLocked(w, over); err != nil {
			return 0, err
		}
		f.squeeze(n.vol, w)
		if n.vol.ledger.Free() != before {
			err = f.grantLocked(w, p, ev)
		}
	}
	if errors.Is(err, quota.ErrNoSpace) && call.Access == gate.Unknown && len(inPlace) == 0 && !w.appends {
		return gate.Allow, nil // a read, or a write in place, unless it appends: then it is caught at that
	}
	return gate.Allow, err
}

// grantLocked reserves a permit and makes it the inode's, or ErrNoSpace.
func (f *FS) grantLocked(w *writing, p *permit, ev *gate.Event) error {
	n := w.n
	if len(p.ranges) == 0 {
		return nil
	}
	from := f.roundDown(ev.Off)
	p.gap = p.call.Access != gate.Appends && from > f.chargedEndLocked(n)
	p.extra = 0
	if !n.dense || p.gap {
		if f.small(n.size) {
			hidden, err := f.hiddenLocked(n, w.fd, min(max(ev.Off+ev.Len, n.size), 4*f.rule.Block))
			if err != nil {
				return err
			}
			p.extra += hidden
		}
		tail, err := f.tailLocked(n, w.fd)
		if err != nil {
			return err
		}
		p.extra += tail
	}
	if p.gap {
		if err := f.dropSpeculationLocked(n, w.fd, from); err != nil {
			return fmt.Errorf("blocks beyond the end: %w", err)
		}
	}
	var but *writing
	if p.call.HasLock() {
		but = w
	}
	if aside := n.vol.writers.aside(but); aside > 0 && n.vol.ledger.Free().Bytes < p.reserved()+aside {
		return quota.ErrNoSpace
	}
	if err := f.reserve(n.vol, quota.Usage{Bytes: p.reserved()}); err != nil {
		return err
	}
	if loose := w.looseLocked(); p.tid == 0 && loose != nil {
		loose.ranges = union(loose.ranges, p.ranges)
		loose.extra += p.extra
		loose.gap = loose.gap || p.gap
		return nil
	}
	w.permits = append(w.permits, p)
	return nil
}

// looseLocked returns the permit of the calls without an end.
func (w *writing) looseLocked() *permit {
	for _, p := range w.permits {
		if p.tid == 0 {
			return p
		}
	}
	return nil
}

// union merges two ascending lists of ranges.
func union(a, b []quota.Range) (all []quota.Range) {
	for len(a) > 0 || len(b) > 0 {
		if len(a) == 0 || len(b) > 0 && b[0].From < a[0].From {
			a, b = b, a
		}
		r := a[0]
		a = a[1:]
		if last := len(all) - 1; last >= 0 && r.From <= all[last].To {
			all[last].To = max(all[last].To, r.To)
		} else {
			all = append(all, r)
		}
	}
	return all
}

// subtract returns what of the ascending ranges a is not in b.
func subtract(a, b []quota.Range) (left []quota.Range) {
	for _, r := range a {
		for _, s := range b {
			if s.To <= r.From || s.From >= r.To {
				continue
			}
			if s.From > r.From {
				left = append(left, quota.Range{From: r.From, To: s.From})
			}
			r.From = min(s.To, r.To)
		}
		if r.From < r.To {
			left = append(left, r)
		}
	}
	return left
}
