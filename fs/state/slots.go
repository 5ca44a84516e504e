package state

import "math/bits"

// slots says which records of a section are in use: a bit each. It is not in
// the region, for the records themselves tell.
type slots struct {
	masks []uint64
	// hint is a mask before which all are full.
	hint  int
	limit uint32
	// seen is where the header says how many records were ever used.
	seen *uint32
	used int
}

func (s *slots) init(seen *uint32, limit uint32) { s.seen, s.limit = seen, limit }

// load looks at the records that were ever used.
func (s *slots) load(seen uint32, used func(uint32) bool) {
	s.grow(seen)
	for i := range seen {
		s.set(i, used(i))
	}
}

// grow has room for that many records, none of them in use.
func (s *slots) grow(seen uint32) { s.masks = make([]uint64, (seen+63)/64) }

func (s *slots) set(i uint32, used bool) {
	if used {
		s.masks[i/64] |= 1 << (i % 64)
		s.used++
	}
}

// take returns a record that is not in use, the first.
func (s *slots) take() (uint32, error) {
	for ; s.hint < len(s.masks); s.hint++ {
		if s.masks[s.hint] != ^uint64(0) {
			break
		}
	}
	if s.hint == len(s.masks) {
		s.masks = append(s.masks, 0)
	}
	i := uint32(s.hint*64 + bits.TrailingZeros64(^s.masks[s.hint]))
	if i >= s.limit {
		return 0, ErrFull
	}
	s.masks[s.hint] |= 1 << (i % 64)
	s.used++
	*s.seen = max(*s.seen, i+1)
	return i, nil
}

func (s *slots) free(i uint32) {
	s.masks[i/64] &^= 1 << (i % 64)
	s.hint = min(s.hint, int(i/64))
	s.used--
}

// each yields the records in use.
func (s *slots) each(yield func(uint32)) {
	for at, mask := range s.masks {
		for ; mask != 0; mask &= mask - 1 {
			yield(uint32(at*64 + bits.TrailingZeros64(mask)))
		}
	}
}

// unused yields runs of whole masks without a record in use, as records [from, to),
// and takes those at the end away.
func (s *slots) unused(yield func(from, to uint32)) {
	for from := 0; from < len(s.masks); {
		to := from
		for to < len(s.masks) && s.masks[to] == 0 {
			to++
		}
		if to > from {
			yield(uint32(from*64), uint32(to*64))
		}
		from = to + 1
	}
	for n := len(s.masks); n > 0 && s.masks[n-1] == 0; n-- {
		s.masks = s.masks[:n-1]
	}
	s.hint = min(s.hint, len(s.masks))
}
