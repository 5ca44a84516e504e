package main

import (
	"math"
	"reflect"
	"strings"
	"testing"
)

func TestMedianAndSpread(t *testing.T) {
	for _, c := range []struct {
		samples        []float64
		median, spread float64
	}{
		{nil, 0, 0},
		{[]float64{7}, 7, 0},
		{[]float64{3, 1}, 2, 1},
		{[]float64{3, 1, 2}, 2, 1},
		{[]float64{10, 11, 9, 100, 1}, 10, 0.2}, // one stray each way
		{[]float64{0, 0, 0}, 0, 0},
	} {
		if m, s := median(c.samples), spread(c.samples); m != c.median || math.Abs(s-c.spread) > 1e-9 {
			t.Errorf("%v: median %v and spread %v, want %v and %v", c.samples, m, s, c.median, c.spread)
		}
	}
}

func TestSettle(t *testing.T) {
	w := Workload{Name: "w", Cells: []Cell{
		{System: native, Samples: []float64{100, 100, 110}},
		{System: "other", Samples: []float64{50, 45, 55}},
		{System: "failed", Error: "why"},
	}}
	w.settle(0.25)
	if w.Noisy || w.cell("other").Spread == 0 {
		t.Errorf("noisy by a spread of %v", w.cell("other").Spread)
	}
	if got := w.cell("other").Ratio; got != 0.5 {
		t.Errorf("ratio %v of a rate", got)
	}
	if got := w.cell("failed").Ratio; got != 0 {
		t.Errorf("ratio %v of what failed", got)
	}
	w.Lower = true
	w.settle(0.05)
	if !w.Noisy {
		t.Error("not noisy by the first system's spread")
	}
	if got := w.cell("other").Ratio; got != 2 {
		t.Errorf("ratio %v of half the seconds", got)
	}
}

// What disturbs the machine for longer than a round disturbs native too.
func TestRatioOfRounds(t *testing.T) {
	w := Workload{Cells: []Cell{
		{System: native, Samples: []float64{100, 50, 200}},
		{System: "other", Samples: []float64{90, 45, 180}},
		{System: "once", Samples: []float64{50}},
	}}
	w.settle(0.01)
	if c := w.cell("other"); w.Noisy || c.Ratio != 0.9 || c.Spread != 0 {
		t.Errorf("noisy %v, ratio %v, spread %v", w.Noisy, c.Ratio, c.Spread)
	}
	if c := w.cell("once"); c.Ratio != 0.5 {
		t.Errorf("ratio %v of one round to native's in that", c.Ratio)
	}
}

func TestCountAndBound(t *testing.T) {
	for _, c := range []struct {
		w             Workload
		took          requests
		all           *float64
		waited, bound float64
	}{
		// A second of 1,000 operations is one of 2,000 round trips of 250 µs more.
		{Workload{Serial: true, Cells: []Cell{{System: native, Median: 1000}, {System: "c", Samples: []float64{500}}}}, requests{3000, 2000}, nil, 2, 1 / 1.5},
		{Workload{Serial: true, Lower: true, Cells: []Cell{{System: native, Median: 2}, {System: "c", Samples: []float64{4}}}}, requests{3000, 2000}, new(3000.0), 2000, 0.8},
		{Workload{Lower: true, Cells: []Cell{{System: native, Median: 2}, {System: "c", Samples: []float64{4}}}}, requests{3000, 2000}, new(3000.0), 0, 0},
	} {
		c.w.count(map[string][]requests{"c": {c.took}}, 2)
		c.w.bound(250e-6)
		got := c.w.cell("c")
		if !reflect.DeepEqual(got.Requests, c.all) || got.Waited != c.waited || math.Abs(got.Bound-c.bound) > 1e-9 {
			t.Errorf("%+v: requests %v, waited %v, bound %v", c.w, got.Requests, got.Waited, got.Bound)
		}
	}
}

func TestTooNoisy(t *testing.T) {
	for _, c := range []struct {
		noisy, of int
		want      bool
	}{{0, 30, false}, {1, 1, false}, {2, 2, true}, {3, 30, false}, {4, 30, true}} {
		workloads := make([]Workload, c.of)
		for i := range c.noisy {
			workloads[i].Noisy = true
		}
		if got := tooNoisy(workloads); got != c.want {
			t.Errorf("%d of %d noisy: %v", c.noisy, c.of, got)
		}
	}
}

func TestDescribeNoise(t *testing.T) {
	got := describeNoise([]Workload{
		{Name: "quiet"},
		{Name: "loud", Noisy: true, FirstSpread: 0.5, Cells: []Cell{{System: native, Spread: 0.1}, {System: "first", Spread: 0.4}, {System: "second", Spread: 0.6}}},
	})
	if strings.Contains(got, "quiet") || !strings.Contains(got, "loud") || !strings.Contains(got, "40%") || !strings.Contains(got, "50%") {
		t.Error(got)
	}
}

func TestRotated(t *testing.T) {
	systems := []*system{{name: "a"}, {name: "b"}, {name: "c"}}
	for round, want := range []string{"abc", "bca", "cab", "abc"} {
		var got strings.Builder
		for _, s := range rotated(systems, round) {
			got.WriteString(s.name)
		}
		if got.String() != want {
			t.Errorf("round %d: %s", round, got.String())
		}
	}
}
