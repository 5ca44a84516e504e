package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/transport"
)

// A pool of these tests is mounted on a directory beside it when that is there.
func mountBeside(dir string) string  { return filepath.Join(filepath.Dir(dir), "mnt") }
func targetBeside(dir string) string { return filepath.Join(filepath.Dir(dir), "target") }

// mountIfAsked mounts the pool when there is a place for it.
func mountIfAsked(p *Pool) error {
	if _, err := os.Lstat(mountBeside(p.dir)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return p.Mount(MountOptions{Mountpoint: mountBeside(p.dir)})
}

// publishAndBack is what a crash comes into.
func publishAndBack(ctx context.Context, p *Pool) error {
	if err := mountIfAsked(p); err != nil {
		return err
	}
	target := targetBeside(p.dir)
	if err := p.Publish(ctx, "old", PublishOptions{Target: target}); err != nil {
		return err
	}
	return p.Unpublish(ctx, "old", target)
}

// TestCrashWhilePublishing is TestCrashAtEachStep for publications. Whoever had called calls again, or takes back what he
// has asked for; nothing is left then.
func TestCrashWhilePublishing(t *testing.T) {
	for what, c := range map[string]struct{ block, mounted bool }{
		"block":          {block: true},
		"block, mounted": {block: true, mounted: true},
		"filesystem":     {mounted: true},
	} {
		for _, step := range []string{"publish: recorded", "publish: mounted", "unpublish: unmounted", "unpublish: removed"} {
			for _, again := range []string{"publish", "unpublish"} {
				t.Run(what+"/"+step+"/"+again, func(t *testing.T) {
					dir := poolToPublish(t, c.block, c.mounted, "old")
					crash(t, dir, step)
					p := reopenToPublish(t, dir)
					lookAfterCrash(t, p, c.mounted && step == "publish: mounted")
					target := targetBeside(dir)
					if again == "publish" {
						for range 2 {
							mustPublish(t, p, "old", PublishOptions{Target: target})
							wantPublished(t, p, "old", target)
						}
					}
					for range 2 {
						mustUnpublish(t, p, "old", target)
						wantUnpublished(t, p, "old", target)
					}
					if err := p.Delete(t.Context(), "old", DeleteOptions{}); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// lookAfterCrash looks at what a mounted pool has made of what the crash has left; one that is not mounted leaves it to
// the next call.
func lookAfterCrash(t *testing.T, p *Pool, published bool) {
	t.Helper()
	if p.mount.point() == "" {
		return
	}
	if published {
		wantPublished(t, p, "old", targetBeside(p.dir))
		return
	}
	wantNoPublication(t, p, "old", targetBeside(p.dir))
}

// poolToPublish makes a closed pool with volumes, and takes away at the end what is left of it.
func poolToPublish(t *testing.T, block, mounted bool, volumes ...string) (dir string) {
	t.Helper()
	dir, p := poolOf(t)
	kind := KindFilesystem
	if block {
		kind = KindBlock
	}
	for _, name := range volumes {
		if _, err := p.Create(t.Context(), name, CreateOptions{Bytes: 4 << 20, Kind: kind}); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if mounted {
		if err := os.Mkdir(mountBeside(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	files := blockFiles(t, dir)
	t.Cleanup(func() { sweep(t, dir, files) })
	return dir
}

// blockFiles are the files of a pool's block volumes; a device may have one that was deleted.
func blockFiles(t *testing.T, dir string) (files []fileID) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, blocksName, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		files = append(files, idOf(&st))
	}
	return files
}

// reopenToPublish opens the pool, and mounts it when there is a place for that.
func reopenToPublish(t *testing.T, dir string) *Pool {
	t.Helper()
	p := reopen(t, dir)
	// Close waits for bind mounts, and takes the pool's own mount away.
	t.Cleanup(func() { detachBelow(t, filepath.Dir(dir), mountBeside(dir)) })
	if err := mountIfAsked(p); err != nil {
		t.Fatal(err)
	}
	return p
}

// detachBelow takes away every mount below a directory but for some: dead ones too, so it goes by mountinfo alone.
func detachBelow(t *testing.T, dir string, but ...string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Error(err)
	}
	for _, m := range slices.Backward(mounts) {
		if slices.Contains(but, m.Mountpoint) {
			continue
		}
		if err := transport.Detach(m.Mountpoint); err != nil {
			t.Error(err)
		}
	}
}

// sweep takes away the mounts beside a pool, and devices of the files.
func sweep(t *testing.T, dir string, files []fileID) {
	t.Helper()
	detachBelow(t, filepath.Dir(dir))
	found, err := loops()
	if err != nil {
		t.Error(err)
	}
	for _, file := range files {
		if l, attached := found[file]; attached {
			t.Errorf("%s is left", l.device)
			if err := l.clear(file); err != nil {
				t.Error(err)
			}
		}
	}
}

func mustPublish(t *testing.T, p *Pool, name string, o PublishOptions) {
	t.Helper()
	if err := p.Publish(t.Context(), name, o); err != nil {
		t.Fatalf("publish: %v", err)
	}
}

func mustUnpublish(t *testing.T, p *Pool, name, target string) {
	t.Helper()
	if err := p.Unpublish(t.Context(), name, target); err != nil {
		t.Fatalf("unpublish: %v", err)
	}
}

func attached(t *testing.T, p *Pool, name string) bool {
	t.Helper()
	v, err := p.find(name)
	if err != nil {
		t.Fatal(err)
	}
	_, is, err := p.loopOf(v)
	if err != nil {
		t.Fatal(err)
	}
	return is
}

func isRecorded(t *testing.T, p *Pool, name, target string) (in, stored bool) {
	t.Helper()
	list, err := p.Publications(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list {
		in = in || r.Target == target
	}
	records, err := p.store.Publications()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		stored = stored || r.Volume == name && r.Target == target
	}
	return in, stored
}

// wantPublished wants one mount on the target, a live one, and its record.
func wantPublished(t *testing.T, p *Pool, name, target string) {
	t.Helper()
	there, err := p.mountedOn(name, target)
	if err != nil || !there.live() {
		t.Errorf("on the target: %+v, %v", there, err)
	}
	if in, stored := isRecorded(t, p, name, target); !in || !stored {
		t.Errorf("recorded: %t, %t", in, stored)
	}
	v, err := p.find(name)
	if err != nil {
		t.Fatal(err)
	}
	if is := attached(t, p, name); is != v.record.Block {
		t.Errorf("attached: %t", is)
	}
}

// wantNoPublication wants neither a mount nor a device nor a record; the target may be there.
func wantNoPublication(t *testing.T, p *Pool, name, target string) {
	t.Helper()
	if mounts, err := transport.MountsOn(target); err != nil || len(mounts) > 0 {
		t.Errorf("on the target: %+v, %v", mounts, err)
	}
	if in, stored := isRecorded(t, p, name, target); in || stored {
		t.Errorf("recorded: %t, %t", in, stored)
	}
	if attached(t, p, name) {
		t.Error("its device is left")
	}
}

func wantUnpublished(t *testing.T, p *Pool, name, target string) {
	t.Helper()
	wantNoPublication(t, p, name, target)
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the target is left: %v", err)
	}
}
