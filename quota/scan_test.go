package quota

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// scanTree scans with a deadline: whatever blocks it fails the test.
func scanTree(t testing.TB, dir string, workers int) (ScanResult, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	rule, err := RuleFor(int(root.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return Scan(ctx, root, ScanOptions{Rule: rule, Workers: workers})
}

func mustScan(t *testing.T, dir string) ScanResult {
	t.Helper()
	result, err := scanTree(t, dir, 0)
	must(t, err)
	return result
}

// countTree is Scan as one would write it without haste: one thread, by path.
func countTree(t *testing.T, dir string) (want ScanResult) {
	t.Helper()
	rule := ruleFor(t, dir)
	seen := map[uint64]bool{}
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if seen[st.Ino] {
			want.Links++
			return nil
		}
		mode := st.Mode & unix.S_IFMT
		seen[st.Ino] = mode != unix.S_IFDIR
		want.Inodes++
		want.Bytes += chargeOf(t, rule, path)
		switch mode {
		case unix.S_IFDIR:
			want.Directories++
		case unix.S_IFREG:
			want.Files++
		default:
			want.Others++
		}
		return nil
	}))
	return want
}

// noLeaks fails the test if it ends with more descriptors open than now.
func noLeaks(t *testing.T) {
	t.Helper()
	before := descriptors(t)
	t.Cleanup(func() {
		if after := descriptors(t); after > before {
			t.Errorf("%d descriptors are open, %d were before the test", after, before)
		}
	})
}

func descriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestScanLikeModel(t *testing.T) {
	onBackings(t, func(t *testing.T, dir string) {
		noLeaks(t)
		rnd := rand.New(rand.NewPCG(3, 4))
		dirs, files := []string{dir}, []string(nil)
		for i := range 1500 {
			path := filepath.Join(dirs[rnd.IntN(len(dirs))], fmt.Sprintf("%d", i))
			switch kind := rnd.IntN(12); kind {
			case 0, 1:
				must(t, os.Mkdir(path, 0o700))
				dirs = append(dirs, path)
				continue
			case 2:
				must(t, os.Symlink(strings.Repeat("s", 1+rnd.IntN(300)), path))
			case 3:
				must(t, unix.Mkfifo(path, 0o600))
			case 4:
				if len(files) > 0 {
					must(t, os.Link(files[rnd.IntN(len(files))], path))
				}
				continue
			case 5:
				file(t, path, truncate(rnd.Int64N(1<<40)), write(rnd.Int64N(1<<30), 9000))
			case 6:
				file(t, path, allocate(keep, 0, mib), prealloc(uint64(mib)))
			case 7:
				file(t, path, write(0, 100_000), allocate(punch, 8192, 8192))
			default:
				file(t, path, write(0, rnd.Int64N(30_000)))
			}
			files = append(files, path)
		}
		want := countTree(t, dir)
		for _, workers := range []int{0, 1, 2, 33} {
			if got, err := scanTree(t, dir, workers); err != nil || got != want {
				t.Errorf("%d workers: %+v, %v\nwant %+v", workers, got, err, want)
			}
		}
	})
}

func TestScanOfNothing(t *testing.T) {
	noLeaks(t)
	if got := mustScan(t, t.TempDir()); got != (ScanResult{}) {
		t.Errorf("an empty tree: %+v", got)
	}
}

// TestScanWatch: every regular file is watched, and its charge told once.
func TestScanWatch(t *testing.T) {
	onBackings(t, func(t *testing.T, dir string) {
		noLeaks(t)
		must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
		must(t, os.Symlink("file", filepath.Join(dir, "symlink")))
		for i := range 40 {
			sub := filepath.Join(dir, fmt.Sprint(i))
			must(t, os.Mkdir(sub, 0o700))
			file(t, filepath.Join(sub, "file"), truncate(mib), write(0, 5000))
			must(t, os.Link(filepath.Join(sub, "file"), filepath.Join(sub, "link")))
		}
		root, err := os.Open(dir)
		must(t, err)
		defer root.Close()
		rule, err := RuleFor(int(root.Fd()))
		must(t, err)
		var watched, counted, charged atomic.Uint64
		got, err := Scan(t.Context(), root, ScanOptions{Rule: rule, Watch: func(dirFD int, name string) func(uint64) {
			if name != "file" && name != "link" {
				t.Errorf("%s is watched", name)
			}
			fd, err := unix.Openat(dirFD, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
			if err == nil { // what it grows by is counted
				_, err = unix.Pwrite(fd, make([]byte, 100), 500_000)
				unix.Close(fd)
			}
			if err != nil {
				t.Error(err)
			}
			watched.Add(1)
			return func(charge uint64) {
				counted.Add(1)
				charged.Add(charge)
			}
		}})
		must(t, err)
		if watched.Load() < 40 || counted.Load() != 40 || charged.Load() != 40*chargeOf(t, rule, filepath.Join(dir, "0", "file")) {
			t.Errorf("%d watched, %d counted with %d bytes, of %+v", watched.Load(), counted.Load(), charged.Load(), got)
		}
		if want := countTree(t, dir); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		watched.Store(0)
		got, err = Scan(t.Context(), root, ScanOptions{Rule: rule, OnlyWatch: true, Watch: func(int, string) func(uint64) {
			watched.Add(1)
			return func(uint64) { t.Error("something is counted") }
		}})
		must(t, err)
		if watched.Load() != 80 || got.Files != 0 {
			t.Errorf("%d links are watched, of 80, and %d files counted", watched.Load(), got.Files)
		}
	})
}

func TestScanThroughPathDescriptor(t *testing.T) {
	dir := t.TempDir()
	file(t, filepath.Join(dir, "a"), write(0, 1))
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	root := os.NewFile(uintptr(fd), dir)
	defer root.Close()
	for range 2 { // its offset is not used up
		got, err := Scan(t.Context(), root, ScanOptions{})
		if want := (ScanResult{Usage: Usage{Bytes: MinBlock, Inodes: 1}, Files: 1}); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
}

func TestScanFailures(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	for i := range 300 {
		must(t, os.MkdirAll(filepath.Join(dir, fmt.Sprint(i%7), fmt.Sprint(i)), 0o700))
	}
	root, err := os.Open(dir)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Scan(ctx, root, ScanOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	root.Close()
	if _, err := Scan(t.Context(), root, ScanOptions{}); err == nil {
		t.Error("closed, and no error")
	}
	// A fault that the tree itself has names the entry.
	bad := filepath.Join(dir, "3", "bad")
	file(t, bad, truncate(mib), write(0, 1))
	must(t, unix.Setxattr(bad, PreallocXattr, []byte("x"), 0))
	if got, err := scanTree(t, dir, 3); !errors.Is(err, ErrBadPrealloc) || !strings.Contains(err.Error(), `"3": "bad"`) || got != (ScanResult{}) {
		t.Errorf("%+v, %v", got, err)
	}
	file, err := os.Open(bad)
	must(t, err)
	defer file.Close()
	if _, err := Scan(t.Context(), file, ScanOptions{}); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("not a directory: %v", err)
	}
}

// deepen makes a chain of directories below dir, each with an extra one beside it
// if comb, and returns a function that removes it.
func deepen(t *testing.T, dir string, levels int, name string, comb bool) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for i := range levels {
		must(t, unix.Mkdirat(fd, name, 0o700))
		if comb {
			must(t, unix.Mkdirat(fd, fmt.Sprint("beside", i), 0o700))
			must(t, unix.Mkdirat(fd, fmt.Sprint("beside too", i), 0o700))
		}
		child, err := unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		unix.Close(fd)
		fd = child
	}
	must(t, unix.Mknodat(fd, "bottom", unix.S_IFREG|0o600, 0))
	unix.Close(fd)
}

func TestScanDeeperThanAPath(t *testing.T) {
	dir := t.TempDir()
	noLeaks(t)
	const levels = 1500
	deepen(t, dir, levels, strings.Repeat("d", 255), false)
	want := ScanResult{Usage: Usage{Bytes: levels * MinBlock, Inodes: levels + 1}, Directories: levels, Files: 1}
	if got := mustScan(t, dir); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestScanOfAComb has a tree in which each directory on the way down has others that
// wait: the descriptors held must not grow with its depth.
func TestScanOfAComb(t *testing.T) {
	dir := t.TempDir()
	noLeaks(t)
	const levels = 2000
	deepen(t, dir, levels, "down", true)
	before := descriptors(t)
	var most atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for ctx.Err() == nil {
			most.Store(max(most.Load(), int64(descriptors(t)-before)))
		}
	})
	want := ScanResult{Usage: Usage{Bytes: 3 * levels * MinBlock, Inodes: 3*levels + 1}, Directories: 3 * levels, Files: 1}
	for _, workers := range []int{1, 8} {
		if got, err := scanTree(t, dir, workers); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	cancel()
	watcher.Wait()
	if most.Load() > openDirs+64 {
		t.Errorf("%d descriptors were held", most.Load())
	}
}

func TestScanOddNames(t *testing.T) {
	dir := t.TempDir()
	n := uint64(0)
	add := func(name string) {
		n++
		file(t, dir+"/"+name, write(0, 1))
		must(t, os.Symlink(name, dir+"/"+name[:min(len(name), 254)]+"~"))
	}
	for c := 1; c < 256; c++ {
		if c != '/' && c != '.' {
			add(string([]byte{byte(c)}))
		}
	}
	for _, name := range []string{"...", "..a", ".a", " ", "-rf", "\xff\xfe", "a\nb", strings.Repeat("n", 255), strings.Repeat("\x80", 255)} {
		if name != " " {
			add(name)
		}
	}
	want := ScanResult{Usage: Usage{Bytes: n * MinBlock, Inodes: 2 * n}, Files: n, Others: n}
	if got := mustScan(t, dir); got.Usage.Inodes != want.Usage.Inodes || got.Files != n || got.Others != n {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got, want := mustScan(t, dir), countTree(t, dir); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestScanHardLinksAcrossDirectories(t *testing.T) {
	dir := t.TempDir()
	const dirs, inodes = 50, 40
	for d := range dirs {
		must(t, os.Mkdir(fmt.Sprintf("%s/%d", dir, d), 0o700))
		for i := range inodes {
			path := fmt.Sprintf("%s/%d/%d", dir, d, i)
			switch {
			case d > 0:
				must(t, os.Link(fmt.Sprintf("%s/0/%d", dir, i), path))
			case i%2 == 0:
				file(t, path, write(0, 1))
			default: // one that is opened to be charged
				file(t, path, truncate(mib), write(70_000, 1))
			}
		}
	}
	want := ScanResult{
		Usage: Usage{Bytes: (dirs+inodes)*MinBlock + inodes*(dirs-1)*LinkCharge, Inodes: dirs + inodes},
		Files: inodes, Directories: dirs, Links: inodes * (dirs - 1),
	}
	for range 20 {
		if got, err := scanTree(t, dir, 16); err != nil || got != want {
			t.Fatalf("%+v, %v, want %+v", got, err, want)
		}
	}
}

// TestScanStaysInside has links and mounts that lead out of the tree.
func TestScanStaysInside(t *testing.T) {
	outside := t.TempDir()
	file(t, filepath.Join(outside, "large"), write(0, mib))
	must(t, os.Mkdir(filepath.Join(outside, "sub"), 0o700))
	dir := t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(dir, "symlink")))
	want := countTree(t, dir)
	for _, m := range []struct {
		name, source, fstype string
		flags                uintptr
		file                 bool
	}{
		{"bind", outside, "", unix.MS_BIND, false},
		{"tmpfs", "none", "tmpfs", 0, false},
		{"bound file", filepath.Join(outside, "large"), "", unix.MS_BIND, true},
	} {
		at := filepath.Join(dir, m.name)
		if m.file {
			file(t, at)
		} else {
			must(t, os.Mkdir(at, 0o700))
		}
		if err := unix.Mount(m.source, at, m.fstype, m.flags, ""); err != nil {
			t.Fatalf("mount %s: %v: this test needs root", m.name, err)
		}
		t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
	}
	must(t, os.WriteFile(filepath.Join(dir, "tmpfs", "large"), make([]byte, mib), 0o600))
	if got := mustScan(t, dir); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestScanOfAMovingTree scans while others make, move, link, swap and remove what is
// there. No scan may fail, block, or see what is not there.
func TestScanOfAMovingTree(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	var stop atomic.Bool
	var owners sync.WaitGroup
	for o := range 3 {
		owners.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(o), 9))
			at := func() string {
				path := dir
				for range 1 + rnd.IntN(3) {
					path += fmt.Sprintf("/%d", rnd.IntN(6))
				}
				return path
			}
			for !stop.Load() {
				path := at()
				switch rnd.IntN(9) { // most of them fail: that is as it should be
				case 0, 1:
					_ = os.Mkdir(path, 0o700)
				case 2:
					remove(path)
				case 3:
					_ = os.Rename(path, at())
				case 4:
					_ = unix.Mkfifo(path, 0o600)
				case 5:
					_ = os.Symlink(dir, path) // not "/": what goes through it must stay in here
				case 6:
					_ = os.Link(at(), path)
				case 7:
					_ = unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, at(), unix.RENAME_EXCHANGE)
				default:
					if fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600); err == nil {
						_ = unix.Ftruncate(fd, mib)
						_, _ = unix.Pwrite(fd, []byte{1}, 50_000)
						unix.Close(fd)
					}
				}
			}
		})
	}
	scans, sum := 0, ScanResult{}
	for until := time.Now().Add(3 * time.Second); time.Now().Before(until); scans++ {
		got, err := scanTree(t, dir, 4)
		if err != nil {
			t.Errorf("scan %d: %v", scans, err)
			break
		}
		sum.add(got)
	}
	stop.Store(true)
	owners.Wait()
	if sum.Files == 0 || sum.Directories == 0 || sum.Others == 0 {
		t.Errorf("%d scans saw %+v: the test tests nothing", scans, sum)
	}
	if got, want := mustScan(t, dir), countTree(t, dir); got != want {
		t.Errorf("at rest: %+v, want %+v", got, want)
	}
}

// remove removes what is at path, whatever that is and becomes meanwhile. It is not
// os.RemoveAll, which opens the parent of path for reading without O_NONBLOCK or
// O_DIRECTORY: if another has moved a FIFO there, that waits for a writer for ever.
func remove(path string) {
	if unix.Unlink(path) != unix.EISDIR {
		return
	}
	fd, err := unix.Open(path, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	for _, name := range names {
		remove(path + "/" + name)
	}
	_ = unix.Rmdir(path)
}

// TestScanLeavesNoTrace: a recount is no access.
func TestScanLeavesNoTrace(t *testing.T) {
	dir := t.TempDir()
	sub := filepath.Join(dir, "sub")
	must(t, os.Mkdir(sub, 0o700))
	path := filepath.Join(sub, "file")
	file(t, path, truncate(mib), write(0, 1))
	old := time.Unix(1000, 0)
	for _, p := range []string{path, sub} {
		must(t, os.Chtimes(p, old, old))
	}
	mustScan(t, dir)
	for _, p := range []string{path, sub} {
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		if st.Atim.Sec != old.Unix() {
			t.Errorf("%s: access time changed", p)
		}
	}
}

// BenchmarkScan scans 200,000 inodes that are in the cache, on ext4: 4 KiB files and
// empty ones, 500 in a directory. 200,000 inodes a second are what is promised.
func BenchmarkScan(b *testing.B) {
	const files, each = 200_000, 500
	dir := b.TempDir()
	mountImage(b, 2<<30, fmt.Sprintf("mkfs.ext4 -q -F -E nodiscard -N %d", 2*files), dir)
	dir = filepath.Join(dir, "tree") // without lost+found
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	block := make([]byte, MinBlock)
	for i := range files {
		sub := filepath.Join(dir, fmt.Sprint(i/each))
		if i%each == 0 {
			if err := os.Mkdir(sub, 0o700); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), block[:i%2*MinBlock], 0o600); err != nil {
			b.Fatal(err)
		}
	}
	want := ScanResult{
		Usage: Usage{Bytes: (files/2 + files/each) * MinBlock, Inodes: files + files/each},
		Files: files, Directories: files / each,
	}
	for b.Loop() {
		if got, err := scanTree(b, dir, 0); err != nil || got != want {
			b.Fatalf("%+v, %v, want %+v", got, err, want)
		}
	}
	b.ReportMetric(float64(want.Inodes)*float64(b.N)/b.Elapsed().Seconds(), "inodes/s")
}
