package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"
)

// Long enough that one tick of the scheduler does not show, for operations that can be
// repeated.
const repeatFor = 300 * time.Millisecond

// clients is how many work at once where scaling is measured.
const clients = 8

func metadataBatches(b *bench) []batch {
	noPrepare := func(context.Context, *system) error { return nil }
	ops := func(name, title, note string) metric {
		return metric{name: "meta-" + name, title: title, unit: "ops/s", note: note}
	}
	entries := func(name, title, note string) metric {
		return metric{name: "meta-" + name, title: title, unit: "entries/s", note: note}
	}
	return []batch{{
		group: "metadata",
		metrics: []metric{
			ops("create", "create + write 4 KiB + close", ""),
			ops("stat-cold", "stat, cold", "after the kernel forgot all inodes"),
			ops("stat", "stat, cached", "asked before"),
			ops("read", "open + read 4 KiB + close", "page cache, warm"),
			entries("readdir-cold", "readdir, cold", "after the kernel forgot all inodes"),
			entries("readdir", "readdir, again", "listed before"),
			ops("rename", "rename", ""),
			ops("unlink", "unlink", ""),
		},
		prepare: noPrepare,
		run:     b.metadata,
	}, {
		group: "metadata",
		metrics: []metric{
			ops("create-8", "create + write 4 KiB + close, 8 clients", ""),
			ops("read-8", "open + read 4 KiB + close, 8 clients", "page cache, warm"),
		},
		prepare: noPrepare,
		run:     b.metadataByMany,
	}}
}

// tree is a new tree's loop.
func (b *bench) tree(s *system, name string, n int) loop {
	return loop{path: filepath.Join(s.dir, fmt.Sprint(name, n)), files: b.opts.scaled(10_000, 200), dirs: b.opts.scaled(100, 10), size: 4096}
}

// metadata is the life of a tree, an operation after the other.
func (b *bench) metadata(ctx context.Context, s *system, n int) (map[string]float64, error) {
	tree, values := b.tree(s, "metadata", n), map[string]float64{}
	if err := b.step(ctx, s, tree, "mkdirs"); err != nil {
		return nil, err
	}
	steps := []struct {
		name, op string
		cold     bool
		repeat   bool
	}{
		{name: "create", op: "create"},
		{name: "stat-cold", op: "stat", cold: true},
		{name: "stat", op: "stat", repeat: true},
		{op: "read"}, // warms
		{name: "read", op: "read", repeat: true},
		{name: "readdir-cold", op: "readdir", cold: true},
		{name: "readdir", op: "readdir", repeat: true},
		{name: "rename", op: "rename", repeat: true},
		{name: "unlink", op: "unlink"},
	}
	for _, step := range steps {
		tree.op, tree.atLeast = step.op, 0
		if step.repeat {
			tree.atLeast = repeatFor
		}
		times := 1
		if step.cold { // too short to be measured once
			times = 3
		}
		var samples []float64
		for range times {
			if step.cold {
				if err := dropInodes(b.image); err != nil {
					return nil, err
				}
			}
			var r loopResult
			if err := b.loop(ctx, s, tree, &r); err != nil {
				return nil, err
			}
			samples = append(samples, r.rate())
		}
		if step.name != "" {
			values["meta-"+step.name] = median(samples)
		}
	}
	return values, nil
}

// metadataByMany does what can be done at once by many clients, each in its directories.
func (b *bench) metadataByMany(ctx context.Context, s *system, n int) (map[string]float64, error) {
	tree, values := b.tree(s, "clients", n), map[string]float64{}
	if err := b.step(ctx, s, tree, "mkdirs"); err != nil {
		return nil, err
	}
	tree.clients = clients
	for _, op := range []string{"create", "read"} {
		var r loopResult
		tree.op, tree.atLeast = op, 0
		if op == "read" {
			if err := b.loop(ctx, s, tree, nil); err != nil { // warms
				return nil, err
			}
			tree.atLeast = repeatFor
		}
		if err := b.loop(ctx, s, tree, &r); err != nil {
			return nil, err
		}
		values["meta-"+op+"-8"] = r.rate()
	}
	return values, nil
}

func (b *bench) step(ctx context.Context, s *system, l loop, op string) error {
	l.op = op
	return b.loop(ctx, s, l, nil)
}
