package control

import (
	"context"
	"reflect"
	"testing"
	"time"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/quota"
)

// fakeCopies notes what it was asked, as fakePool does.
type fakeCopies struct{ *fakePool }

func newFake() *fakePool {
	f := &fakePool{}
	f.Copies = fakeCopies{f}
	return f
}

var (
	aSnapshot = pool.Snapshot{Name: "s", Volume: "web-0", Kind: pool.KindFilesystem, Used: quota.Usage{Bytes: 1<<63 + 1, Inodes: 7},
		Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Held: 123, Wipe: true, Labels: map[string]string{"k": "v"}}
	anAttachment = pool.Attachment{Device: "/dev/loop7", ReadOnly: true, DirectIO: true}
	aCapacity    = pool.Capacity{Total: 1<<63 + 1, Free: 2, Committed: 3}
	anOperation  = pool.Operation{Kind: pool.OperationClone, Name: "n", Source: "volume v", Begun: aSnapshot.Created, Entries: 1, Bytes: 2, TotalEntries: 3, TotalBytes: 4}
)

func (f fakeCopies) CreateSnapshot(_ context.Context, name string, o pool.SnapshotOptions) (pool.Snapshot, error) {
	return aSnapshot, f.note(name, o)
}
func (f fakeCopies) DeleteSnapshot(_ context.Context, name string) error {
	return f.note(name, "delete")
}
func (f fakeCopies) Snapshot(_ context.Context, name string) (pool.Snapshot, error) {
	return aSnapshot, f.note(name, "show")
}
func (f fakeCopies) Snapshots(context.Context) ([]pool.Snapshot, error) {
	return []pool.Snapshot{aSnapshot}, f.note("", "list")
}
func (f fakeCopies) Clone(_ context.Context, name string, o pool.CloneOptions) (pool.Volume, error) {
	return volume, f.note(name, o)
}
func (f fakeCopies) Attach(_ context.Context, name string, o pool.AttachOptions) (pool.Attachment, error) {
	return anAttachment, f.note(name, o)
}
func (f fakeCopies) Detach(_ context.Context, name string) error { return f.note(name, "detach") }
func (f fakeCopies) Capacity(context.Context) (pool.Capacity, error) {
	return aCapacity, f.note("", "capacity")
}
func (f fakeCopies) Operations(context.Context) ([]pool.Operation, error) {
	return []pool.Operation{anOperation}, f.note("", "operations")
}

// TestCopies sends each call of Copies over a socket.
func TestCopies(t *testing.T) {
	ctx := t.Context()
	fake := newFake()
	c, _ := start(t, fake, Options{})
	create := pool.SnapshotOptions{Volume: "web-0", Labels: map[string]string{"a": "b"}}
	clone := pool.CloneOptions{Snapshot: "s", Bytes: 1 << 62, Inodes: 3, Wipe: true, Labels: map[string]string{"a": "b"}}
	attach := pool.AttachOptions{ReadOnly: true}
	one := func(got any, err error) (any, error) { return got, err }
	for _, test := range []struct {
		name        string
		call        func() (any, error)
		asked, want any
	}{
		{"..", func() (any, error) { return one(c.CreateSnapshot(ctx, "..", create)) }, create, aSnapshot},
		{"a b", func() (any, error) { return nil, c.DeleteSnapshot(ctx, "a b") }, "delete", nil},
		{"s", func() (any, error) { return one(c.Snapshot(ctx, "s")) }, "show", aSnapshot},
		{"", func() (any, error) { return one(c.Snapshots(ctx)) }, "list", []pool.Snapshot{aSnapshot}},
		{"n", func() (any, error) { return one(c.Clone(ctx, "n", clone)) }, clone, volume},
		{"n/", func() (any, error) { return one(c.Attach(ctx, "n/", attach)) }, attach, anAttachment},
		{".", func() (any, error) { return nil, c.Detach(ctx, ".") }, "detach", nil},
		{"", func() (any, error) { return one(c.Capacity(ctx)) }, "capacity", aCapacity},
		{"", func() (any, error) { return one(c.Operations(ctx)) }, "operations", []pool.Operation{anOperation}},
	} {
		got, err := test.call()
		if err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%v: %+v, %v", test.asked, got, err)
		}
		if fake.name != test.name || !reflect.DeepEqual(fake.asked, test.asked) {
			t.Errorf("%v of %q arrived as %v of %q", test.asked, test.name, fake.asked, fake.name)
		}
	}
	fake.err = pool.ErrSnapshotExistsSame
	if _, err := c.CreateSnapshot(ctx, "s", create); err == nil || err.Error() != fake.err.Error() {
		t.Errorf("%v", err)
	}
}
