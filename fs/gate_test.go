package fs

import (
	"runtime"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/croftfs/croft/quota"
)

func TestPeriod(t *testing.T) {
	for room, want := range map[uint64]time.Duration{
		0:              gatedPeriod,
		gateBelow:      gatedPeriod,
		writeSpeed / 9: time.Second / 9,
		writeSpeed:     maxPeriod,
		1 << 62:        maxPeriod,
	} {
		if got := new(volume).period(room); got < want*99/100 || got > want*101/100 {
			t.Errorf("%d bytes: %s, want %s", room, got, want)
		}
	}
}

// TestTempo holds that the sampler has time for all volumes with little room, however many files are open in them.
func TestTempo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		costs := rapid.SliceOfN(rapid.Map(rapid.Int64Range(1_000, 100_000_000), func(ns int64) time.Duration { return time.Duration(ns) }), 1, 50).Draw(t, "costs")
		near := crowd{volumes: len(costs)}
		for _, cost := range costs {
			near.cost += cost
		}
		var all, fair float64
		for _, cost := range costs {
			tempo := near.tempo(cost)
			part := float64(cost) / float64(tempo)
			if tempo < gatedPeriod {
				t.Errorf("looked at after %v", tempo)
			}
			if all += part; tempo < slowPeriod {
				fair += part
			}
		}
		if fair > 1.0/samplerShare+1e-9 || all > 0.5+1.0/samplerShare {
			t.Errorf("%.3f of a processor, %.3f for those that are looked at often", all, fair)
		}
	})
	if got := (crowd{}).tempo(time.Millisecond); got != samplerShare*time.Millisecond {
		t.Errorf("one volume with much room: %v", got)
	}
}

func TestWriteSpeed(t *testing.T) {
	for n, want := range map[int]uint64{1: 32 << 30, 32: 32 << 30, 33: 33 << 30, 128: 128 << 30, 256: 128 << 30} {
		if got := writeSpeedOf(n); got != want {
			t.Errorf("%d processors: %d, want %d", n, got, want)
		}
	}
	if gateBelow < 64<<20 || 2*gateBelow > maxBelow {
		t.Errorf("gated below %d bytes", gateBelow)
	}
	for list, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8,10-11": 7, "": 0, "x": 0, "3-1": 0, "0-": 0, "-1": 0, "0,,2": 0} {
		if got := countList(list); got != want {
			t.Errorf("%q: %d, want %d", list, got, want)
		}
	}
	if n := processors(); n < runtime.NumCPU() {
		t.Errorf("%d processors, of which this process may use %d", n, runtime.NumCPU())
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
