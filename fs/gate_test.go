package fs

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/croftfs/croft/quota"
)

func TestPeriod(t *testing.T) {
	for room, want := range map[uint64]time.Duration{
		0:         gatedPeriod,
		gateBelow: gatedPeriod,
		1 << 30:   time.Second / 32,
		9 << 30:   9 * time.Second / 32,
		32 << 30:  maxPeriod,
		1 << 62:   maxPeriod,
	} {
		if got := new(volume).period(room); got < want*99/100 || got > want*101/100 {
			t.Errorf("%d bytes: %s, want %s", room, got, want)
		}
	}
}

// blocks draws ascending ranges of whole blocks below 40 and lists which blocks they hold.
func blocks(t *rapid.T, name string) (ranges []quota.Range, in [40]bool) {
	held := rapid.SliceOfN(rapid.Bool(), len(in), len(in)).Draw(t, name)
	for i, b := range held {
		in[i] = b
		switch n := len(ranges); {
		case !b:
		case n > 0 && ranges[n-1].To == uint64(i):
			ranges[n-1].To++
		default:
			ranges = append(ranges, quota.Range{From: uint64(i), To: uint64(i + 1)})
		}
	}
	return ranges, in
}

func TestRanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, inA := blocks(t, "a")
		b, inB := blocks(t, "b")
		for name, got := range map[string][]quota.Range{"union": union(slices.Clone(a), slices.Clone(b)), "subtract": subtract(slices.Clone(a), b)} {
			var in [len(inA)]bool
			for i, r := range got {
				if r.From >= r.To || i > 0 && r.From < got[i-1].To {
					t.Fatalf("%s of %v and %v: %v", name, a, b, got)
				}
				for x := r.From; x < r.To; x++ {
					in[x] = true
				}
			}
			for x := range in {
				want := inA[x] || inB[x]
				if name == "subtract" {
					want = inA[x] && !inB[x]
				}
				if in[x] != want {
					t.Fatalf("%s of %v and %v: %v", name, a, b, got)
				}
			}
		}
	})
}

func TestHandleNames(t *testing.T) {
	for _, k := range []handleKey{keyOf(1), {typ: 0x4d, len: maxHandle, data: [maxHandle]byte{1, 19: 2}}} {
		if got, ok := parseHandle(k.name()); !ok || got != k {
			t.Errorf("%s: %v, %v", k.name(), got, ok)
		}
	}
	for _, name := range []string{"", "0", "01", "zz", string(make([]byte, 100)), "../x"} {
		if _, ok := parseHandle(name); ok {
			t.Errorf("%q is a handle", name)
		}
	}
}
