package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// fioJob is one fio workload. The names are fio's.
type fioJob struct {
	rw, bs string
	fsync  bool
	direct bool
}

// sizes are fio's --bs as the report shows them.
var sizes = map[string]string{"4k": "4 KiB", "64k": "64 KiB", "1M": "1 MiB"}

var fioJobs = []fioJob{
	{rw: "read", bs: "1M"}, {rw: "read", bs: "4k"}, {rw: "randread", bs: "4k"},
	{rw: "write", bs: "1M"}, {rw: "write", bs: "64k"}, {rw: "write", bs: "4k"}, {rw: "randwrite", bs: "4k"},
	{rw: "randwrite", bs: "4k", fsync: true},
	{rw: "read", bs: "1M", direct: true}, {rw: "write", bs: "1M", direct: true},
	{rw: "randread", bs: "4k", direct: true}, {rw: "randwrite", bs: "4k", direct: true},
}

func (j fioJob) reads() bool { return strings.HasSuffix(j.rw, "read") }

func (j fioJob) bandwidth() bool { return j.bs != "4k" }

func (j fioJob) metric() metric {
	m := metric{name: "fio-" + j.rw + "-" + strings.ToLower(j.bs)}
	order, what := "sequential", "overwrite"
	m.unit, m.note = "IOPS", "page cache"
	if j.bandwidth() {
		m.unit = "MiB/s"
	}
	if strings.HasPrefix(j.rw, "rand") {
		order = "random"
	}
	if j.reads() {
		what, m.note = "read", "page cache, warm"
	}
	m.title = sizes[j.bs] + " " + order + " " + what
	switch {
	case j.fsync:
		m.name, m.title, m.note, m.serial = m.name+"-fsync", m.title+" + fsync", "to the disk, each", true
	case j.direct:
		m.name, m.title, m.note = m.name+"-direct", m.title+", O_DIRECT", "around the page cache, but what Croft's daemon reads and writes"
	}
	return m
}

// file is what the job works on. O_DIRECT has one of its own, of which nothing is cached.
func (j fioJob) file() string {
	if j.direct {
		return "fio.direct"
	}
	return "fio.cached"
}

func fioBatches(b *bench) []batch {
	var list []batch
	// A multiple of what is written at once.
	size := b.opts.scaled(256, 8) << 20
	runtime := time.Duration(b.opts.fioSeconds() * float64(time.Second))
	for _, j := range fioJobs {
		m := j.metric()
		list = append(list, batch{
			group:   "fio",
			metrics: []metric{m},
			prepare: func(ctx context.Context, s *system) error {
				return b.loop(ctx, s, loop{op: "fill", path: filepath.Join(s.dir, j.file()), size: size}, nil)
			},
			run: func(ctx context.Context, s *system, _ int) (map[string]float64, error) {
				path := filepath.Join(s.dir, j.file())
				if j.reads() && !j.direct {
					if err := b.loop(ctx, s, loop{op: "warm", path: path}, nil); err != nil {
						return nil, err
					}
				}
				// Without the first three a run would begin by dropping caches, by preallocating,
				// or by laying out the file anew: each costs one system more than another.
				argv := []string{"fio", "--invalidate=0", "--fallocate=none", "--overwrite=1",
					"--name=" + m.name, "--ioengine=psync", "--filename=" + path, fmt.Sprint("--size=", size),
					"--rw=" + j.rw, "--bs=" + j.bs, "--randrepeat=1", "--time_based", fmt.Sprintf("--runtime=%dms", runtime.Milliseconds()),
					"--output-format=json"}
				if j.fsync {
					argv = append(argv, "--fsync=1")
				}
				if j.direct {
					argv = append(argv, "--direct=1")
				}
				out, err := b.run.output(ctx, argv...)
				if err != nil {
					return nil, err
				}
				value, err := parseFio([]byte(out), j.bandwidth())
				return map[string]float64{m.name: value}, err
			},
		})
	}
	return append(list, b.appends())
}

// appends writes a new file by O_APPEND, which allocates as it goes.
func (b *bench) appends() batch {
	m := metric{name: "append-4k", title: "4 KiB append to a new file, O_APPEND", unit: "IOPS", note: "page cache"}
	return batch{
		group:   "fio",
		metrics: []metric{m},
		prepare: func(context.Context, *system) error { return nil },
		run: func(ctx context.Context, s *system, _ int) (map[string]float64, error) {
			var r loopResult
			err := b.loop(ctx, s, loop{op: "append", path: filepath.Join(s.dir, "appended"), size: b.opts.scaled(256, 8) << 20}, &r)
			return map[string]float64{m.name: r.rate()}, err
		},
	}
}

// parseFio takes the figure of the only job from fio's JSON: MiB/s or IOPS. What comes
// before the JSON are fio's remarks.
func parseFio(out []byte, bandwidth bool) (float64, error) {
	if i := strings.IndexByte(string(out), '{'); i > 0 {
		out = out[i:]
	}
	type side struct {
		Bytes   float64 `json:"bw_bytes"`
		IOPS    float64 `json:"iops"`
		Runtime float64 `json:"runtime"`
	}
	var report struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return 0, fmt.Errorf("fio's output: %w", err)
	}
	if len(report.Jobs) != 1 {
		return 0, fmt.Errorf("fio's output has %d jobs", len(report.Jobs))
	}
	job := report.Jobs[0]
	if job.Error != 0 {
		return 0, fmt.Errorf("fio: error %d", job.Error)
	}
	value := job.Read.IOPS + job.Write.IOPS
	if bandwidth {
		value = (job.Read.Bytes + job.Write.Bytes) / (1 << 20)
	}
	if value == 0 {
		return 0, fmt.Errorf("fio reports no figure")
	}
	return value, nil
}
