package pool

import (
	"context"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/meta"
)

// Capacity is how much of a pool's disk there is, and how much of it is promised. All are in bytes.
type Capacity struct {
	// Total is the size of the backing filesystem, Free what is free on it now.
	Total uint64 `json:"total"`
	Free  uint64 `json:"free"`
	// Usable is what the pool can hold: what is free and what its volumes have already, without the share that is kept
	// back (Options.Spare) and the room for its records.
	Usable uint64 `json:"usable"`
	// Committed is the sum of the limits of all volumes and of what all snapshots use. Where it is not above
	// Usable, every volume can be filled to its limit.
	Committed uint64 `json:"committed"`
	// Available is what limits may still be raised or new volumes have: Options.Overcommit times Usable, without what
	// is Committed. Where any sum of limits is allowed it is Free.
	Available uint64 `json:"available"`
}

// Capacity tells how much there is and how much is promised.
func (p *Pool) Capacity(context.Context) (Capacity, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.capacity()
}

// capacity is Capacity with Pool.mu held.
func (p *Pool) capacity() (Capacity, error) {
	c := Capacity{Committed: p.promised}
	for _, v := range p.volumes {
		c.Committed = more(c.Committed, v.record.Limit.Bytes)
	}
	for _, s := range p.snaps {
		c.Committed = more(c.Committed, s.record.Used.Bytes)
	}
	// What volumes write meanwhile must not be seen twice: it is looked for in them first, and on the disk after.
	had := p.onDisk()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(p.root.Fd()), &st); err != nil {
		return Capacity{}, fmt.Errorf("pool %s: statfs: %w", p.dir, err)
	}
	c.Total, c.Free = st.Blocks*uint64(st.Bsize), st.Bavail*uint64(st.Bsize)
	kept := minRoom + uint64(p.spare*float64(c.Total))
	c.Usable = less(min(c.Free+had, c.Total), kept)
	switch p.overcommit {
	case 0:
		c.Available = c.Free
	case 1:
		c.Available = less(c.Usable, c.Committed)
	default:
		c.Available = less(uint64(p.overcommit*float64(c.Usable)), c.Committed)
	}
	return c, nil
}

func less(a, b uint64) uint64 { return a - min(a, b) }

// more saturates: with any sum of limits allowed, that may be above what a number holds.
func more(a, b uint64) uint64 { return a + min(b, math.MaxUint64-a) }

// onDisk is a number of bytes that volumes and snapshots have on the disk for certain. Where copies share blocks, that
// is what the largest of a family has. Pool.mu is held.
func (p *Pool) onDisk() (sum uint64) {
	shares := p.fstype != "ext4" // which cannot
	largest := make(map[string]uint64)
	count := func(family string, bytes uint64) {
		if shares {
			largest[family] = max(largest[family], bytes)
		} else {
			sum += bytes
		}
	}
	for _, v := range p.volumes {
		if !v.missing {
			count(familyOf(v.record), v.ledger.Used().Bytes)
		}
	}
	for _, s := range p.snaps {
		count(s.record.Family, s.record.Used.Bytes)
	}
	for _, bytes := range largest {
		sum += bytes
	}
	return sum
}

// familyOf names what a volume's copies share with it: the volume at the beginning of the line.
func familyOf(r meta.Volume) string {
	if r.Family != "" {
		return r.Family
	}
	return fmt.Sprintf("%s %d", r.Name, r.Created.UnixNano())
}

// promise counts bytes as committed until release is called, by which time the records say so. ErrNoRoom with the
// figures when that is more than the pool may promise.
func (p *Pool) promise(bytes uint64) (release func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.overcommit != 0 {
		c, err := p.capacity()
		if err != nil {
			return nil, err
		}
		if bytes > c.Available {
			return nil, fmt.Errorf("%w: %d bytes are to be promised, and %d can be: of %d usable bytes %d are promised (overcommit %v)",
				ErrNoRoom, bytes, c.Available, c.Usable, c.Committed, p.overcommit)
		}
	}
	p.promised += bytes
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.promised -= bytes
	}, nil
}
