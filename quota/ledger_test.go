package quota

import (
	"encoding/json"
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// model is a ledger as one would write it without concurrency.
type model struct {
	limit, used Usage
	out         []Usage
	overruns    uint64
	underruns   uint64
}

func (m *model) reserved() (sum Usage) {
	for _, u := range m.out {
		sum = sum.Add(u)
	}
	return sum
}

func (m *model) claimed() Usage { return m.used.Add(m.reserved()) }

func (m *model) free() Usage { return m.limit.Sub(m.claimed()) }

func (m *model) reserve(u Usage) error {
	free := m.free()
	switch {
	case u.Inodes > free.Inodes:
		return ErrNoInodes
	case u.Bytes > free.Bytes:
		return ErrNoBytes
	}
	m.out = append(m.out, u)
	return nil
}

func (m *model) reserveUpTo(bytes, unit uint64) uint64 {
	granted := min(bytes, m.free().Bytes) / unit * unit
	if granted > 0 {
		m.out = append(m.out, Usage{Bytes: granted})
	}
	return granted
}

func (m *model) settle(i int, change Delta) Usage {
	var reserved Usage
	if i >= 0 {
		reserved = m.out[i]
		m.out = append(m.out[:i:i], m.out[i+1:]...)
	}
	under := false
	apply := func(used uint64, d int64) uint64 {
		if d < 0 && uint64(-d) > used {
			under = true
			return 0
		}
		return uint64(int64(used) + d)
	}
	m.used = Usage{Bytes: apply(m.used.Bytes, change.Bytes), Inodes: apply(m.used.Inodes, change.Inodes)}
	claimed := m.claimed()
	if change.Bytes > int64(reserved.Bytes) && claimed.Bytes > m.limit.Bytes ||
		change.Inodes > int64(reserved.Inodes) && claimed.Inodes > m.limit.Inodes {
		m.overruns++
	}
	if under {
		m.underruns++
	}
	return reserved
}

func (m *model) setLimit(limit Usage) bool {
	claimed := m.claimed()
	if limit.Bytes < m.limit.Bytes && limit.Bytes < claimed.Bytes ||
		limit.Inodes < m.limit.Inodes && limit.Inodes < claimed.Inodes {
		return false
	}
	m.limit = limit
	return true
}

// steps runs one operation on the ledger and the model and compares.
type steps struct {
	l *Ledger
	m *model
}

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

func newSteps(limit, used Usage) *steps {
	return &steps{l: NewLedger(limit, used), m: &model{limit: limit, used: used}}
}

func (s *steps) reserve(t fataler, u Usage) {
	t.Helper()
	want := s.m.reserve(u)
	if got := s.l.Reserve(u); !errors.Is(got, want) || (got == nil) != (want == nil) {
		t.Fatalf("Reserve(%v) = %v, want %v", u, got, want)
	}
}

func (s *steps) reserveUpTo(t fataler, bytes, unit uint64) {
	t.Helper()
	want := s.m.reserveUpTo(bytes, unit)
	if got := s.l.ReserveUpTo(bytes, unit); got != want {
		t.Fatalf("ReserveUpTo(%d, %d) = %d, want %d", bytes, unit, got, want)
	}
}

// settle settles the reservation of that index, or none for -1.
func (s *steps) settle(i int, change Delta) { s.l.Settle(s.m.settle(i, change), change) }

func (s *steps) setLimit(t fataler, limit Usage) {
	t.Helper()
	want := s.m.setLimit(limit)
	err := s.l.SetLimit(limit)
	if (err == nil) != want || err != nil && !errors.Is(err, ErrBelowUse) {
		t.Fatalf("SetLimit(%v) = %v, want accepted = %v", limit, err, want)
	}
}

func (s *steps) reset(used Usage) {
	s.m.used = used
	s.l.Reset(used)
}

func (s *steps) compare(t fataler) {
	t.Helper()
	for _, c := range []struct {
		what      string
		got, want Usage
	}{
		{"Used", s.l.Used(), s.m.used},
		{"Reserved", s.l.Reserved(), s.m.reserved()},
		{"Limit", s.l.Limit(), s.m.limit},
		{"Free", s.l.Free(), s.m.free()},
	} {
		if c.got != c.want {
			t.Fatalf("%s() = %v, want %v", c.what, c.got, c.want)
		}
	}
	if s.l.Overruns() != s.m.overruns || s.l.Underruns() != s.m.underruns {
		t.Fatalf("Overruns, Underruns = %d, %d, want %d, %d", s.l.Overruns(), s.l.Underruns(), s.m.overruns, s.m.underruns)
	}
}

func TestLedgerLikeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		usage := rapid.Custom(func(t *rapid.T) Usage {
			return Usage{Bytes: rapid.Uint64Range(0, 100_000).Draw(t, "bytes"), Inodes: rapid.Uint64Range(0, 50).Draw(t, "inodes")}
		})
		s := newSteps(usage.Draw(t, "limit"), usage.Draw(t, "used"))
		t.Repeat(map[string]func(*rapid.T){
			"":        func(t *rapid.T) { s.compare(t) },
			"Reserve": func(t *rapid.T) { s.reserve(t, usage.Draw(t, "u")) },
			"ReserveUpTo": func(t *rapid.T) {
				s.reserveUpTo(t, rapid.Uint64Range(0, 100_000).Draw(t, "bytes"), rapid.SampledFrom([]uint64{1, 7, 4096}).Draw(t, "unit"))
			},
			"SettleWithin": func(t *rapid.T) {
				if len(s.m.out) == 0 {
					return
				}
				i := rapid.IntRange(0, len(s.m.out)-1).Draw(t, "which")
				u := s.m.out[i]
				s.settle(i, Delta{
					Bytes:  rapid.Int64Range(-int64(s.m.used.Bytes), int64(u.Bytes)).Draw(t, "bytes"),
					Inodes: rapid.Int64Range(-int64(s.m.used.Inodes), int64(u.Inodes)).Draw(t, "inodes"),
				})
			},
			"SettleBeyond": func(t *rapid.T) {
				s.settle(rapid.IntRange(-1, len(s.m.out)-1).Draw(t, "which"), Delta{
					Bytes:  rapid.Int64Range(-150_000, 150_000).Draw(t, "bytes"),
					Inodes: rapid.Int64Range(-80, 80).Draw(t, "inodes"),
				})
			},
			"SetLimit": func(t *rapid.T) { s.setLimit(t, usage.Draw(t, "limit")) },
			"Reset":    func(t *rapid.T) { s.reset(usage.Draw(t, "used")) },
		})
	})
}

// FuzzLedger reads a sequence of operations from bytes: an operation, then its figures.
func FuzzLedger(f *testing.F) {
	f.Add([]byte{0, 3, 1, 1, 9, 2, 0, 0, 2, 3, 3, 4, 4, 4, 5, 0, 0})
	f.Add([]byte{0, 255, 0, 0, 1, 0, 2, 0, 255, 3, 0, 0, 4, 9, 9, 2, 0, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		next := func() uint64 {
			if len(script) == 0 {
				return 0
			}
			b := script[0]
			script = script[1:]
			return uint64(b)
		}
		signed := func() int64 { return int64(int8(next())) }
		s := newSteps(Usage{Bytes: next() * 8, Inodes: next()}, Usage{Bytes: next() * 4, Inodes: next() / 2})
		for len(script) > 0 {
			switch next() % 6 {
			case 0:
				s.reserve(t, Usage{Bytes: next() * 2, Inodes: next() / 8})
			case 1:
				s.reserveUpTo(t, next()*8, next()+1)
			case 2:
				s.settle(int(next())%(len(s.m.out)+1)-1, Delta{Bytes: signed() * 2, Inodes: signed() / 4})
			case 3:
				s.settle(int(next())%(len(s.m.out)+1)-1, Delta{})
			case 4:
				s.setLimit(t, Usage{Bytes: next() * 8, Inodes: next()})
			case 5:
				s.reset(Usage{Bytes: next() * 4, Inodes: next() / 2})
			}
			s.compare(t)
		}
	})
}

// TestLedgerNeverAboveLimit has 64 writers fill, empty and refill a volume, and
// looks at it all the while.
func TestLedgerNeverAboveLimit(t *testing.T) {
	limit := Usage{Bytes: 256 * 4096, Inodes: 100}
	t.Run("fixed", func(t *testing.T) { neverAboveLimit(t, limit, limit) })
	t.Run("moving", func(t *testing.T) { neverAboveLimit(t, limit, limit.Add(limit)) })
}

// neverAboveLimit moves the limit between limit and high meanwhile.
func neverAboveLimit(t *testing.T, limit, high Usage) {
	const block = 4096
	l := NewLedger(limit, Usage{})
	var stop atomic.Bool
	var watchers, writers sync.WaitGroup
	var looks, refused atomic.Uint64
	watchers.Go(func() {
		for !stop.Load() {
			// What is used only counts against the limit that was in
			// force; the highest is certain.
			used, free := l.Used(), l.Free()
			if !used.Fits(high) || !free.Fits(high) {
				t.Errorf("used %v, free %v with a limit of at most %v", used, free, high)
				return
			}
			if room := l.bytes.room.Load(); room < 0 {
				t.Errorf("%d bytes above the limit", -room)
				return
			}
			if room := l.inodes.room.Load(); room < 0 {
				t.Errorf("%d inodes above the limit", -room)
				return
			}
			looks.Add(1)
		}
	})
	watchers.Go(func() {
		for i := 0; !stop.Load(); i++ {
			next := limit
			if i%2 == 0 {
				next = high
			}
			if err := l.SetLimit(next); err != nil && !errors.Is(err, ErrBelowUse) {
				t.Error(err)
				return
			}
		}
	})
	var left [64]Usage
	for w := range left {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			var mine Usage
			for range 5000 {
				switch rnd.IntN(4) {
				case 0:
					u := Usage{Bytes: block * rnd.Uint64N(16), Inodes: rnd.Uint64N(3)}
					if l.Reserve(u) != nil {
						refused.Add(1)
						continue
					}
					used := Usage{Bytes: rnd.Uint64N(u.Bytes + 1), Inodes: rnd.Uint64N(u.Inodes + 1)}
					l.Settle(u, Delta{Bytes: int64(used.Bytes), Inodes: int64(used.Inodes)})
					mine = mine.Add(used)
				case 1:
					granted := l.ReserveUpTo(block*rnd.Uint64N(64), block)
					l.Settle(Usage{Bytes: granted}, Delta{Bytes: int64(granted)})
					mine.Bytes += granted
				case 2:
					drop := Usage{Bytes: rnd.Uint64N(mine.Bytes + 1), Inodes: rnd.Uint64N(mine.Inodes + 1)}
					l.Settle(Usage{}, Delta{Bytes: -int64(drop.Bytes), Inodes: -int64(drop.Inodes)})
					mine = mine.Sub(drop)
				case 3: // a rewrite that shrinks
					if u := (Usage{Bytes: block}); l.Reserve(u) == nil {
						drop := rnd.Uint64N(mine.Bytes + 1)
						l.Settle(u, Delta{Bytes: -int64(drop)})
						mine.Bytes -= drop
					}
				}
			}
			left[w] = mine
		})
	}
	writers.Wait()
	stop.Store(true)
	watchers.Wait()
	var sum Usage
	for _, u := range left {
		sum = sum.Add(u)
	}
	if l.Used() != sum || l.Reserved() != (Usage{}) {
		t.Errorf("used %v, reserved %v; the writers hold %v", l.Used(), l.Reserved(), sum)
	}
	if l.Overruns() != 0 || l.Underruns() != 0 {
		t.Errorf("%d overruns, %d underruns", l.Overruns(), l.Underruns())
	}
	if looks.Load() == 0 || refused.Load() == 0 {
		t.Errorf("looked %d times, refused %d times: the test tests nothing", looks.Load(), refused.Load())
	}
}

// TestLedgerFillsToTheLast has 64 writers take one unit at a time: together
// they get all there is.
func TestLedgerFillsToTheLast(t *testing.T) {
	limit := Usage{Bytes: 64 * 1000, Inodes: 9999}
	l := NewLedger(limit, Usage{})
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for l.Reserve(Usage{Bytes: 1}) == nil {
				l.Settle(Usage{Bytes: 1}, Delta{Bytes: 1})
			}
			for l.Reserve(Usage{Inodes: 1}) == nil {
				l.Settle(Usage{Inodes: 1}, Delta{Inodes: 1})
			}
		})
	}
	wg.Wait()
	if l.Used() != limit || l.Free() != (Usage{}) {
		t.Errorf("used %v, free %v, want all of %v used", l.Used(), l.Free(), limit)
	}
}

// TestLedgerLosesNothing has 64 writers contend for the same figures as hard as they can.
func TestLedgerLosesNothing(t *testing.T) {
	const writers, each = 64, 20_000
	l := NewLedger(Usage{Bytes: 1 << 40, Inodes: 2}, Usage{})
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				l.Settle(Usage{}, Delta{Bytes: 1})
				if u := (Usage{Bytes: 1, Inodes: 2}); l.Reserve(u) == nil { // one at a time
					l.Settle(u, Delta{})
				}
			}
		})
	}
	wg.Wait()
	if want := (Usage{Bytes: writers * each}); l.Used() != want || l.Reserved() != (Usage{}) {
		t.Errorf("used %v, reserved %v, want %v used", l.Used(), l.Reserved(), want)
	}
}

// TestLedgerRefusedShrinkDisturbsNobody lowers bytes, which would fit, and inodes,
// which do not: a writer that needs the bytes must never be refused.
func TestLedgerRefusedShrinkDisturbsNobody(t *testing.T) {
	l := NewLedger(Usage{Bytes: 1000, Inodes: 100}, Usage{Inodes: 100})
	var stop atomic.Bool
	var halfWay atomic.Uint64 // changes that had lowered bytes before they were refused
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			err := l.SetLimit(Usage{Bytes: 100, Inodes: 50})
			if !errors.Is(err, ErrBelowUse) {
				t.Errorf("SetLimit: %v", err)
				return
			}
			if strings.Contains(err.Error(), "inodes wanted") {
				halfWay.Add(1)
			}
		}
	})
	for until := time.Now().Add(5 * time.Second); halfWay.Load() < 100_000 && time.Now().Before(until); {
		// 999 of 1000: refused whenever the lower limit can be seen. When the
		// writer holds them, bytes are refused first and nothing is lowered.
		if err := l.Reserve(Usage{Bytes: 999}); err != nil {
			t.Errorf("refused with room for it: %v", err)
			break
		}
		l.Settle(Usage{Bytes: 999}, Delta{})
		if got := l.ReserveUpTo(1000, 8); got != 1000 {
			t.Errorf("%d of 1000 granted", got)
			break
		}
		l.Settle(Usage{Bytes: 1000}, Delta{})
	}
	stop.Store(true)
	wg.Wait()
	if want := (Usage{Bytes: 1000, Inodes: 100}); l.Limit() != want || l.Free().Bytes != 1000 {
		t.Errorf("limit %v, free %v after refused changes", l.Limit(), l.Free())
	}
}

func TestLedgerAboveItsLimit(t *testing.T) {
	l := NewLedger(Usage{Bytes: 100, Inodes: 10}, Usage{Bytes: 150, Inodes: 3})
	if err := l.Reserve(Usage{Bytes: 1}); !errors.Is(err, ErrNoBytes) || !errors.Is(err, ErrNoSpace) {
		t.Errorf("a byte: %v", err)
	}
	if err := l.Reserve(Usage{Inodes: 1}); err != nil {
		t.Errorf("an inode: %v", err)
	}
	if got := l.ReserveUpTo(10, 1); got != 0 {
		t.Errorf("%d bytes granted", got)
	}
	if l.Free() != (Usage{Inodes: 6}) {
		t.Errorf("free %v", l.Free())
	}
	if err := l.SetLimit(Usage{Bytes: 120, Inodes: 4}); err != nil {
		t.Errorf("a raise that is not enough, and inodes down to what is in use: %v", err)
	}
	if err := l.SetLimit(Usage{Bytes: 119, Inodes: 4}); !errors.Is(err, ErrBelowUse) {
		t.Errorf("a lower limit: %v", err)
	}
	if err := l.SetLimit(Usage{Bytes: 200, Inodes: 3}); !errors.Is(err, ErrBelowUse) {
		t.Errorf("inodes below what is reserved: %v", err)
	}
	if l.Limit() != (Usage{Bytes: 120, Inodes: 4}) {
		t.Errorf("limit %v after a refused change", l.Limit())
	}
}

func TestLedgerHugeFigures(t *testing.T) {
	l := NewLedger(Usage{Bytes: math.MaxUint64, Inodes: math.MaxUint64}, Usage{Bytes: 1})
	if l.Limit().Bytes != math.MaxInt64 || l.Free().Bytes != math.MaxInt64-1 {
		t.Errorf("limit %v, free %v", l.Limit(), l.Free())
	}
	if err := l.Reserve(Usage{Bytes: math.MaxUint64}); !errors.Is(err, ErrNoBytes) {
		t.Errorf("everything: %v", err)
	}
	if got := l.ReserveUpTo(math.MaxUint64, 4096); got != math.MaxInt64/4096*4096 {
		t.Errorf("granted %d", got)
	}
	l.Settle(Usage{Bytes: math.MaxInt64 / 4096 * 4096}, Delta{Bytes: math.MaxInt64})
	if l.Used().Bytes != math.MaxInt64 || l.Free().Bytes != 0 {
		t.Errorf("used %v, free %v", l.Used(), l.Free())
	}
}

func TestUsage(t *testing.T) {
	a, b := Usage{Bytes: 10, Inodes: math.MaxUint64}, Usage{Bytes: 4, Inodes: 1}
	if got := a.Add(b); got != (Usage{Bytes: 14, Inodes: math.MaxUint64}) {
		t.Errorf("Add: %v", got)
	}
	if got := b.Sub(a); got != (Usage{}) {
		t.Errorf("Sub: %v", got)
	}
	text, err := json.Marshal(b)
	if err != nil || string(text) != `{"bytes":4,"inodes":1}` {
		t.Errorf("JSON %s, %v", text, err)
	}
}

func BenchmarkLedger(b *testing.B) {
	l := NewLedger(Usage{Bytes: 1 << 40, Inodes: 1 << 30}, Usage{})
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := l.Reserve(Usage{Bytes: 4096}); err != nil {
				b.Error(err)
			}
			l.Settle(Usage{Bytes: 4096}, Delta{})
		}
	})
}
