package pool

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// promisingPool opens a pool that promises as much as it can hold, and makes its volumes.
func promisingPool(t *testing.T, overcommit float64, volumes ...string) *Pool {
	t.Helper()
	dir, p := poolOf(t, volumes...)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(Options{Dir: dir, Overcommit: overcommit, Spare: 0.05})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func capacityOf(t *testing.T, p *Pool) Capacity {
	t.Helper()
	c, err := p.Capacity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestPromiseTogether has many create volumes at the same time: what they are promised is never more than there is.
func TestPromiseTogether(t *testing.T) {
	p := promisingPool(t, 1)
	c := capacityOf(t, p)
	if c.Usable >= c.Free || c.Available != c.Usable || c.Committed != 0 {
		t.Fatalf("empty: %+v", c)
	}
	size := c.Available / 10
	var made, refused atomic.Int64
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			switch _, err := p.Create(t.Context(), fmt.Sprintf("v%d", i), CreateOptions{Bytes: size}); {
			case err == nil:
				made.Add(1)
			case errors.Is(err, ErrNoRoom):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	// The ones that are made take room for themselves, and others may use the disk as well.
	if made.Load() < 8 || made.Load() > 10 || made.Load()+refused.Load() != 40 {
		t.Errorf("%d were made, %d refused", made.Load(), refused.Load())
	}
	if c := capacityOf(t, p); c.Committed > c.Usable+16<<20 {
		t.Errorf("%+v", c)
	}
}

// TestPromiseRefused asks for more than there is in every way.
func TestPromiseRefused(t *testing.T) {
	ctx := t.Context()
	p := promisingPool(t, 1, "a")
	fill(t, p, "a", 1<<20)
	if _, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"}); err != nil {
		t.Fatal(err)
	}
	before := capacityOf(t, p)
	more := before.Usable + 1<<20
	for name, call := range map[string]func() error{
		"create": func() error { _, err := p.Create(ctx, "c", CreateOptions{Bytes: more}); return err },
		"resize": func() error { _, err := p.Resize(ctx, "a", ResizeOptions{Bytes: more}); return err },
		"clone":  func() error { _, err := p.Clone(ctx, "c", CloneOptions{Volume: "a", Bytes: more}); return err },
		"restore": func() error {
			_, err := p.Clone(ctx, "c", CloneOptions{Snapshot: "s", Bytes: more})
			return err
		},
	} {
		err := call()
		wantErr(t, name, err, []error{ErrNoRoom})
		if err != nil && (!strings.Contains(err.Error(), fmt.Sprint(before.Committed)) || !strings.Contains(err.Error(), "overcommit 1")) {
			t.Errorf("%s: without the figures: %v", name, err)
		}
	}
	if after := capacityOf(t, p); after.Committed != before.Committed {
		t.Errorf("what was refused is promised: %d, before %d", after.Committed, before.Committed)
	}
	// What is given back can be promised again.
	v, err := p.Create(ctx, "b", CreateOptions{Bytes: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if c := capacityOf(t, p); c.Committed != before.Committed+v.Limit.Bytes {
		t.Errorf("%+v, before %+v", c, before)
	}
	if _, err := p.Resize(ctx, "b", ResizeOptions{Bytes: 32 << 20}); err != nil {
		t.Error(err)
	}
	if c := capacityOf(t, p); c.Committed != before.Committed+32<<20 {
		t.Errorf("lowered: %+v, before %+v", c, before)
	}
	if err := p.Delete(ctx, "b", DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if c := capacityOf(t, p); c.Committed != before.Committed {
		t.Errorf("deleted: %+v, before %+v", c, before)
	}
}

// TestOvercommit promises more than there is.
func TestOvercommit(t *testing.T) {
	p := promisingPool(t, 2.5)
	c := capacityOf(t, p)
	if want := uint64(2.5 * float64(c.Usable)); c.Available > want || c.Available < want-want/100 {
		t.Errorf("%+v: 2.5 times %d are %d", c, c.Usable, want)
	}
	if _, err := p.Create(t.Context(), "v", CreateOptions{Bytes: 2 * c.Usable}); err != nil {
		t.Error(err)
	}
	_, err := p.Create(t.Context(), "w", CreateOptions{Bytes: c.Usable})
	wantErr(t, "three times", err, []error{ErrNoRoom})
}

// TestBoundlessSum has volumes whose limits are more in all than a number holds: nothing may be promised afterwards.
func TestBoundlessSum(t *testing.T) {
	p := promisingPool(t, 0)
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		if _, err := p.Create(t.Context(), name, CreateOptions{Bytes: MaxBytes}); err != nil {
			t.Fatal(err)
		}
	}
	p.overcommit = 1 // as at the next start
	if c := capacityOf(t, p); c.Committed != math.MaxUint64 || c.Available != 0 {
		t.Errorf("five times 4 EiB: %+v", c)
	}
}

// TestFamilies counts what shares its blocks once, however long the line.
func TestFamilies(t *testing.T) {
	ctx := t.Context()
	p := promisingPool(t, 0, "a", "other")
	p.fstype = "a filesystem that shares" // no other part asks here
	fill(t, p, "a", 3<<20)
	fill(t, p, "other", 1<<20)
	copies := []func() error{
		func() error { _, err := p.CreateSnapshot(ctx, "s", SnapshotOptions{Volume: "a"}); return err },
		func() error { _, err := p.Clone(ctx, "b", CloneOptions{Snapshot: "s"}); return err },
		func() error { _, err := p.Clone(ctx, "c", CloneOptions{Volume: "b"}); return err },
		func() error { return p.Delete(ctx, "a", DeleteOptions{}) },
		func() error { return p.DeleteSnapshot(ctx, "s") },
		func() error { return p.Delete(ctx, "b", DeleteOptions{}) },
	}
	for i, step := range copies {
		if err := step(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		p.mu.Lock()
		got := p.onDisk()
		p.mu.Unlock()
		if got != 4<<20 {
			t.Errorf("step %d: %d bytes are counted, of 3 MiB and 1 MiB", i, got)
		}
	}
}

func TestPromiseOptions(t *testing.T) {
	dir, p := poolOf(t)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{{Overcommit: 0.5}, {Overcommit: -1}, {Overcommit: MaxOvercommit + 1}, {Spare: -0.1}, {Spare: 1}} {
		o.Dir = dir
		if p, err := Open(o); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", o, err)
			if err == nil {
				p.Close()
			}
		}
	}
}
