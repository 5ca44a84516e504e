package copytree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// trees makes a source and an empty destination, and opens both.
func trees(t *testing.T) (src, dst *os.File) {
	t.Helper()
	root := t.TempDir()
	var open [2]*os.File
	for i, name := range []string{"src", "dst"} {
		if err := os.Mkdir(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		open[i] = f
	}
	return open[0], open[1]
}

func write(t *testing.T, path string, size int) {
	t.Helper()
	if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestDescriptors copies a tree that is deep, and wide at each level, with few descriptors.
func TestDescriptors(t *testing.T) {
	const depth, width = 100, batchSize + 10
	src, dst := trees(t)
	at := src.Name()
	for range depth {
		for i := range width {
			write(t, filepath.Join(at, fmt.Sprint(i)), 1)
		}
		at = filepath.Join(at, "d")
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = uint64(len(open) + 60)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	progress := new(Progress)
	err = Copy(t.Context(), src, dst, Options{Workers: 8, Progress: progress})
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if want := uint64(depth * (width + 1)); err != nil || progress.Entries.Load() != want || progress.Bytes.Load() != depth*width {
		t.Errorf("%d entries of %d, %d bytes: %v", progress.Entries.Load(), want, progress.Bytes.Load(), err)
	}
}

// TestStaged changes a tree after it was staged: what has changed is copied as it is.
func TestStaged(t *testing.T) {
	src, dst := trees(t)
	staging, err := os.Open(t.TempDir()) // on the same filesystem
	if err != nil {
		t.Fatal(err)
	}
	defer staging.Close()
	for _, name := range []string{"same", "overwritten", "longer", "mode", "removed", "renamed", "young"} {
		write(t, filepath.Join(src.Name(), name), 100_000)
	}
	if err := os.Link(src.Name()+"/same", src.Name()+"/link"); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	for old := false; !old; { // until it is no longer too young
		if err := unix.Stat(src.Name()+"/same", &st); err != nil {
			t.Fatal(err)
		}
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
			t.Fatal(err)
		}
		old = now.Nano()-st.Ctim.Nano() > 2*settledFor.Nanoseconds()
	}
	if err := os.Chmod(src.Name()+"/young", 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Stage(t.Context(), src, staging, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	staged, err := filepath.Glob(staging.Name() + "/*/*")
	if err != nil || len(staged) != 6 { // all but the young one, and each inode once
		t.Errorf("staged: %v, %v", staged, err)
	}
	f, err := os.OpenFile(src.Name()+"/overwritten", os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString("x")
	}
	if err := errors.Join(err, f.Close(), os.Chmod(src.Name()+"/mode", 0o4711), os.Remove(src.Name()+"/removed"),
		os.Rename(src.Name()+"/renamed", src.Name()+"/new"), os.Truncate(src.Name()+"/longer", 200_000)); err != nil {
		t.Fatal(err)
	}
	if err := Copy(t.Context(), src, dst, Options{Staged: s}); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(src.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		want, errWant := os.ReadFile(filepath.Join(src.Name(), e.Name()))
		got, errGot := os.ReadFile(filepath.Join(dst.Name(), e.Name()))
		a, errA := os.Lstat(filepath.Join(src.Name(), e.Name()))
		b, errB := os.Lstat(filepath.Join(dst.Name(), e.Name()))
		if err := errors.Join(errWant, errGot, errA, errB); err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) || a.Mode() != b.Mode() || !a.ModTime().Equal(b.ModTime()) {
			t.Errorf("%s is not what it should be: %v %v, %v %v", e.Name(), a.Mode(), a.ModTime(), b.Mode(), b.ModTime())
		}
	}
	if copied, _ := os.ReadDir(dst.Name()); len(copied) != len(entries) {
		t.Errorf("%d entries of %d", len(copied), len(entries))
	}
	if left, _ := filepath.Glob(staging.Name() + "/*/*"); len(left) >= len(staged) {
		t.Errorf("nothing was taken: %v", left)
	}
}

// TestMounts leaves out what is mounted in the tree.
func TestMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
	src, dst := trees(t)
	point := filepath.Join(src.Name(), "mounted")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", point, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(point, 0); err != nil {
			t.Error(err)
		}
	})
	write(t, filepath.Join(point, "secret"), 1)
	write(t, filepath.Join(src.Name(), "file"), 1)
	if err := Copy(t.Context(), src, dst, Options{}); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadDir(dst.Name()); len(got) != 1 || got[0].Name() != "file" {
		t.Errorf("copied: %v", got)
	}
}

func TestCanceled(t *testing.T) {
	src, dst := trees(t)
	write(t, filepath.Join(src.Name(), "file"), 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Copy(ctx, src, dst, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestWithout(t *testing.T) {
	r := func(pairs ...uint64) (ranges []quota.Range) {
		for i := 0; i < len(pairs); i += 2 {
			ranges = append(ranges, quota.Range{From: pairs[i], To: pairs[i+1]})
		}
		return ranges
	}
	for _, test := range []struct{ a, b, want []quota.Range }{
		{r(0, 10), nil, r(0, 10)},
		{r(0, 10), r(0, 10), nil},
		{r(0, 10), r(3, 5), r(0, 3, 5, 10)},
		{r(0, 10, 20, 30), r(5, 25), r(0, 5, 25, 30)},
		{r(0, 10), r(2, 3, 4, 5, 9, 20), r(0, 2, 3, 4, 5, 9)},
		{r(5, 6), r(0, 2, 3, 4, 7, 9), r(5, 6)},
	} {
		if got := without(test.a, test.b); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%v without %v: %v, want %v", test.a, test.b, got, test.want)
		}
	}
}
