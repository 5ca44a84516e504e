package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// schema is the version of results.json. A field may be added to a version; none changes
// its meaning.
const schema = 2

// What a run is.
const (
	statusResult = "result"
	statusNoisy  = "noisy" // too many workloads were
	statusTrial  = "trial" // fewer rounds, systems or workloads, or smaller sizes
)

var errNoisy = errors.New("this run is not a result: too noisy")

// Result is results.json.
type Result struct {
	Schema    int        `json:"schema"`
	Status    string     `json:"status"`
	Date      time.Time  `json:"date"` // of its start
	Seconds   float64    `json:"seconds"`
	Host      Host       `json:"host"`
	Settings  Settings   `json:"settings"`
	Systems   []Shown    `json:"systems"`
	RoundTrip RoundTrip  `json:"round_trip"`
	Workloads []Workload `json:"workloads"`
	Gate      []Figure   `json:"gate,omitempty"`
	Memory    []Memory   `json:"memory"`
}

// Host is where it ran, and with which versions.
type Host struct {
	Kernel   string            `json:"kernel"`
	CPUs     int               `json:"cpus"`
	CPU      string            `json:"cpu"`
	Memory   int64             `json:"memory_bytes"`
	Versions map[string]string `json:"versions"`
}

// Settings are the options that the figures depend on.
type Settings struct {
	FS           string  `json:"fs"`
	Rounds       int     `json:"rounds"`
	Scale        float64 `json:"scale"`
	FioSeconds   float64 `json:"fio_seconds"`
	MaxSpread    float64 `json:"max_spread"`
	LoopDirectIO bool    `json:"loop_direct_io"`
}

// RoundTrip is how long two processes take to wake each other through a pipe, measured beside every batch: less than
// that no request to a daemon takes on this machine. Rested is the same after a millisecond in which the processors may sleep, as
// they do while a disk writes. Seconds.
type RoundTrip struct {
	Samples      []float64 `json:"samples"`
	Median       float64   `json:"median"`
	Spread       float64   `json:"spread"`
	Rested       []float64 `json:"rested"`
	RestedMedian float64   `json:"rested_median"`
	RestedSpread float64   `json:"rested_spread"`
}

// Shown is a system as the report names it.
type Shown struct {
	Name  string `json:"name"`
	Title string `json:"title"`
}

// Workload is what was measured of one workload.
type Workload struct {
	Group       string  `json:"group"`
	Name        string  `json:"name"`
	Title       string  `json:"title"`
	Unit        string  `json:"unit"`
	Note        string  `json:"note,omitempty"`
	Lower       bool    `json:"lower_is_better,omitempty"`
	Noisy       bool    `json:"noisy,omitempty"`
	Serial      bool    `json:"serial,omitempty"`       // one client, which waits for each request
	FirstSpread float64 `json:"first_spread,omitempty"` // if it was measured again
	Cells       []Cell  `json:"systems"`
}

// Cell is one system under one workload. A ratio is to native, and greater is better whatever the unit; 0 stands for not
// known.
type Cell struct {
	System  string    `json:"system"`
	Samples []float64 `json:"samples"` // one of each round
	Median  float64   `json:"median"`
	// Ratios are each round's, to native in the same round: what disturbs the machine for longer than a round disturbs
	// both. Ratio is their median, and Spread theirs; native's is of the samples.
	Ratios []float64 `json:"ratios,omitempty"`
	Ratio  float64   `json:"ratio,omitempty"`
	Spread float64   `json:"spread"`
	// Requests are what the daemon got for one sample, the median. Waited are those of them that somebody waited for, for
	// one sample in seconds, or for one operation where the sample is a rate.
	Requests *float64 `json:"requests,omitempty"`
	Waited   float64  `json:"waited,omitempty"`
	// Bound is the ratio of a daemon that takes no time itself: native, and RoundTrip for each request waited for.
	Bound float64 `json:"bound,omitempty"`
	Error string  `json:"error,omitempty"`
}

// Memory is a daemon in one situation. Sizes are bytes.
type Memory struct {
	System       string  `json:"system"`
	Situation    string  `json:"situation"`
	Volumes      int     `json:"volumes"`
	Inodes       int     `json:"inodes"`        // that the kernel was shown and was not told to forget
	KernelInodes int64   `json:"kernel_inodes"` // FUSE inodes that it had, of all mounts; 0 if it does not say
	RSS          int64   `json:"rss"`
	PSS          int64   `json:"pss"`
	Anonymous    int64   `json:"anonymous"`
	PerInode     float64 `json:"per_inode,omitempty"` // RSS above idle
	Error        string  `json:"error,omitempty"`
}

// Figure is something that is no comparison.
type Figure struct {
	Title string  `json:"title"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Error string  `json:"error,omitempty"`
}

// cell is the system's, or an empty one.
func (w *Workload) cell(system string) Cell {
	for _, c := range w.Cells {
		if c.System == system {
			return c
		}
	}
	return Cell{System: system}
}

// failures is how many figures are missing because of an error.
func (r *Result) failures() int {
	n := 0
	for _, w := range r.Workloads {
		for _, c := range w.Cells {
			if c.Error != "" {
				n++
			}
		}
	}
	for _, f := range r.Gate {
		if f.Error != "" {
			n++
		}
	}
	for _, m := range r.Memory {
		if m.Error != "" {
			n++
		}
	}
	return n
}

// settle computes what follows from the samples.
func (w *Workload) settle(maxSpread float64) {
	base := w.cell(native)
	for i := range w.Cells {
		c := &w.Cells[i]
		c.Median, c.Spread, c.Ratios = median(c.Samples), spread(c.Samples), nil
		if c.System == native || c.Error != "" {
			continue
		}
		for round, sample := range c.Samples {
			c.Ratios = append(c.Ratios, ratio(base.Samples[round], sample, w.Lower))
		}
		c.Ratio, c.Spread = median(c.Ratios), spread(c.Ratios)
	}
	w.Noisy = w.lead().Spread > maxSpread
}

// lead is the system by whose spread a workload is noisy: the first one beside native.
func (w *Workload) lead() Cell {
	for _, c := range w.Cells {
		if c.System != native {
			return c
		}
	}
	return w.cell(native)
}

// bound computes what a round trip of so many seconds leaves of native.
func (w *Workload) bound(roundTrip float64) {
	base := w.cell(native).Median
	for i := range w.Cells {
		c := &w.Cells[i]
		switch {
		case !w.Serial || c.Waited == 0 || base == 0:
		case w.Lower:
			c.Bound = base / (base + c.Waited*roundTrip)
		default:
			c.Bound = 1 / (1 + base*c.Waited*roundTrip)
		}
	}
}

// ratio is 1 for as good as native and less for worse.
func ratio(native, other float64, lower bool) float64 {
	if native == 0 || other == 0 {
		return 0
	}
	if lower {
		return native / other
	}
	return other / native
}

// write keeps the result in dir as JSON, as a table and as a report.
func (r *Result) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	html, err := renderReport(r)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"results.json": append(data, '\n'),
		"table.md":     []byte(r.table()),
		"report.html":  html,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// host describes this machine. versions are commands that print one.
func host(run *runner, versions map[string][]string) Host {
	h := Host{Kernel: kernel(), CPUs: runtime.NumCPU(), Versions: map[string]string{}}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		_, rest, _ := strings.Cut(string(data), "model name")
		line, _, _ := strings.Cut(rest, "\n")
		h.CPU = strings.Trim(line, "\t: ")
	}
	if data, err := os.ReadFile("/proc/meminfo"); err == nil {
		h.Memory = kilobytes(string(data), "MemTotal:")
	}
	for name, argv := range versions {
		out, err := run.quick(argv...)
		if err != nil {
			out = err.Error()
		}
		line, _, _ := strings.Cut(strings.TrimSpace(out), "\n")
		h.Versions[name] = line
	}
	return h
}
