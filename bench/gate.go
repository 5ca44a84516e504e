package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	limitedName = "limited"
	limitedSize = 1 << 30
	// littleRoom is less than the tier gate needs to leave a volume alone, amongRoom is
	// just enough.
	littleRoom = 32 << 20
	amongRoom  = 100 << 20
	// openedSize is the file's that is written while there is little room.
	openedSize = 16 << 20
	// sampledFiles are open for writing at once.
	sampledFiles = 1000
	sampledFor   = 3 * time.Second
)

// limitedVolume is the arguments by which the volume is created that is filled.
var limitedVolume = []string{limitedName, fmt.Sprint("--size=", limitedSize>>20, "Mi")}

// limited is the directory of the system that is filled. It is a volume where there are
// volumes, and an ordinary directory elsewhere.
func (s *system) limited() string {
	if s.pool == "" {
		return filepath.Join(s.dir, limitedName)
	}
	return filepath.Join(filepath.Dir(s.dir), limitedName)
}

// gateBatches measure what a held system call costs.
func gateBatches(b *bench) []batch {
	held := func(what string) metric {
		return metric{name: "gated-" + what, unit: "µs", lower: true, title: "4 KiB " + what + " of a file that was open before",
			note: "after another file left 32 MiB of the volume's 1 GiB"}
	}
	return []batch{{
		group:   "gate",
		metrics: []metric{held("overwrite"), held("read")},
		prepare: func(context.Context, *system) error { return nil },
		run: func(ctx context.Context, s *system, _ int) (map[string]float64, error) {
			var r loopResult
			err := b.loop(ctx, s, loop{op: "gated", path: s.limited(), size: limitedSize - littleRoom, atLeast: repeatFor}, &r)
			return r.Values, err
		},
	}}
}

// measureGate measures what a volume with little room costs beside held calls.
func (b *bench) measureGate(ctx context.Context) error {
	if !b.opts.match.MatchString("gate") {
		return nil
	}
	for _, s := range b.systems {
		if s.name != "croft-gate" {
			continue
		}
		for _, measure := range []func(context.Context, *system) ([]Figure, error){b.fillUp, b.samplerCPU} {
			var figures []Figure
			err := b.attempt(ctx, s, func(ctx context.Context) (err error) {
				figures, err = measure(ctx, s)
				return err
			})
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				b.say("gate: %v", err)
				figures = append(figures, Figure{Title: "not measured", Error: err.Error()})
			}
			for _, f := range figures {
				b.say("gate: %-70s %s %s", f.Title, figure(f.Value), f.Unit)
			}
			b.result.Gate = append(b.result.Gate, figures...)
		}
	}
	return nil
}

// fillUp measures for how long a volume is gated that is filled and emptied.
func (b *bench) fillUp(ctx context.Context, s *system) ([]Figure, error) {
	ask, err := b.asksGated(s)
	if err != nil {
		return nil, err
	}
	watched, stop := context.WithCancel(ctx)
	defer stop()
	type look struct {
		at    float64 // Unix time, seconds
		gated bool
	}
	seen := make(chan []look, 1)
	go func() {
		var looks []look
		for watched.Err() == nil {
			if gated, err := ask(watched); err == nil {
				looks = append(looks, look{unixNow(), gated})
			}
			time.Sleep(2 * time.Millisecond)
		}
		seen <- looks
	}()
	var r loopResult
	if err := b.loop(ctx, s, loop{op: "fillup", path: s.limited()}, &r); err != nil {
		return nil, err
	}
	stop()
	looks, gated, after := <-seen, 0.0, -1.0
	for i := 1; i < len(looks); i++ {
		from, to := max(looks[i-1].at, r.Values["start"]), min(looks[i].at, r.Values["full"])
		if looks[i-1].gated && to > from {
			gated += to - from
		}
		if !looks[i].gated && after < 0 && looks[i].at > r.Values["removed"] {
			after = looks[i].at - r.Values["removed"]
		}
	}
	if after < 0 {
		return nil, errors.New("the volume had room again, and was still gated")
	}
	return []Figure{
		{Title: "A volume of 1 GiB is written full, 1 MiB at a time", Value: 1e3 * (r.Values["full"] - r.Values["start"]), Unit: "ms"},
		{Title: "of which it is gated", Value: 1e3 * gated, Unit: "ms"},
		{Title: "and after the file was removed, another being open", Value: 1e3 * after, Unit: "ms"},
	}, nil
}

// samplerCPU measures what the daemon does while files are open for writing and nobody
// writes.
func (b *bench) samplerCPU(ctx context.Context, s *system) (figures []Figure, err error) {
	const roomy = "roomy"
	if _, err := b.run.output(ctx, b.opts.croft, "volume", "create", "--pool", s.pool, "--size=10Gi", roomy); err != nil {
		return nil, err
	}
	for _, test := range []struct {
		title, dir string
		fill       int
	}{
		{"10 GiB of room", filepath.Join(filepath.Dir(s.dir), roomy), 0},
		{"100 MiB of room", s.limited(), limitedSize - amongRoom},
		{"32 MiB of room, gated", s.limited(), limitedSize - littleRoom},
	} {
		var r loopResult
		err := b.loop(ctx, s, loop{
			op: "hold", path: test.dir, size: test.fill, files: b.opts.scaled(sampledFiles, 100), pid: s.daemon.pid(),
			atLeast: max(time.Duration(float64(sampledFor)*b.opts.scale), 500*time.Millisecond),
		}, &r)
		if err != nil {
			return figures, err
		}
		figures = append(figures, Figure{Title: fmt.Sprintf("%d files open for writing, %s: the daemon's share of a processor", r.Operations, test.title),
			Value: 100 * r.Values["cpu"], Unit: "%"})
	}
	return figures, nil
}

// asksGated returns a function that asks the system's daemon whether the limited volume
// is gated. Starting a command for that would take longer than it is.
func (b *bench) asksGated(s *system) (func(context.Context) (bool, error), error) {
	var pool struct{ ID string }
	data, err := os.ReadFile(filepath.Join(s.pool, "pool.json"))
	if err == nil {
		err = json.Unmarshal(data, &pool)
	}
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(b.dir, "run", pool.ID+".sock")
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	return func(ctx context.Context) (bool, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://croft/v1/volumes/"+limitedName, nil)
		if err != nil {
			return false, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		var v struct{ Gated bool }
		err = json.NewDecoder(resp.Body).Decode(&v)
		return v.Gated, err
	}, nil
}

// write writes a new file of size bytes, 1 MiB at a time, and closes it.
func write(path string, size int) error {
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for size > 0 {
		n, err := unix.Write(fd, block[:min(size, len(block))])
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("%s: %w", path, err)
		}
		size -= n
	}
	return unix.Close(fd)
}

// gated has a file open while another leaves little room, then overwrites and reads it.
// Its values are microseconds a call.
func (l loop) gated() (r loopResult, err error) {
	if err := os.MkdirAll(l.path, 0o755); err != nil {
		return r, err
	}
	opened, filler := filepath.Join(l.path, "opened"), filepath.Join(l.path, "filler")
	defer func() {
		for _, path := range []string{opened, filler} {
			if removeErr := os.Remove(path); removeErr != nil && !errors.Is(removeErr, os.ErrNotExist) {
				err = errors.Join(err, removeErr)
			}
		}
	}()
	if err := write(opened, openedSize); err != nil {
		return r, err
	}
	fd, err := unix.Open(opened, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return r, err
	}
	defer unix.Close(fd)
	if err := write(filler, l.size-openedSize); err != nil {
		return r, err
	}
	page, order := make([]byte, 4096), rand.New(rand.NewPCG(1, 2))
	r.Values = make(map[string]float64)
	for _, call := range []struct {
		name string
		do   func(int, []byte, int64) (int, error)
	}{{"gated-overwrite", unix.Pwrite}, {"gated-read", unix.Pread}} {
		n, start := 0, time.Now()
		for ; n%100 != 0 || time.Since(start) < l.atLeast; n++ {
			if _, err := call.do(fd, page, 4096*order.Int64N(openedSize/4096)); err != nil {
				return r, fmt.Errorf("%s: %w", call.name, err)
			}
		}
		r.Values[call.name] = 1e6 * time.Since(start).Seconds() / float64(n)
	}
	return r, nil
}

// fillup writes until there is no space, stays so a moment, and removes what it wrote, while
// another file is open for writing. Its values are Unix times.
func (l loop) fillup() (r loopResult, err error) {
	path, opened := filepath.Join(l.path, "filler"), filepath.Join(l.path, "opened")
	fd, err := unix.Open(opened, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd), os.Remove(opened)) }()
	time.Sleep(200 * time.Millisecond) // an earlier run's gate is gone
	r.Values = map[string]float64{"start": unixNow()}
	err = write(path, 1<<62)
	if !errors.Is(err, unix.ENOSPC) {
		return r, fmt.Errorf("filled until: %w", err)
	}
	r.Values["full"] = unixNow()
	time.Sleep(100 * time.Millisecond)
	if err := os.Remove(path); err != nil {
		return r, err
	}
	r.Values["removed"] = unixNow()
	time.Sleep(time.Second)
	return r, nil
}

// unixNow is the time in seconds.
func unixNow() float64 { return float64(time.Now().UnixNano()) / 1e9 }

// hold has files open for writing that nobody writes, beside a file of l.size bytes, and
// measures what share of a processor the process l.pid takes.
func (l loop) hold() (r loopResult, err error) {
	var paths []string
	defer func() {
		for _, path := range paths {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	if l.size > 0 {
		path := filepath.Join(l.path, "filler")
		if err := write(path, l.size-4096*l.files); err != nil {
			return r, errors.Join(err, os.Remove(path))
		}
		paths = append(paths, path)
	}
	for i := range l.files {
		path := filepath.Join(l.path, fmt.Sprint("held", i))
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return r, err
		}
		defer unix.Close(fd)
		paths = append(paths, path)
		if _, err := unix.Write(fd, make([]byte, 4096)); err != nil {
			return r, err
		}
	}
	time.Sleep(500 * time.Millisecond) // what opening them has caused is over
	before, err := cpuTime(l.pid)
	if err != nil {
		return r, err
	}
	start := time.Now()
	time.Sleep(l.atLeast)
	after, err := cpuTime(l.pid)
	if err != nil {
		return r, err
	}
	r.Operations, r.Seconds = l.files, time.Since(start).Seconds()
	r.Values = map[string]float64{"cpu": (after - before).Seconds() / r.Seconds}
	return r, nil
}

// cpuTime is utime and stime of /proc/PID/stat.
func cpuTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, the name in parentheses, may have anything in it; utime is the 14th.
	f := strings.Fields(string(data)[strings.LastIndexByte(string(data), ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(f))
	}
	const tick = time.Second / 100 // USER_HZ
	utime, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	stime, err := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(utime+stime) * tick, err
}
