package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

var errUsage = errors.New("usage")

// options are the flags. validate fills in what depends on others.
type options struct {
	fs        string
	rounds    int
	only      string
	systems   []string
	scale     float64
	out       string
	dir       string
	croft     string
	loopback  string
	fioTime   time.Duration
	maxSpread float64
	againTime time.Duration
	directIO  bool

	match *regexp.Regexp
}

func (o *options) register(f *pflag.FlagSet) {
	f.StringVar(&o.fs, "fs", "ext4", "filesystem of the image: "+strings.Join(filesystems, ", "))
	f.IntVar(&o.rounds, "rounds", 5, "how often each workload is run on each system; fewer than 3 make a trial")
	f.StringVar(&o.only, "only", "", "only the workloads whose name this regular expression matches")
	f.StringSliceVar(&o.systems, "systems", nil, "only these systems, and native (default: "+strings.Join(systemNames(), ",")+")")
	f.Float64Var(&o.scale, "scale", 1, "fraction of the sizes and times, for a quick trial")
	f.StringVar(&o.out, "out", "", "directory of the report (default bench/results/KERNEL-FS, with -trial or -noisy if it is no result)")
	f.StringVar(&o.dir, "dir", "/var/tmp", "where the image is made; a disk, not a tmpfs")
	f.StringVar(&o.croft, "croft", "bin/croft", "the croft binary")
	f.StringVar(&o.loopback, "loopback", "bin/loopback", "go-fuse's example program")
	f.DurationVar(&o.fioTime, "fio-time", 1200*time.Millisecond, "how long one fio run lasts")
	f.Float64Var(&o.maxSpread, "max-spread", 0.25, "a workload is noisy if (max-min)/median of the first tier's ratios is above this")
	f.DurationVar(&o.againTime, "again-time", 5*time.Minute, "how long noisy workloads may be measured again, altogether")
	f.BoolVar(&o.directIO, "loop-direct-io", false, "the loop device goes around the page cache of the disk below it")
}

// validate reports every fault at once.
func (o *options) validate() error {
	var faults []error
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf("%w: "+format, append([]any{errUsage}, args...)...))
	}
	if !slices.Contains(filesystems, o.fs) {
		fault("--fs %s: it is one of %s", o.fs, strings.Join(filesystems, ", "))
	}
	if o.rounds < 1 {
		fault("--rounds %d: it must be at least 1", o.rounds)
	}
	if o.scale <= 0 || o.scale > 1 {
		fault("--scale %g: it must be more than 0 and at most 1", o.scale)
	}
	for _, name := range o.systems {
		if !slices.Contains(systemNames(), name) {
			fault("--systems %s: there are %s", name, strings.Join(systemNames(), ", "))
		}
	}
	var err error
	if o.match, err = regexp.Compile(o.only); err != nil {
		fault("--only: %v", err)
	}
	for _, path := range []*string{&o.dir, &o.croft, &o.loopback} {
		if *path, err = filepath.Abs(*path); err != nil {
			faults = append(faults, err)
		}
	}
	return errors.Join(faults...)
}

// wants tells whether the system is to be measured. Native always is: it is what the
// others are compared with.
func (o *options) wants(system string) bool {
	return system == native || len(o.systems) == 0 || slices.Contains(o.systems, system)
}

// complete tells whether the run can be a result, not only a trial.
func (o *options) complete() bool {
	return o.rounds >= 3 && o.scale == 1 && o.only == "" && len(o.systems) == 0
}

// scaled is n times the scale, and at least least.
func (o *options) scaled(n, least int) int { return max(least, int(float64(n)*o.scale)) }

// fioSeconds is how long a fio run lasts.
func (o *options) fioSeconds() float64 { return max(o.fioTime.Seconds()*o.scale, 0.2) }

// outDir is where a run that ended with status is kept.
func (o *options) outDir(status string) string {
	dir := o.out
	if dir == "" {
		dir = filepath.Join("bench", "results", kernel()+"-"+o.fs)
	}
	if status != statusResult {
		dir += "-" + status
	}
	return dir
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
