package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Situations of the daemon's memory.
const (
	idleSituation = "idle, 1 volume"
	manyVolumes   = "1,000 volumes"
	knownInodes   = "100,000 known inodes"
	millionFiles  = "a million files"
	forgotten     = "after the kernel forgot them"
)

// measureMemory measures Croft's daemon, of the first of its systems that is wanted: a
// tier makes no difference to what a known inode takes. Pools and volumes are its own.
func (b *bench) measureMemory(ctx context.Context) error {
	if !b.opts.match.MatchString("memory") {
		return nil
	}
	for _, t := range tiers {
		if name := "croft-" + t.name; b.opts.wants(name) {
			if err := b.memoryOf(ctx, name, t.name); err != nil {
				if ctx.Err() != nil {
					return err
				}
				b.say("memory: %v", err)
				b.result.Memory = append(b.result.Memory, Memory{System: name, Situation: "not measured", Error: err.Error()})
			}
			return nil
		}
	}
	return nil
}

func (b *bench) memoryOf(ctx context.Context, name, tier string) error {
	backing, mnt, err := b.places("memory")
	if err != nil {
		return err
	}
	if err := b.memoryOfInodes(ctx, name, tier, filepath.Join(backing, "inodes"), mnt); err != nil {
		return err
	}
	return b.memoryOfVolumes(ctx, name, tier, filepath.Join(backing, "volumes"), mnt)
}

func (b *bench) memoryOfInodes(ctx context.Context, name, tier, pool, mnt string) error {
	files, most := b.opts.scaled(100_000, 1000), b.opts.scaled(1_000_000, 2000)
	tree := loop{files: files, dirs: b.opts.scaled(1000, 10), clients: 2}
	if err := b.makePool(ctx, pool, volumeOf("bench", 2_000_000)); err != nil {
		return err
	}
	s, err := b.mountPool("memory", tier, pool, mnt)
	if err != nil {
		return err
	}
	defer func() { _ = s.stop(mnt) }() // what matters of it is said when it is stopped below, or cleaning up
	tree.path = filepath.Join(mnt, "bench")
	idle, err := b.sample(ctx, s, Memory{System: name, Situation: idleSituation, Volumes: 1}, 0)
	if err != nil {
		return err
	}
	err = b.attempt(ctx, s, func(ctx context.Context) error {
		for _, op := range []string{"mkdirs", "create", "stat"} {
			if err := b.step(ctx, s, tree, op); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if _, err := b.sample(ctx, s, Memory{System: name, Situation: knownInodes, Volumes: 1, Inodes: files + tree.dirs}, idle); err != nil {
		return err
	}
	if err := s.stop(mnt); err != nil {
		return err
	}

	// Made behind Croft's back, which then recounts: the daemon shall know them all, not
	// be measured at making them.
	behind := tree
	behind.files, behind.path = most, filepath.Join(pool, "volumes", "bench")
	err = b.attempt(ctx, b.systems[0], func(ctx context.Context) error {
		if _, err := b.run.output(ctx, "find", behind.path, "-type", "f", "-delete"); err != nil {
			return err
		}
		if err := b.step(ctx, b.systems[0], behind, "create"); err != nil {
			return err
		}
		_, err := b.run.output(ctx, b.opts.croft, "check", "--repair", "--pool", pool)
		return ignoreStatus(err, 3) // it found what it repaired
	})
	if err != nil {
		return err
	}
	if s, err = b.mountPool("memory", tier, pool, mnt); err != nil {
		return err
	}
	err = b.attempt(ctx, s, func(ctx context.Context) error {
		tree.files = most
		for _, op := range []string{"readdir", "stat"} {
			if err := b.step(ctx, s, tree, op); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if _, err := b.sample(ctx, s, Memory{System: name, Situation: millionFiles, Volumes: 1, Inodes: most + tree.dirs}, idle); err != nil {
		return err
	}
	if err := dropInodes(b.image); err != nil {
		return err
	}
	if _, err := b.sample(ctx, s, Memory{System: name, Situation: forgotten, Volumes: 1}, 0); err != nil {
		return err
	}
	return s.stop(mnt)
}

func (b *bench) memoryOfVolumes(ctx context.Context, name, tier, pool, mnt string) error {
	n := b.opts.scaled(1000, 10)
	var volumes [][]string
	for i := range n {
		volumes = append(volumes, []string{fmt.Sprint("v", i), "--size=1Gi"})
	}
	// Through the daemon it is faster than a command that opens the pool each time.
	if err := b.makePool(ctx, pool); err != nil {
		return err
	}
	s, err := b.mountPool("memory", tier, pool, mnt)
	if err != nil {
		return err
	}
	defer func() { _ = s.stop(mnt) }()
	for _, v := range volumes {
		if _, err := b.run.output(ctx, append([]string{b.opts.croft, "volume", "create", "--pool", pool}, v...)...); err != nil {
			return err
		}
	}
	if err := s.stop(mnt); err != nil { // a fresh daemon, without what creating them has left
		return err
	}
	if s, err = b.mountPool("memory", tier, pool, mnt); err != nil {
		return err
	}
	if _, err := b.run.output(ctx, "ls", "-lR", mnt); err != nil {
		return err
	}
	if _, err := b.sample(ctx, s, Memory{System: name, Situation: manyVolumes, Volumes: n, Inodes: n}, 0); err != nil {
		return err
	}
	return s.stop(mnt)
}

// sample adds a measurement when the daemon's memory is at rest, and returns its RSS.
// idle is that of the idle daemon, or 0 if what is above it is not to be shared out.
func (b *bench) sample(ctx context.Context, s *system, m Memory, idle float64) (float64, error) {
	proc := filepath.Join("/proc", strconv.Itoa(s.daemon.pid()))
	for range 10 {
		last := m.RSS
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(time.Second):
		}
		rollup, err := os.ReadFile(filepath.Join(proc, "smaps_rollup"))
		if err != nil {
			return 0, err
		}
		m.RSS, m.PSS, m.Anonymous = kilobytes(string(rollup), "Rss:"), kilobytes(string(rollup), "Pss:"), kilobytes(string(rollup), "Anonymous:")
		if change := m.RSS - last; max(change, -change) < 1<<20 {
			break
		}
	}
	if slabs, err := os.ReadFile("/proc/slabinfo"); err == nil {
		m.KernelInodes = activeObjects(string(slabs), "fuse_inode")
	}
	if idle > 0 {
		m.PerInode = (float64(m.RSS) - idle) / float64(m.Inodes)
	}
	b.result.Memory = append(b.result.Memory, m)
	b.say("memory: %-30s %6.1f MiB RSS, %.0f bytes an inode, the kernel has %d", m.Situation, float64(m.RSS)/(1<<20), m.PerInode, m.KernelInodes)
	return float64(m.RSS), nil
}

// kilobytes is the value of a line such as "Rss:  1234 kB", in bytes.
func kilobytes(text, key string) int64 {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == key {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n << 10
		}
	}
	return 0
}

// activeObjects is the second column of /proc/slabinfo.
func activeObjects(slabs, name string) int64 {
	for line := range strings.Lines(slabs) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == name {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}
