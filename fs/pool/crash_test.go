package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// crashEnv tells a child of TestCrashAtEachStep where to end itself: the pool and the step.
const crashEnv = "CROFT_TEST_CRASH"

func TestMain(m *testing.M) {
	if dir, step, ok := strings.Cut(os.Getenv(crashEnv), "\n"); ok {
		crashAt(dir, step)
	}
	os.Exit(m.Run())
}

// crashAt does to the pool in dir what the step belongs to, and kills itself there.
func crashAt(dir, at string) {
	p, err := Open(Options{Dir: dir, step: func(step string) {
		if step == at {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}})
	if err == nil {
		ctx := context.Background()
		switch op, _, _ := strings.Cut(at, ":"); op {
		case "create":
			_, err = p.Create(ctx, "new", CreateOptions{Bytes: 1 << 20})
		case "delete", "remove":
			err = p.Delete(ctx, "old", DeleteOptions{})
		case "resize":
			_, err = p.Resize(ctx, "old", ResizeOptions{Bytes: 2 << 20, Inodes: 1 << 20})
		case "copy":
			_, err = p.Clone(ctx, "new", CloneOptions{Volume: "old"})
		case "snapshot", "snapshot delete", "snapshot remove":
			if _, err = p.CreateSnapshot(ctx, "snap", SnapshotOptions{Volume: "old"}); err == nil {
				err = p.DeleteSnapshot(ctx, "snap")
			}
		case "publish", "unpublish":
			err = publishAndBack(ctx, p)
		}
	}
	println("the step was not reached:", at, err)
	os.Exit(1)
}

// TestCrashAtEachStep ends a process by SIGKILL after each step of creation,
// deletion and resizing, and looks at what the next one finds.
func TestCrashAtEachStep(t *testing.T) {
	for _, c := range []struct {
		step     string
		old, new bool // which of the volumes are there afterwards
	}{
		{"create: recorded", true, false},
		{"create: half made", true, false},
		{"create: made", true, false},
		{"create: ready", true, true},
		{"delete: recorded", false, false},
		{"remove: tree moved", false, false},
		{"remove: moved", false, false},
		{"remove: forgotten", false, false},
		{"resize: lowered", true, false},
		{"resize: recorded", true, false},
	} {
		t.Run(c.step, func(t *testing.T) {
			dir := crashed(t, c.step)
			verifyAfterCrash(t, reopen(t, dir), c.old, c.new)
		})
	}
}

// crashed makes a pool with the volume old and has a process do something to it that ends at the step.
func crashed(t *testing.T, step string) (dir string) {
	t.Helper()
	dir, p := poolOf(t, "old")
	fill(t, p, "old", 300_000)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	crash(t, dir, step)
	return dir
}

// crash has a process do something to a closed pool that ends at the step.
func crash(t *testing.T, dir, step string) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), crashEnv+"="+dir+"\n"+step)
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Fatalf("the child ended with %v\n%s", err, out)
	}
}

// fill puts a file into a volume of a pool that is not mounted.
func fill(t *testing.T, p *Pool, name string, size int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, volumesName, name, "file"), make([]byte, size), 0o640); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Check(context.Background(), CheckOptions{Volumes: []string{name}, Repair: true}); err != nil || !r.Volumes[0].Repaired {
		t.Fatalf("%+v, %v", r, err)
	}
}

// TestCrashWhileCopying is TestCrashAtEachStep for snapshots and clones.
func TestCrashWhileCopying(t *testing.T) {
	for _, c := range []struct {
		step      string
		snap, new bool // what is there afterwards
	}{
		{"snapshot: recorded", false, false},
		{"snapshot: made", false, false},
		{"snapshot: ready", true, false},
		{"snapshot delete: recorded", false, false},
		{"snapshot remove: moved", false, false},
		{"copy: staged", false, false},
		{"copy: copied", false, false},
	} {
		t.Run(c.step, func(t *testing.T) {
			p := reopen(t, crashed(t, c.step))
			verifyAfterCrash(t, p, true, c.new)
			if _, err := p.Snapshot(t.Context(), "snap"); (err == nil) != c.snap {
				t.Errorf("the snapshot: %v", err)
			}
			if left, err := namesIn(p.snapshotsDir); err != nil || len(left) > 0 != c.snap {
				t.Errorf("in snapshots/: %v, %v", left, err)
			}
			if _, err := p.CreateSnapshot(t.Context(), "snap", SnapshotOptions{Volume: "old"}); (err == nil) == c.snap {
				t.Errorf("once more: %v", err)
			}
		})
	}
}

// poolOf makes a pool with volumes of 4 MiB, and opens it.
func poolOf(t *testing.T, volumes ...string) (dir string, p *Pool) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "pool")
	if _, err := Init(dir); err != nil {
		t.Fatal(err)
	}
	p = reopen(t, dir)
	for _, name := range volumes {
		if _, err := p.Create(context.Background(), name, CreateOptions{Bytes: 4 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	return dir, p
}

func reopen(t *testing.T, dir string) *Pool {
	t.Helper()
	p, err := Open(Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func verifyAfterCrash(t *testing.T, p *Pool, old, fresh bool) {
	t.Helper()
	ctx := context.Background()
	for name, want := range map[string]bool{"old": old, "new": fresh} {
		v, err := p.Volume(ctx, name)
		if got := err == nil; got != want {
			t.Errorf("volume %s is there: %t, want %t (%v)", name, got, want, err)
		}
		if err == nil && v.State != StateReady {
			t.Errorf("volume %s is %s", name, v.State)
		}
		if !want { // and nothing of it is in the way
			if _, err := p.Create(ctx, name, CreateOptions{Bytes: 1 << 20}); err != nil {
				t.Error(err)
			}
		}
	}
	found, err := p.Check(ctx, CheckOptions{})
	if err != nil || !found.Clean() {
		t.Errorf("check: %+v, %v", found, err)
	}
	if err := p.WaitTrash(ctx); err != nil {
		t.Error(err)
	}
	if left, err := p.trash.list(); err != nil || len(left) > 0 {
		t.Errorf("left in the trash: %v, %v", left, err)
	}
}

// TestRecountAfterCrash opens a pool as a crash leaves it: dirty, with orphans.
func TestRecountAfterCrash(t *testing.T) {
	ctx := context.Background()
	dir, p := poolOf(t, "v")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	// As a crash leaves it: dirty, two files, one of them with a second name
	// among the orphans, and an orphan that has no other name.
	for _, file := range []string{"volumes/v/a", "volumes/v/b", "orphans/v/1"} {
		if err := os.WriteFile(filepath.Join(dir, file), make([]byte, 5000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "volumes/v/a"), filepath.Join(dir, "orphans/v/2")); err != nil {
		t.Fatal(err)
	}
	p = reopen(t, dir)
	if err := p.store.SetDirty("v", "an earlier boot"); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = reopen(t, dir)
	if err := p.WaitCounted(ctx); err != nil {
		t.Fatal(err)
	}
	want := quota.Usage{Bytes: 2 * 8192, Inodes: 2}
	if v, err := p.Volume(ctx, "v"); err != nil || v.State != StateReady || v.Used != want {
		t.Errorf("%+v, %v; want %v", v, err, want)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "orphans/v")); err != nil || len(left) > 0 {
		t.Errorf("orphans left: %v, %v", left, err)
	}
}

// TestRecountThatFails checks that a volume that cannot be counted says so, and is mended by a check.
func TestRecountThatFails(t *testing.T) {
	ctx := context.Background()
	dir, p := poolOf(t, "v")
	if err := p.store.SetDirty("v", p.bootID); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	// A directory cannot be unlinked, so the orphans cannot be reaped.
	odd := filepath.Join(dir, "orphans/v/odd")
	if err := os.Mkdir(odd, 0o700); err != nil {
		t.Fatal(err)
	}
	p = reopen(t, dir)
	if err := p.WaitCounted(ctx); err != nil {
		t.Fatal(err)
	}
	v, err := p.find("v")
	if err != nil {
		t.Fatal(err)
	}
	if d := p.describe(v); d.State != StateFailed {
		t.Errorf("state %s", d.State)
	}
	if err := p.markDirty(v); err == nil {
		t.Error("a change of a volume whose use is unknown was allowed")
	}
	if err := os.Remove(odd); err != nil {
		t.Fatal(err)
	}
	found, err := p.Check(ctx, CheckOptions{Repair: true})
	if err != nil || !found.Volumes[0].Repaired {
		t.Errorf("%+v, %v", found, err)
	}
	if d := p.describe(v); d.State != StateReady {
		t.Errorf("state %s after the repair", d.State)
	}
	if err := p.markDirty(v); err != nil {
		t.Error(err)
	}
}

// TestRecountHoldsUpNobodyElse has more writers wait for a recount than the
// transport has threads, and uses another volume meanwhile.
func TestRecountHoldsUpNobodyElse(t *testing.T) {
	const writers = 100
	ctx, mnt := context.Background(), t.TempDir()
	dir, p := poolOf(t, "counted", "other")
	if err := p.store.SetDirty("counted", p.bootID); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range writers { // in one directory the kernel lets only one create at a time
		if err := os.WriteFile(filepath.Join(dir, "volumes", "counted", fmt.Sprint(i)), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	goOn := make(chan struct{})
	p, err := Open(Options{Dir: dir, step: func(step string) {
		if step == "recount: begun" {
			<-goOn
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	release := sync.OnceFunc(func() { close(goOn) })
	defer func() {
		release()
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.Mount(MountOptions{Mountpoint: mnt}); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo y >%s/counted/$i & i=$((i+1)); done; wait", writers, mnt)
	waiting := exec.Command("sh", "-ec", script)
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	conn, _ := p.mount.get()
	for conn.Counts()["SETATTR"] < writers {
		time.Sleep(time.Millisecond)
	}
	if out, err := exec.Command("sh", "-ec", "cd "+mnt+"; echo text >other/file; cat other/file counted/1").CombinedOutput(); err != nil || string(out) != "text\nx" {
		t.Errorf("beside %d waiting writers: %q, %v", writers, out, err)
	}
	release()
	if err := waiting.Wait(); err != nil {
		t.Error(err)
	}
	v, err := p.Volume(ctx, "counted")
	if err != nil || v.Used.Inodes != writers {
		t.Errorf("%+v, %v", v, err)
	}
}
