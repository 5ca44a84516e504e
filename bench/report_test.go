package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func sampleResult() *Result {
	requests := 12.0
	r := &Result{
		Schema: schema, Status: statusNoisy, Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Seconds: 60,
		Host:      Host{Kernel: "6.12", CPUs: 2, Versions: map[string]string{"fio": "fio-3.33"}},
		Settings:  Settings{FS: "ext4", Rounds: 3, Scale: 1, MaxSpread: 0.25},
		RoundTrip: RoundTrip{Median: 20e-6, Spread: 0.1},
		Systems:   []Shown{{native, "the directory"}, {"croft-read", "Croft <read>"}, {"bindfs", "bindfs"}},
		Workloads: []Workload{
			{Group: "fio", Name: "fio-read-4k", Title: "4 KiB read", Unit: "IOPS", Cells: []Cell{
				{System: native, Samples: []float64{1_000_000, 1_000_000, 1_400_000}},
				{System: "croft-read", Samples: []float64{950_000, 950_000, 950_000}, Requests: &requests},
				{System: "bindfs", Error: `its daemon "died" & is gone`},
			}},
			{Group: "jobs", Name: "tar", Title: "unpack", Unit: "s", Lower: true, Cells: []Cell{
				{System: native, Samples: []float64{1, 1, 1}},
				{System: "croft-read", Samples: []float64{20, 20, 20}, Bound: 0.25},
				{System: "bindfs", Samples: []float64{0.5, 0.5, 0.5}},
			}},
		},
		Gate:   []Figure{{Title: "gated", Value: 12.5, Unit: "ms"}},
		Memory: []Memory{{System: "croft-read", Situation: knownInodes, Volumes: 1, Inodes: 1000, RSS: 64 << 20, PerInode: 512}},
	}
	for i := range r.Workloads {
		r.Workloads[i].settle(r.Settings.MaxSpread)
	}
	return r
}

func TestTable(t *testing.T) {
	table := sampleResult().table()
	for _, want := range []string{
		"This run is: noisy",
		"| | native | croft-read | bindfs |",
		"wake each other through a pipe in 20.0 µs ±10%",
		"| 4 KiB read **noisy** | 1,000,000 IOPS ±40% | 0.95 ±29% | failed |",
		"| unpack | 1.000 s ±0% | 0.050 ±0%, bound 0.25 | 2.00 ±0% |",
		"| gated | 12.5 ms |",
		"| croft-read: 100,000 known inodes | 64.0 | 0.0 | 512 |",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
}

func TestWrite(t *testing.T) {
	r, dir := sampleResult(), filepath.Join(t.TempDir(), "out")
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	html, err := os.ReadFile(filepath.Join(dir, "report.html"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"This is not a result", "<svg", "</svg>", "Croft &lt;read&gt;", "4 KiB read (noisy)", "0.95", "<td>12.5 ms</td>", "How to read it", "in 20.0 µs", "bound 0.25"} {
		if !strings.Contains(string(html), want) {
			t.Errorf("no %q in the report", want)
		}
	}
	if strings.Contains(string(html), "<?xml") {
		t.Error("an SVG is embedded with the head of a document")
	}
	data, err := os.ReadFile(filepath.Join(dir, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var again Result
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(r, &again) {
		t.Errorf("read back as %+v", again)
	}
}

func TestFigure(t *testing.T) {
	for v, want := range map[float64]string{1234567: "1,234,567", 1000: "1,000", 999.4: "999", 12.34: "12.3", 0.1234: "0.123"} {
		if got := figure(v); got != want {
			t.Errorf("%v: %s", v, got)
		}
	}
}
