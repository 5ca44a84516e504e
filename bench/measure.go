package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// runTimeout is for one run of one workload on one system.
const runTimeout = 5 * time.Minute

// metric is what the report calls a workload. Its name is unique.
type metric struct {
	name, title, unit, note string
	lower                   bool // less is better
	serial                  bool // one client, which waits for each request: Workload.Serial
}

// batch measures one or more metrics in one go on one system.
type batch struct {
	group   string
	metrics []metric
	// prepare is called once for each system, and gives each the same data.
	prepare func(ctx context.Context, s *system) error
	// run measures; n is unique among the calls on this system. It returns a value for
	// each metric, by name.
	run func(ctx context.Context, s *system, n int) (map[string]float64, error)
}

// bench is one run.
type bench struct {
	opts    *options
	run     *runner
	clean   cleanup
	dir     string // temporary; all is below it
	image   string // where the image is mounted
	systems []*system
	result  *Result
	again   time.Duration // spent on measuring noisy workloads again
}

// measure is the command: it measures everything and writes the report.
func measure(ctx context.Context, o *options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("run as root: it mounts")
	}
	for _, program := range []string{o.croft, o.loopback} {
		if _, err := os.Stat(program); err != nil {
			return fmt.Errorf("%w: make bench builds it", err)
		}
	}
	b := &bench{opts: o}
	defer func() {
		if cleanErr := b.clean.run(); cleanErr != nil {
			err = errors.Join(err, cleanErr)
		}
	}()
	if err := b.setUp(ctx); err != nil {
		return err
	}
	if err := b.measureAll(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return b.finish()
}

func (b *bench) setUp(ctx context.Context) (err error) {
	if b.dir, err = os.MkdirTemp(b.opts.dir, "croft-bench-"); err != nil {
		return err
	}
	b.clean.add(func() error { // --one-file-system: should a mount still be there
		_, err := (&runner{env: os.Environ()}).quick("rm", "-rf", "--one-file-system", b.dir)
		return err
	})
	if err := os.Chmod(b.dir, 0o755); err != nil { // PostgreSQL is not root
		return err
	}
	b.run = &runner{env: environment(b.dir)}
	if err := os.Mkdir(filepath.Join(b.dir, "run"), 0o700); err != nil {
		return err
	}
	b.result = &Result{
		Schema: schema,
		Date:   time.Now().UTC().Truncate(time.Second),
		Host: host(b.run, map[string][]string{
			"croft":      {b.opts.croft, "version"},
			"bindfs":     {"bindfs", "--version"},
			"fio":        {"fio", "--version"},
			"git":        {"git", "--version"},
			"sqlite":     {"sqlite3", "--version"},
			"postgresql": {"psql", "--version"},
		}),
		Settings: Settings{
			FS: b.opts.fs, Rounds: b.opts.rounds, Scale: b.opts.scale, FioSeconds: b.opts.fioTime.Seconds(),
			MaxSpread: b.opts.maxSpread, LoopDirectIO: b.opts.directIO,
		},
	}
	b.result.Host.Versions["go-fuse"] = goFuseVersion(b.opts.loopback)
	b.say("a %s image below %s", b.opts.fs, b.dir)
	if b.image, err = makeImage(ctx, b.run, &b.clean, b.opts, b.dir); err != nil {
		return err
	}
	if err := b.startSystems(ctx); err != nil {
		return err
	}
	for _, s := range b.systems {
		b.result.Systems = append(b.result.Systems, Shown{s.name, s.title})
	}
	return nil
}

func (b *bench) measureAll(ctx context.Context) error {
	for _, kind := range []func(*bench) []batch{fioBatches, metadataBatches, jobBatches, gateBatches} {
		for _, t := range kind(b) {
			workloads, err := b.measureBatch(ctx, t)
			if err != nil {
				return err
			}
			b.result.Workloads = append(b.result.Workloads, workloads...)
		}
	}
	if err := b.measureGate(ctx); err != nil {
		return err
	}
	return b.measureMemory(ctx)
}

// measureBatch measures those metrics of a batch that are wanted, a second time if native
// was noisy. It fails only if native does.
func (b *bench) measureBatch(ctx context.Context, t batch) ([]Workload, error) {
	var workloads []Workload
	for _, m := range t.metrics {
		if b.opts.match.MatchString(m.name) {
			workloads = append(workloads, Workload{Group: t.group, Name: m.name, Title: m.title, Unit: m.unit, Note: m.note, Lower: m.lower, Serial: m.serial})
		}
	}
	if len(workloads) == 0 {
		return nil, nil
	}
	for _, s := range b.systems {
		if err := b.attempt(ctx, s, func(ctx context.Context) error { return t.prepare(ctx, s) }); err != nil {
			if s.name == native || ctx.Err() != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			b.say("%s: %v", s.name, err)
		}
	}
	start := time.Now()
	if err := b.rounds(ctx, t, workloads, b.opts.rounds, 0); err != nil {
		return nil, err
	}
	noisy := false
	for i := range workloads {
		workloads[i].settle(b.opts.maxSpread)
		noisy = noisy || workloads[i].Noisy
	}
	if noisy && b.opts.rounds >= 3 {
		if err := b.measureAgain(ctx, t, workloads, time.Since(start)); err != nil {
			return nil, err
		}
	}
	for _, w := range workloads {
		b.say("%s", progress(w))
	}
	return workloads, nil
}

// measureAgain replaces the noisy ones of workloads, if there is time for it; took is how
// long they took the first time.
func (b *bench) measureAgain(ctx context.Context, t batch, workloads []Workload, took time.Duration) error {
	rounds := moreRounds(b.opts.rounds)
	noise := strings.TrimRight(describeNoise(workloads), "\n")
	took = took * time.Duration(rounds) / time.Duration(b.opts.rounds)
	if b.again+took > b.opts.againTime {
		b.say("noisy, and no time left to measure it again:\n%s", noise)
		return nil
	}
	b.again += took
	b.say("noisy, measured again:\n%s", noise)
	second := make([]Workload, len(workloads))
	for i, w := range workloads {
		w.Cells, w.FirstSpread = nil, w.lead().Spread
		second[i] = w
	}
	if err := b.rounds(ctx, t, second, rounds, b.opts.rounds); err != nil {
		return err
	}
	for i := range workloads {
		second[i].settle(b.opts.maxSpread)
		if workloads[i].Noisy {
			workloads[i] = second[i]
		}
	}
	return nil
}

// rounds runs a batch interleaved: each round runs it on each system, in another order.
func (b *bench) rounds(ctx context.Context, t batch, workloads []Workload, rounds, first int) error {
	for i := range workloads {
		for _, s := range b.systems {
			workloads[i].Cells = append(workloads[i].Cells, Cell{System: s.name})
		}
	}
	took := map[string][]requests{} // by system
	for round := range rounds {
		if err := b.roundTrip(ctx); err != nil {
			return err
		}
		for _, s := range rotated(b.systems, round) {
			if s.once && round > 0 {
				continue
			}
			var values map[string]float64
			before := s.requestsSoFar(ctx)
			err := b.attempt(ctx, s, func(ctx context.Context) (err error) {
				values, err = t.run(ctx, s, first+round)
				return err
			})
			if err != nil && (s.name == native || ctx.Err() != nil) {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if after := s.requestsSoFar(ctx); after.all > 0 {
				took[s.name] = append(took[s.name], requests{after.all - before.all, after.waited - before.waited})
			}
			for i := range workloads {
				for j := range workloads[i].Cells {
					c := &workloads[i].Cells[j]
					switch value, ok := values[workloads[i].Name]; {
					case c.System != s.name:
					case err != nil:
						c.Error = err.Error()
					case ok:
						c.Samples = append(c.Samples, value)
					}
				}
			}
			if err := syncFS(b.image); err != nil {
				return err
			}
		}
	}
	if len(t.metrics) == 1 { // else the requests are of several
		workloads[0].count(took, b.opts.fioSeconds())
	}
	return nil
}

// count notes what requests each sample took; a rate's was measured for so many seconds.
func (w *Workload) count(took map[string][]requests, seconds float64) {
	for i := range w.Cells {
		c := &w.Cells[i]
		counts := took[c.System]
		if len(counts) == 0 || len(counts) != len(c.Samples) {
			continue
		}
		var all, waited []float64
		for j, n := range counts {
			if !w.Lower {
				n.waited /= c.Samples[j] * seconds
			}
			all, waited = append(all, n.all), append(waited, n.waited)
		}
		if w.Lower { // otherwise their number is the time's
			m := median(all)
			c.Requests = &m
		}
		if w.Serial {
			c.Waited = median(waited)
		}
	}
}

// roundTrip takes a sample of Result.RoundTrip.
func (b *bench) roundTrip(ctx context.Context) error {
	var r loopResult
	err := b.loop(ctx, b.systems[0], loop{op: "pipe", path: b.dir, atLeast: 50 * time.Millisecond}, &r)
	if err == nil {
		t := &b.result.RoundTrip
		t.Samples, t.Rested = append(t.Samples, 1/r.rate()), append(t.Rested, r.Values["rested"])
	}
	return err
}

// attempt does something on a system, unless that is lost. A system that does not answer
// in time is lost.
func (b *bench) attempt(ctx context.Context, s *system, do func(context.Context) error) error {
	if s.lost == nil && s.daemon != nil && s.daemon.ended() {
		s.lost = fmt.Errorf("its daemon has ended: %s", s.daemon.said())
	}
	if s.lost != nil {
		return s.lost
	}
	ctx, cancel := context.WithTimeoutCause(ctx, runTimeout, fmt.Errorf("no end after %v", runTimeout))
	defer cancel()
	release := s.guard(ctx)
	defer release()
	return do(ctx)
}

// finish says what the run is, and writes it.
func (b *bench) finish() error {
	r := b.result
	r.Seconds = time.Since(r.Date).Round(time.Second).Seconds()
	t := &r.RoundTrip
	t.Median, t.Spread, t.RestedMedian, t.RestedSpread = median(t.Samples), spread(t.Samples), median(t.Rested), spread(t.Rested)
	for i := range r.Workloads {
		r.Workloads[i].bound(t.Median)
	}
	failures := r.failures()
	switch {
	case !b.opts.complete() || failures > 0:
		r.Status = statusTrial
	case tooNoisy(r.Workloads):
		r.Status = statusNoisy
	default:
		r.Status = statusResult
	}
	dir := b.opts.outDir(r.Status)
	if err := r.write(dir); err != nil {
		return err
	}
	fmt.Print(r.table())
	b.say("\n%s: %s", r.Status, filepath.Join(dir, "report.html"))
	if noise := describeNoise(r.Workloads); noise != "" {
		b.say("noisy, by the spread of %s's ratios, which may be %.0f%%:\n%s", r.Workloads[0].lead().System, 100*b.opts.maxSpread, strings.TrimRight(noise, "\n"))
	}
	if failures > 0 {
		return fmt.Errorf("%d figures are missing: something failed, see the report", failures)
	}
	if r.Status == statusNoisy {
		return fmt.Errorf("%w: %d of %d workloads; see the spreads above", errNoisy, len(noisyOnes(r.Workloads)), len(r.Workloads))
	}
	return nil
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// progress is a workload in one line.
func progress(w Workload) string {
	var s strings.Builder
	base := w.cell(native)
	fmt.Fprintf(&s, "%-22s native %12s %-10s ±%3.0f%%", w.Name, figure(base.Median), w.Unit, 100*base.Spread)
	for _, c := range w.Cells {
		switch {
		case c.System == native:
		case c.Error != "":
			fmt.Fprintf(&s, "  %s failed: %s", c.System, c.Error)
		default:
			fmt.Fprintf(&s, "  %s %.2f", c.System, c.Ratio)
		}
	}
	return s.String()
}
