package quota

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
)

// The errors of a ledger. Compare with errors.Is.
var (
	// ErrNoSpace is returned when a reservation does not fit, whatever it is
	// that has run out: ErrNoBytes and ErrNoInodes both are ErrNoSpace.
	ErrNoSpace = errors.New("no space left in the volume")

	// ErrNoBytes is returned when a reservation does not fit the byte limit.
	ErrNoBytes = fmt.Errorf("%w: its bytes are used up", ErrNoSpace)

	// ErrNoInodes is returned when a reservation does not fit the inode limit.
	ErrNoInodes = fmt.Errorf("%w: its inodes are used up", ErrNoSpace)

	// ErrBelowUse is returned when a limit is to be lowered below what is in use.
	ErrBelowUse = errors.New("limit is below what is in use")
)

// Usage is an amount of each resource that a volume's limit is about. It
// serves as a limit too.
type Usage struct {
	Bytes  uint64 `json:"bytes"`
	Inodes uint64 `json:"inodes"`
}

// Add returns the sum of u and v, at most math.MaxUint64 in each resource.
func (u Usage) Add(v Usage) Usage {
	return Usage{Bytes: addSat(u.Bytes, v.Bytes), Inodes: addSat(u.Inodes, v.Inodes)}
}

// Sub returns what is left of u without v, at least 0 in each resource.
func (u Usage) Sub(v Usage) Usage {
	return Usage{Bytes: u.Bytes - min(u.Bytes, v.Bytes), Inodes: u.Inodes - min(u.Inodes, v.Inodes)}
}

// Fits tells whether u is within limit in both resources.
func (u Usage) Fits(limit Usage) bool { return u.Bytes <= limit.Bytes && u.Inodes <= limit.Inodes }

// String gives both figures, for messages.
func (u Usage) String() string { return fmt.Sprintf("%d bytes, %d inodes", u.Bytes, u.Inodes) }

// Delta is a change of usage, of either sign.
type Delta struct{ Bytes, Inodes int64 }

func addSat(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

// clamp turns an amount into the ledger's own arithmetic.
func clamp(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

// Ledger holds what a volume uses and what has been reserved in it against its
// limit. All methods may be called from any goroutine at any time; none
// blocks on anything but another SetLimit.
//
// Amounts beyond math.MaxInt64 count as math.MaxInt64.
type Ledger struct {
	bytes, inodes account

	// limits guards changes of either account's limit. A refusal is decided
	// under it, so that a change of limits that is taken back half way has
	// refused nobody.
	limits sync.Mutex

	overruns, underruns atomic.Uint64
}

// account is one resource of a ledger.
//
// INVARIANT: room = limit - used - reserved. Every step changes room by one
// atomic operation, so what a reservation is compared with is always whole.
// INVARIANT: used <= limit - room, but while a Settle is under way that has
// found more on the disk than was reserved.
type account struct {
	room  atomic.Int64  // negative when more is claimed than the limit allows
	used  *atomic.Int64 // never negative
	limit atomic.Int64  // written under Ledger.limits
}

// NewLedger returns a ledger for a volume that uses used. A volume may be
// above its limit: then nothing is granted until it is below.
func NewLedger(limit, used Usage) *Ledger {
	l := new(Ledger)
	l.bytes.init(limit.Bytes, used.Bytes)
	l.inodes.init(limit.Inodes, used.Inodes)
	return l
}

func (a *account) init(limit, used uint64) {
	a.used = new(atomic.Int64)
	a.limit.Store(clamp(limit))
	a.used.Store(clamp(used))
	a.room.Store(clamp(limit) - clamp(used))
}

// KeepIn has what is used written to where it outlives the ledger, from now on. It
// is called before the ledger is used.
func (l *Ledger) KeepIn(bytes, inodes *atomic.Int64) {
	bytes.Store(l.bytes.used.Load())
	inodes.Store(l.inodes.used.Load())
	l.bytes.used, l.inodes.used = bytes, inodes
}

// Claim takes u from what is free, or beyond: what was reserved before a process
// ended, and is given back by Settle as any reservation.
func (l *Ledger) Claim(u Usage) {
	l.bytes.room.Add(-clamp(u.Bytes))
	l.inodes.room.Add(-clamp(u.Inodes))
}

// Reserve takes u from what is free: all of it, or nothing and ErrNoBytes or
// ErrNoInodes, unwrapped. What is granted must be given back by exactly one
// Settle. Nothing of a resource is always granted, above the limit as well.
//
// Each resource is compared and taken in one atomic step. A call that gets its
// bytes and then loses the race for the last inodes holds those bytes for an
// instant, so that another call may be refused; none is ever granted too much.
func (l *Ledger) Reserve(u Usage) error {
	if l.tryReserve(u) == nil {
		return nil
	}
	l.limits.Lock()
	defer l.limits.Unlock()
	return l.tryReserve(u)
}

func (l *Ledger) tryReserve(u Usage) error {
	if !l.inodes.has(u.Inodes) {
		return ErrNoInodes
	}
	if !l.bytes.take(u.Bytes) {
		return ErrNoBytes
	}
	if !l.inodes.take(u.Inodes) {
		l.bytes.room.Add(int64(u.Bytes))
		return ErrNoInodes
	}
	return nil
}

func (a *account) has(n uint64) bool {
	return n == 0 || n <= math.MaxInt64 && a.room.Load() >= int64(n)
}

func (a *account) take(n uint64) bool {
	if n == 0 {
		return true
	}
	for n <= math.MaxInt64 {
		room := a.room.Load()
		if room < int64(n) {
			return false
		}
		if a.room.CompareAndSwap(room, room-int64(n)) {
			return true
		}
	}
	return false
}

// ReserveUpTo takes the largest multiple of unit bytes that is free and not
// above bytes, and returns it; 0 when not even one unit fits. A unit of 0 counts as 1.
// What is granted must be given back by exactly one Settle.
func (l *Ledger) ReserveUpTo(bytes, unit uint64) uint64 {
	unit = max(unit, 1)
	want := min(bytes, math.MaxInt64) / unit * unit
	if l.bytes.take(want) {
		return want
	}
	l.limits.Lock()
	defer l.limits.Unlock()
	for {
		room := l.bytes.room.Load()
		granted := min(want, uint64(max(room, 0))/unit*unit)
		if granted == 0 || l.bytes.room.CompareAndSwap(room, room-int64(granted)) {
			return granted
		}
	}
}

// Settle gives reserved back and applies change to what is used, each resource
// in one step: no other call ever sees the reservation gone and the change not
// yet made. A change beyond what was reserved is applied all the same, for the
// disk is what is true, and may leave the volume above its limit (Overruns). A
// change that would leave less than nothing in use leaves 0 (Underruns).
func (l *Ledger) Settle(reserved Usage, change Delta) {
	overrunB, underrunB := l.bytes.settle(reserved.Bytes, change.Bytes)
	overrunI, underrunI := l.inodes.settle(reserved.Inodes, change.Inodes)
	if overrunB || overrunI {
		l.overruns.Add(1)
	}
	if underrunB || underrunI {
		l.underruns.Add(1)
	}
}

// Find charges bytes that were written without asking, or may have been. Unlike
// Settle it counts no overrun: what is in use is not known yet.
func (l *Ledger) Find(bytes uint64) { l.bytes.settle(0, clamp(bytes)) }

// settle changes used before room: used is then never above what is claimed,
// so a limit set in between is never below what is used.
func (a *account) settle(reserved uint64, change int64) (overrun, underrun bool) {
	given := clamp(reserved)
	for change != 0 {
		used := a.used.Load()
		applied := min(max(change, -used), math.MaxInt64-used)
		if a.used.CompareAndSwap(used, used+applied) {
			underrun = applied > change
			change = applied
			break
		}
	}
	if given == change {
		return false, underrun
	}
	room := a.room.Add(given - change)
	return change > given && room < 0, underrun
}

// Used returns what is used. The two figures are read one after the other.
func (l *Ledger) Used() Usage {
	return Usage{Bytes: uint64(l.bytes.used.Load()), Inodes: uint64(l.inodes.used.Load())}
}

// Reserved returns what has been reserved and not settled. While others
// reserve and settle it is an estimate: it is put together from several figures.
func (l *Ledger) Reserved() Usage {
	l.limits.Lock()
	defer l.limits.Unlock()
	return Usage{Bytes: l.bytes.reserved(), Inodes: l.inodes.reserved()}
}

func (a *account) reserved() uint64 {
	return uint64(max(0, a.limit.Load()-a.room.Load()-a.used.Load()))
}

// Limit returns the limit.
func (l *Ledger) Limit() Usage {
	return Usage{Bytes: uint64(l.bytes.limit.Load()), Inodes: uint64(l.inodes.limit.Load())}
}

// Free returns what can be reserved: 0 for a resource above its limit.
func (l *Ledger) Free() Usage {
	return Usage{Bytes: uint64(max(0, l.bytes.room.Load())), Inodes: uint64(max(0, l.inodes.room.Load()))}
}

// Overruns returns how many calls of Settle have applied more than was
// reserved and so left the volume above its limit.
func (l *Ledger) Overruns() uint64 { return l.overruns.Load() }

// Underruns returns how many calls of Settle would have left less than
// nothing in use: each is a fault in what the ledger was told before.
func (l *Ledger) Underruns() uint64 { return l.underruns.Load() }

// SetLimit changes the limit in both resources, or in none and returns
// ErrBelowUse, wrapped with the figures, when a resource would be lowered below
// what is used and reserved. A resource that is not lowered is never refused,
// also when it is above its limit. Whoever reserves meanwhile is granted
// within the old limit or the new one; a refused change refuses nobody.
func (l *Ledger) SetLimit(limit Usage) error {
	l.limits.Lock()
	defer l.limits.Unlock()
	old := l.Limit()
	if claimed, ok := l.bytes.lowerLimitLocked(limit.Bytes); !ok {
		return fmt.Errorf("%w: %d bytes wanted, %d in use", ErrBelowUse, limit.Bytes, claimed)
	}
	if claimed, ok := l.inodes.lowerLimitLocked(limit.Inodes); !ok {
		l.bytes.raiseLimitLocked(old.Bytes)
		return fmt.Errorf("%w: %d inodes wanted, %d in use", ErrBelowUse, limit.Inodes, claimed)
	}
	// Only now, for what has been granted cannot be taken back.
	l.bytes.raiseLimitLocked(limit.Bytes)
	l.inodes.raiseLimitLocked(limit.Inodes)
	return nil
}

// lowerLimitLocked lowers the limit if that leaves what is claimed within it,
// else says what is claimed. It does nothing for a higher limit.
func (a *account) lowerLimitLocked(limit uint64) (claimed int64, ok bool) {
	old := a.limit.Load()
	change := clamp(limit) - old
	if change >= 0 {
		return 0, true
	}
	for {
		room := a.room.Load()
		if room+change < 0 {
			return old - room, false
		}
		if a.room.CompareAndSwap(room, room+change) {
			a.limit.Store(old + change)
			return 0, true
		}
	}
}

// raiseLimitLocked raises the limit. It does nothing for a lower limit.
func (a *account) raiseLimitLocked(limit uint64) {
	if change := clamp(limit) - a.limit.Load(); change > 0 {
		a.limit.Add(change) // first: what is claimed is never above it
		a.room.Add(change)
	}
}

// Reset replaces what is used, after a recount. The figure is right only if
// nothing was reserved or settled between the recount and this call; what is
// reserved stays so.
func (l *Ledger) Reset(used Usage) {
	l.bytes.reset(used.Bytes)
	l.inodes.reset(used.Inodes)
}

func (a *account) reset(used uint64) {
	a.room.Add(a.used.Swap(clamp(used)) - clamp(used))
}
