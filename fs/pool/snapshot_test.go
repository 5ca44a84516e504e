package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/croftfs/croft/quota"
)

// wantErr fails the test unless err is all of want and none of not.
func wantErr(t *testing.T, what string, err error, want []error, not ...error) {
	t.Helper()
	for _, w := range want {
		if !errors.Is(err, w) {
			t.Errorf("%s: %v, want %v", what, err, w)
		}
	}
	for _, n := range not {
		if errors.Is(err, n) {
			t.Errorf("%s: %v is also %v", what, err, n)
		}
	}
}

// TestSnapshotNames asks for snapshots and clones again, by the same source and by others.
func TestSnapshotNames(t *testing.T) {
	ctx := t.Context()
	dir, p := poolOf(t, "a", "b")
	fill(t, p, "a", 10_000)
	if _, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a", Labels: map[string]string{"x": "y"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Clone(ctx, "c", CloneOptions{Snapshot: "s", Labels: map[string]string{"k": "v"}}); err != nil {
		t.Fatal(err)
	}
	// What is asked of this process is asked of the next one, too.
	for range 2 {
		s, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"})
		wantErr(t, "the same snapshot", err, []error{ErrSnapshotExists, ErrSnapshotExistsSame}, ErrExists)
		if s.Name != "s" || s.Labels["x"] != "y" || s.Used != (quota.Usage{Bytes: 12288, Inodes: 1}) || s.Kind != KindFilesystem {
			t.Errorf("it is %+v", s)
		}
		_, err = p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "b"})
		wantErr(t, "of another volume", err, []error{ErrSnapshotExists}, ErrSnapshotExistsSame)
		_, err = p.CreateSnapshot(ctx, "t", SnapshotOptions{Volume: "none"})
		wantErr(t, "of no volume", err, []error{ErrNotFound})
		_, err = p.Clone(ctx, "c", CloneOptions{Snapshot: "s"})
		wantErr(t, "the same volume", err, []error{ErrExists, ErrExistsSame})
		_, err = p.Clone(ctx, "c", CloneOptions{Volume: "a"})
		wantErr(t, "from another source", err, []error{ErrExists}, ErrExistsSame)
		_, err = p.Clone(ctx, "a", CloneOptions{Snapshot: "s"})
		wantErr(t, "over an empty-born volume", err, []error{ErrExists}, ErrExistsSame)
		_, err = p.Clone(ctx, "d", CloneOptions{Snapshot: "none"})
		wantErr(t, "from no snapshot", err, []error{ErrSnapshotNotFound}, ErrNotFound)
		if v, err := p.Volume(ctx, "c"); err != nil || v.Labels["k"] != "v" || v.Source == nil || v.Source.Snapshot != "s" {
			t.Errorf("%+v, %v", v, err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		p = reopen(t, dir)
	}
	// A volume that only has the name of the source is another source.
	if err := p.Delete(ctx, "a", DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"})
	wantErr(t, "the source has gone", err, []error{ErrSnapshotExistsSame})
	if _, err := p.Create(ctx, "a", CreateOptions{Bytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	_, err = p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"})
	wantErr(t, "of another one of that name", err, []error{ErrSnapshotExists}, ErrSnapshotExistsSame)
}

func TestSnapshotBadInput(t *testing.T) {
	ctx := t.Context()
	_, p := poolOf(t, "a")
	long := map[string]string{"x": strings.Repeat("y", MaxLabels)}
	for name, call := range map[string]func() error{
		"name":         func() error { _, err := p.CreateSnapshot(ctx, "../a", SnapshotOptions{Volume: "a"}); return err },
		"stage's name": func() error { _, err := p.CreateSnapshot(ctx, ".stage-a", SnapshotOptions{Volume: "a"}); return err },
		"source":       func() error { _, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "../a"}); return err },
		"labels": func() error {
			_, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a", Labels: long})
			return err
		},
		"no source":   func() error { _, err := p.Clone(ctx, "c", CloneOptions{}); return err },
		"two sources": func() error { _, err := p.Clone(ctx, "c", CloneOptions{Volume: "a", Snapshot: "s"}); return err },
		"delete":      func() error { return p.DeleteSnapshot(ctx, "..") },
		"kind":        func() error { _, err := p.Create(ctx, "c", CreateOptions{Bytes: 1 << 20, Kind: "tape"}); return err },
		"block's mode": func() error {
			_, err := p.Create(ctx, "c", CreateOptions{Bytes: 1 << 20, Kind: KindBlock, Mode: 0o700})
			return err
		},
	} {
		wantErr(t, name, call(), []error{ErrInvalid})
	}
	wantErr(t, "delete none", p.DeleteSnapshot(ctx, "none"), []error{ErrSnapshotNotFound})
	_, err := p.Attach(ctx, "a", AttachOptions{})
	wantErr(t, "attach a tree", err, []error{ErrKind})
	if r, err := p.Check(ctx, CheckOptions{}); err != nil || !r.Clean() || len(r.Volumes) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestRestoreLimits restores a snapshot to volumes of several sizes.
func TestRestoreLimits(t *testing.T) {
	ctx := t.Context()
	_, p := poolOf(t, "a")
	fill(t, p, "a", 2<<20)
	if _, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"}); err != nil {
		t.Fatal(err)
	}
	_, err := p.Clone(ctx, "small", CloneOptions{Snapshot: "s", Bytes: 1 << 20})
	wantErr(t, "below its use", err, []error{ErrBelowUse})
	if err != nil && (!strings.Contains(err.Error(), "2097152 bytes") || !strings.Contains(err.Error(), "1048576 bytes")) {
		t.Errorf("without the figures: %v", err)
	}
	_, err = p.Clone(ctx, "small", CloneOptions{Volume: "a", Bytes: 1 << 20})
	wantErr(t, "a clone below its use", err, []error{ErrBelowUse})
	for name, want := range map[string]quota.Usage{
		"same":  {Bytes: 4 << 20, Inodes: 256},
		"exact": {Bytes: 2 << 20, Inodes: 128},
		"few":   {Bytes: 4 << 20, Inodes: 1},
	} {
		o := CloneOptions{Snapshot: "s", Bytes: want.Bytes}
		if name == "same" {
			o.Bytes = 0
		} else if name == "few" {
			o.Inodes = 1
		}
		v, err := p.Clone(ctx, name, o)
		if err != nil || v.Limit != want || v.Used != (quota.Usage{Bytes: 2 << 20, Inodes: 1}) {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	c, err := p.Capacity(ctx)
	// a, same, exact, few, and what the snapshot uses.
	if want := uint64(4+4+2+4+2) << 20; err != nil || c.Committed != want || c.Total == 0 || c.Free >= c.Total {
		t.Errorf("%+v, %v; committed should be %d", c, err, want)
	}
	if r, err := p.Check(ctx, CheckOptions{}); err != nil || !r.Clean() {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestSnapshotInUse deletes a snapshot that is being restored, and ends a restore half way.
func TestSnapshotInUse(t *testing.T) {
	ctx := t.Context()
	reached, goOn := make(chan struct{}), make(chan struct{})
	dir, p := poolOf(t, "a")
	fill(t, p, "a", 1<<20)
	if _, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(Options{Dir: dir, step: func(step string) {
		if step == "create: half made" {
			close(reached)
			<-goOn
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ending, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error)
	go func() {
		_, err := p.Clone(ending, "c", CloneOptions{Snapshot: "s"})
		ended <- err
	}()
	<-reached
	wantErr(t, "delete", p.DeleteSnapshot(ctx, "s"), []error{ErrBusy})
	ops, err := p.Operations(ctx)
	if err != nil || len(ops) != 1 || ops[0].Kind != OperationClone || ops[0].Name != "c" || ops[0].TotalBytes != 1<<20 || time.Since(ops[0].Begun) < 0 {
		t.Errorf("%+v, %v", ops, err)
	}
	if r, err := p.Check(ctx, CheckOptions{}); err != nil || !r.Clean() { // does not wait for it
		t.Errorf("%+v, %v", r, err)
	}
	cancel()
	close(goOn)
	wantErr(t, "the restore", <-ended, []error{context.Canceled})
	if _, err := os.Lstat(filepath.Join(dir, "volumes/c")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left of it: %v", err)
	}
	if err := p.DeleteSnapshot(ctx, "s"); err != nil {
		t.Error(err)
	}
	if r, err := p.Check(ctx, CheckOptions{}); err != nil || !r.Clean() {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestSourceDeleted deletes a volume while it is being copied.
func TestSourceDeleted(t *testing.T) {
	ctx := t.Context()
	dir, p := poolOf(t, "a")
	fill(t, p, "a", 1<<20)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	p, err = Open(Options{Dir: dir, step: func(step string) {
		if step == "copy: staged" {
			if err := p.Delete(ctx, "a", DeleteOptions{}); err != nil {
				t.Error(err)
			}
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	_, err = p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"})
	wantErr(t, "the snapshot", err, []error{ErrNotFound})
	if list, err := p.Snapshots(ctx); err != nil || len(list) > 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if r, err := p.Check(ctx, CheckOptions{}); err != nil || !r.Clean() || len(r.Volumes) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
}
