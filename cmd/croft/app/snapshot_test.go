package app

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/quota"
)

// fakeCopies is a fakePool's Copies: what takes long ends when it was looked at.
type fakeCopies struct {
	*fakePool
	looked chan struct{}
}

func (f *fakeCopies) CreateSnapshot(_ context.Context, name string, o pool.SnapshotOptions) (pool.Snapshot, error) {
	f.note("snapshot %s %s", name, o.Volume)
	if f.looked != nil {
		<-f.looked
		<-f.looked // and what was seen first is shown
	}
	return pool.Snapshot{Name: name, Held: 1234567 * time.Nanosecond}, nil
}

func (f *fakeCopies) DeleteSnapshot(_ context.Context, name string) error {
	f.note("delete snapshot %s", name)
	if name == "none" {
		return fmt.Errorf("snapshot %s: %w", name, pool.ErrSnapshotNotFound)
	}
	return nil
}

func (f *fakeCopies) Snapshot(context.Context, string) (pool.Snapshot, error) {
	return pool.Snapshot{}, pool.ErrSnapshotNotFound
}

func (f *fakeCopies) Snapshots(context.Context) ([]pool.Snapshot, error) {
	return []pool.Snapshot{
		{Name: "s", Volume: "a", Kind: pool.KindFilesystem, Used: quota.Usage{Bytes: 3 << 20, Inodes: 9}},
		{Name: "t", Volume: "b", Kind: pool.KindBlock, Used: quota.Usage{Bytes: 1 << 30, Inodes: 1}},
	}, nil
}

func (f *fakeCopies) Clone(_ context.Context, name string, o pool.CloneOptions) (pool.Volume, error) {
	f.note("clone %s %+v", name, o)
	return pool.Volume{Name: name, Source: &pool.Source{Held: time.Second}}, nil
}

func (f *fakeCopies) Attach(_ context.Context, name string, o pool.AttachOptions) (pool.Attachment, error) {
	f.note("attach %s %+v", name, o)
	return pool.Attachment{Device: "/dev/loop7"}, nil
}

func (f *fakeCopies) Detach(_ context.Context, name string) error {
	f.note("detach %s", name)
	return nil
}

func (f *fakeCopies) Capacity(context.Context) (pool.Capacity, error) { return pool.Capacity{}, nil }

func (f *fakeCopies) Operations(context.Context) ([]pool.Operation, error) {
	if f.looked != nil {
		f.looked <- struct{}{}
	}
	return []pool.Operation{{Kind: pool.OperationSnapshot, Name: "s", Source: "volume a", Entries: 12, TotalEntries: 34, Bytes: 1 << 20, TotalBytes: 2 << 20}}, nil
}

func TestSnapshotCommands(t *testing.T) {
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprintf("mounted=%t", mounted), func(t *testing.T) {
			h, dir := newHost(t), poolDir(t, idA)
			f := newFakePool(dir, "a")
			if mounted {
				h.serves(f)
			} else {
				h.opens(f)
			}
			h.env[PoolEnv] = dir
			_, _, stderr := h.run("snapshot", "create", "a", "s")
			if want := "croft: writers of volume a were held for 1.2ms\n"; stderr != want {
				t.Errorf("%q, want %q", stderr, want)
			}
			h.want(ExitOK, "s      a        filesystem   3Mi    9", "snapshot", "list")
			h.want(ExitOK, `"kind": "block"`, "snapshot", "ls", "-o", "json")
			h.want(ExitOK, "", "snapshot", "restore", "s", "n", "--size", "2Gi", "--inodes", "7", "--wipe")
			h.want(ExitOK, "", "volume", "clone", "a", "c")
			h.want(ExitOK, "/dev/loop7\n", "volume", "attach", "b", "--read-only")
			h.want(ExitOK, `"device": "/dev/loop7"`, "volume", "attach", "b", "-o", "json")
			h.want(ExitOK, "", "volume", "detach", "b")
			h.want(ExitOK, "", "snapshot", "rm", "s")
			h.want(ExitFailure, "`croft snapshot list` shows", "snapshot", "delete", "none")
			h.want(ExitOK, "", "volume", "create", "--size", "1Gi", "--block", "--wipe", "raw")
			calls := strings.Join(f.calls, "\n")
			for _, want := range []string{
				"snapshot s a",
				"clone n {Volume: Snapshot:s Bytes:2147483648 Inodes:7 Wipe:true Labels:map[]}",
				"clone c {Volume:a Snapshot: Bytes:0 Inodes:0 Wipe:false Labels:map[]}",
				"attach b {ReadOnly:true}", "detach b", "delete snapshot s",
				"create raw {Bytes:1073741824 Inodes:0 Mode:---------- UID:0 GID:0 Kind:block Wipe:true Labels:map[]}",
			} {
				if !strings.Contains(calls, want) {
					t.Errorf("not called: %s\n%s", want, calls)
				}
			}
		})
	}
}

func TestSnapshotUsage(t *testing.T) {
	h := newHost(t)
	for args, want := range map[string]string{
		"snapshot create":        "name the volume",
		"snapshot create a":      "name the snapshot",
		"snapshot create a b c":  `"c" is too many`,
		"snapshot create a ../b": "letters, digits",
		"snapshot delete":        "name the snapshot",
		"snapshot delete a b":    "one snapshot at a time",
		"snapshot restore s":     "name the volume",
		"volume clone a":         "name the new volume",
		"volume attach":          "name the volume",
		"volume create a --block --size 1Gi --mode 0700": "a block volume has no --mode",
	} {
		h.want(ExitUsage, want, strings.Fields(args)...)
	}
}

// TestProgress looks at a command that takes long, on a terminal and not.
func TestProgress(t *testing.T) {
	h, dir := newHost(t), poolDir(t, idA)
	f := newFakePool(dir, "a")
	copies := &fakeCopies{fakePool: f, looked: make(chan struct{}, 2)}
	f.Copies = copies
	h.opens(f)
	h.opts.watched = func() bool { return true }
	code, _, stderr := h.run("snapshot", "create", "--pool", dir, "a", "s")
	line := "\r\x1b[Kcopying volume a: 12 of about 34 files, 1Mi of about 2Mi"
	if code != ExitOK || !strings.HasPrefix(stderr, line) || !strings.Contains(stderr, "\r\x1b[K") || strings.Contains(stderr, "\n\r") {
		t.Errorf("%d, %q", code, stderr)
	}
	copies.looked = nil
	h.opts.watched = nil // it is no terminal
	if _, _, stderr := h.run("snapshot", "create", "--pool", dir, "a", "s"); strings.Contains(stderr, "copying") {
		t.Errorf("%q", stderr)
	}
}
