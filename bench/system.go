package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const native = "native"

// tiers are Croft's, with what each means, the one that leads the report first. One
// more is one more line.
var tiers = []struct {
	name, title string
	once        bool // is system.once
}{
	{"gate", "reads and writes go to the disk in the kernel; writes are held where room is short", false},
	{"read", "reads go to the disk in the kernel", false},
	{"daemon", "all data through the daemon", true},
}

// system is a way to reach a directory of the image.
type system struct {
	name, title string
	dir         string  // where workloads work
	daemon      *daemon // nil for native
	pool        string  // Croft's
	once        bool    // it is measured in the first round only, for want of time
	lost        error   // why it cannot be measured any more
	// requests is how many FUSE requests its daemon has had; nil if that cannot be known.
	requests func(context.Context) (requests, error)
}

// requests is how many FUSE requests there were, and how many of them somebody waited for.
type requests struct{ all, waited float64 }

// unwaited are those that get no reply, or one that nobody waits for (the release of a file: fs/fuse/file.c,
// fuse_file_put).
var unwaited = []string{"FORGET", "BATCH_FORGET", "RELEASE", "RELEASEDIR", "INTERRUPT"}

// requestsSoFar is zero if it cannot be known.
func (s *system) requestsSoFar(ctx context.Context) requests {
	if s.requests == nil || s.lost != nil {
		return requests{}
	}
	n, err := s.requests(ctx)
	if err != nil {
		return requests{}
	}
	return n
}

// maker makes a system of an empty directory of the image, to be mounted at mnt.
type maker struct {
	name, title string
	start       func(ctx context.Context, b *bench, backing, mnt string) (*system, error)
}

// makers are all systems, in the order of the report.
func makers() []maker {
	list := []maker{{native, "the directory itself", func(_ context.Context, _ *bench, backing, _ string) (*system, error) {
		return &system{dir: backing}, nil
	}}}
	for _, t := range tiers {
		list = append(list, croft("croft-"+t.name, "Croft, tier "+t.name+": "+t.title, t.name, t.once))
	}
	return append(list, []maker{
		croft("croft-kept", "Croft, tier "+tiers[0].name+", with a keeper: what the next daemon needs is written down as it happens", tiers[0].name,
			false, "--keeper=auto"),
		{"loopback", "go-fuse's example program", func(_ context.Context, b *bench, backing, mnt string) (*system, error) {
			return b.mountedBy("loopback", mnt, b.opts.loopback, "-q", "-allow-other", "-directmount", mnt, backing)
		}},
		// Unless told otherwise, libfuse 2 writes in pieces of 4 KiB and drops what is cached of
		// a file when that is opened. O_DIRECT is forwarded, or
		// its writes would only reach the page cache.
		{"bindfs", "libfuse's directory mirror", func(_ context.Context, b *bench, backing, mnt string) (*system, error) {
			return b.mountedBy("bindfs", mnt, "bindfs", "-f", "--multithreaded", "-o", "big_writes,auto_cache", "--forward-odirect=4096", backing, mnt)
		}},
	}...)
}

// croft makes Croft in a tier, with further flags of `croft mount`.
func croft(name, title, tier string, once bool, flags ...string) maker {
	return maker{name, title, func(ctx context.Context, b *bench, backing, mnt string) (*system, error) {
		pool := filepath.Join(backing, "pool")
		if err := b.makePool(ctx, pool, volumeOf("bench", 4_000_000), limitedVolume); err != nil {
			return nil, err
		}
		// The record that a volume is clean is written long after its last change: not
		// while another system is measured.
		s, err := b.mountPool(name, tier, pool, mnt, append(flags, "--idle-after=1h")...)
		if err != nil {
			return nil, err
		}
		s.pool, s.once, s.dir = pool, once, filepath.Join(mnt, "bench")
		s.requests = func(ctx context.Context) (requests, error) { return b.requests(ctx, pool) }
		return s, nil
	}}
}

func systemNames() []string {
	var names []string
	for _, m := range makers() {
		names = append(names, m.name)
	}
	return names
}

// startSystems starts those that are wanted.
func (b *bench) startSystems(ctx context.Context) error {
	for _, m := range makers() {
		if !b.opts.wants(m.name) {
			continue
		}
		backing, mnt, err := b.places(m.name)
		if err != nil {
			return err
		}
		s, err := m.start(ctx, b, backing, mnt)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		s.name, s.title = m.name, m.title
		b.systems = append(b.systems, s)
	}
	return nil
}

// places makes a directory of the image, and one to mount it at.
func (b *bench) places(name string) (backing, mnt string, err error) {
	backing, mnt = filepath.Join(b.image, name), filepath.Join(b.dir, name)
	for _, dir := range []string{backing, mnt} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", "", err
		}
	}
	return backing, mnt, nil
}

// volumeOf is the arguments by which a volume is created. It has more room than is ever
// written: the tier gate is native only while some gigabytes are left.
func volumeOf(name string, inodes int) []string {
	return []string{name, "--size=30Gi", fmt.Sprint("--inodes=", inodes)}
}

func (b *bench) makePool(ctx context.Context, pool string, volumes ...[]string) error {
	if _, err := b.run.output(ctx, b.opts.croft, "pool", "init", pool); err != nil {
		return err
	}
	for _, v := range volumes {
		argv := append([]string{b.opts.croft, "volume", "create", "--pool", pool}, v...)
		if _, err := b.run.output(ctx, argv...); err != nil {
			return err
		}
	}
	return nil
}

// requests is how many FUSE requests the pool's daemon has had.
func (b *bench) requests(ctx context.Context, pool string) (requests, error) {
	out, err := b.run.output(ctx, b.opts.croft, "requests", "--pool", pool, "-o", "json")
	if err != nil {
		return requests{}, err
	}
	var counts struct {
		Total    float64            `json:"total"`
		Requests map[string]float64 `json:"requests"`
	}
	err = json.Unmarshal([]byte(out), &counts)
	n := requests{counts.Total, counts.Total}
	for _, name := range unwaited {
		n.waited -= counts.Requests[name]
	}
	return n, err
}

func (b *bench) mountPool(log, tier, pool, mnt string, flags ...string) (*system, error) {
	argv := append([]string{b.opts.croft, "mount", "--keeper", "none", "--pool", pool, "--tier", tier, mnt}, flags...)
	return b.mountedBy(log, mnt, argv...)
}

// mountedBy starts a program that serves mnt in the foreground, and waits until it does.
func (b *bench) mountedBy(name, mnt string, argv ...string) (*system, error) {
	d, err := b.run.start(filepath.Join(b.dir, name+".log"), argv...)
	if err != nil {
		return nil, err
	}
	s := &system{dir: mnt, daemon: d}
	b.clean.add(func() error { return s.stop(mnt) })
	var parent unix.Stat_t
	if err := unix.Lstat(filepath.Dir(mnt), &parent); err != nil {
		return nil, err
	}
	for range 200 {
		var st unix.Stat_t
		if err := unix.Lstat(mnt, &st); err == nil && st.Dev != parent.Dev {
			return s, nil
		}
		if d.ended() {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, fmt.Errorf("%s did not mount: %s", argv[0], d.said())
}

// stop may be called again.
func (s *system) stop(mnt string) error {
	if s.daemon.ended() && s.lost == nil {
		s.lost = fmt.Errorf("its daemon is gone: %s", s.daemon.said())
	}
	err := unmount(mnt)
	if waitErr := s.daemon.wait(10 * time.Second); err == nil {
		err = waitErr
	}
	return err
}

// guard kills the system's daemon when ctx is over and what runs on its mount has not
// ended a little later: a process that waits for a FUSE request cannot be killed.
func (s *system) guard(ctx context.Context) (release func()) {
	if s.daemon == nil {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		select {
		case <-done:
			return
		case <-ctx.Done():
		}
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			s.daemon.kill()
		}
	}()
	return func() { close(done) }
}

// rotated is the systems in the order of a round: each comes first, and after each other,
// equally often.
func rotated(systems []*system, round int) []*system {
	n := round % len(systems)
	return slices.Concat(systems[n:], systems[:n])
}

// environment of all that the bench starts. It does not depend on who starts it.
func environment(dir string) []string {
	env := []string{"HOME=" + dir, "TMPDIR=" + dir, "CROFT_RUN_DIR=" + filepath.Join(dir, "run"),
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "LC_ALL=C"}
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if !slices.Contains(filepath.SplitList(path), dir) {
			path = strings.Join([]string{path, dir}, ":")
		}
	}
	return append(env, "PATH="+path)
}
