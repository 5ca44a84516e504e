package takeover_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A worker does something in a directory of a volume over and over until its standard
// input ends, and fails at the first result that is not what a disk would give. In the
// end it says how often it did.

// A thread sleeps for rest when it has made restAfter rounds: one that only reads, or stores to memory, would have a processor for
// itself, and the file that lines appends to would become too large.
const (
	restAfter = 16
	rest      = 10 * time.Millisecond
)

// until runs a round after the other, by several threads.
func until(threads int, round func(thread, i int) error) int {
	var over atomic.Bool
	var rounds atomic.Int64
	var wg sync.WaitGroup
	var failed atomic.Bool
	for thread := range threads {
		wg.Go(func() {
			for i := 0; !over.Load(); i++ {
				if err := round(thread, i); err != nil {
					fmt.Fprintf(os.Stderr, "thread %d, round %d: %v\n", thread, i, err)
					failed.Store(true)
					return
				}
				rounds.Add(1)
				if i%restAfter == restAfter-1 {
					time.Sleep(rest)
				}
			}
		})
	}
	fmt.Println("works")
	_, _ = io.Copy(io.Discard, os.Stdin)
	over.Store(true)
	wg.Wait()
	fmt.Println(rounds.Load())
	if failed.Load() {
		return 1
	}
	return 0
}

// check gives an error a name; want is what it should be.
func check(what string, err, want error) error {
	if errors.Is(err, want) || err == want {
		return nil
	}
	return fmt.Errorf("%s: %v, want %v", what, err, want)
}

// names makes, moves and takes away names of all kinds.
func names(args []string) int {
	return until(3, func(thread, i int) error {
		dir := filepath.Join(args[0], strconv.Itoa(thread))
		if i == 0 {
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
		}
		return nameRound(dir, i)
	})
}

func nameRound(dir string, i int) error {
	at := func(name string) string { return filepath.Join(dir, fmt.Sprint(name, "-", i)) }
	a, b, c, d := at("a"), at("b"), at("c"), at("d")
	f, err := os.OpenFile(a, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o640)
	if err != nil {
		return err
	}
	defer f.Close()
	content := fmt.Sprint("content ", i)
	_, werr := f.WriteString(content)
	_, xerr := os.OpenFile(a, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o640)
	var errs []error
	try := func(what string, err, want error) { errs = append(errs, check(what, err, want)) }
	try("write", werr, nil)
	try("create again", xerr, unix.EEXIST)
	try("link", os.Link(a, b), nil)
	try("link again", os.Link(a, b), unix.EEXIST)
	errs = append(errs, linksOf(a, 2))
	try("rename", os.Rename(a, c), nil)
	try("rename again", os.Rename(a, c), unix.ENOENT)
	try("mkdir", os.Mkdir(d, 0o700), nil)
	try("mkdir again", os.Mkdir(d, 0o700), unix.EEXIST)
	try("noreplace", unix.Renameat2(unix.AT_FDCWD, c, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE), unix.EEXIST)
	try("exchange", unix.Renameat2(unix.AT_FDCWD, c, unix.AT_FDCWD, d, unix.RENAME_EXCHANGE), nil)
	try("rmdir of what was exchanged", os.Remove(c), nil)
	errs = append(errs, linksOf(d, 2))
	try("symlink", os.Symlink("target", c), nil)
	if target, err := os.Readlink(c); err != nil || target != "target" {
		errs = append(errs, fmt.Errorf("readlink: %q, %v", target, err))
	}
	try("mknod", unix.Mknod(a, unix.S_IFIFO|0o600, 0), nil)
	try("rename over", os.Rename(c, a), nil)
	try("setxattr", unix.Setxattr(d, "user.x", []byte("1"), unix.XATTR_CREATE), nil)
	try("setxattr again", unix.Setxattr(d, "user.x", []byte("1"), unix.XATTR_CREATE), unix.EEXIST)
	try("removexattr", unix.Removexattr(d, "user.x"), nil)
	try("removexattr again", unix.Removexattr(d, "user.x"), unix.ENODATA)
	try("unlink", os.Remove(b), nil)
	try("unlink again", syscall.Unlink(b), unix.ENOENT)
	errs = append(errs, linksOf(d, 1))
	errs = append(errs, tmpfile(dir, c))
	var st unix.Stat_t
	try("unlink of an open file", os.Remove(d), nil)
	try("fstat", unix.Fstat(int(f.Fd()), &st), nil)
	if st.Nlink != 0 || st.Size != int64(len(content)) {
		errs = append(errs, fmt.Errorf("the unlinked file has %d links and %d bytes", st.Nlink, st.Size))
	}
	back := make([]byte, 64)
	if n, err := f.ReadAt(back, 0); err != io.EOF || string(back[:n]) != content {
		errs = append(errs, fmt.Errorf("read back: %q, %v", back[:n], err))
	}
	entries, err := os.ReadDir(dir)
	try("readdir", err, nil)
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{filepath.Base(a), filepath.Base(c)}; !slices.Equal(left, want) {
		errs = append(errs, fmt.Errorf("the directory holds %q, want %q", left, want))
	}
	try("unlink", os.Remove(a), nil)
	try("unlink", os.Remove(c), nil)
	return errors.Join(errs...)
}

func linksOf(path string, want uint64) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || uint64(st.Nlink) != want {
		return fmt.Errorf("%s has %d links, want %d: %v", filepath.Base(path), st.Nlink, want, err)
	}
	return nil
}

// tmpfile makes a file without a name and gives it one.
func tmpfile(dir, name string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("tmpfile: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		return fmt.Errorf("write of a tmpfile: %w", err)
	}
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprint("/proc/self/fd/", fd), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("link of a tmpfile: %w", err)
	}
	return linksOf(name, 1)
}

// lines has eight threads append lines to one file, each by a descriptor of its own.
func lines(args []string) int {
	const threads = 8
	files := make([]*os.File, threads)
	for i := range files {
		f, err := os.OpenFile(filepath.Join(args[0], "lines"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer f.Close()
		files[i] = f
	}
	var counts [threads]int
	code := until(threads, func(thread, i int) error {
		_, err := fmt.Fprintf(files[thread], "%d %d\n", thread, i)
		counts[thread] = i + 1
		return err
	})
	body, err := os.ReadFile(filepath.Join(args[0], "lines"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var next [threads]int
	for line := range bytes.Lines(body) {
		var thread, i int
		if _, err := fmt.Sscanf(string(line), "%d %d\n", &thread, &i); err != nil || thread >= threads || i != next[thread] {
			fmt.Fprintf(os.Stderr, "line %q, and the next of its thread was to be %v: %v\n", line, next, err)
			return 1
		}
		next[thread]++
	}
	if next != counts {
		fmt.Fprintf(os.Stderr, "%v lines were written, %v are there\n", counts, next)
		return 1
	}
	return code
}

// unlinked reads a file that has no name.
func unlinked(args []string) int {
	path := filepath.Join(args[0], "unlinked")
	want := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	err := os.WriteFile(path, want, 0o600)
	f, oerr := os.Open(path)
	if err = errors.Join(err, oerr, os.Remove(path)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer f.Close()
	buf := make([]byte, 4096)
	return until(2, func(_, i int) error {
		buf := slices.Clone(buf)
		off := rand.Int64N(int64(len(want) - len(buf)))
		if _, err := f.ReadAt(buf, off); err != nil || !bytes.Equal(buf, want[off:off+int64(len(buf))]) {
			return fmt.Errorf("read at %d: %v, or other bytes", off, err)
		}
		if i%512 == 0 {
			_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		return nil
	})
}

// inside works in a directory by its working directory and by an open descriptor, and in one that is
// removed.
func inside(args []string) int {
	dir := filepath.Join(args[0], "inside")
	gone := filepath.Join(args[0], "gone")
	err := errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(gone, 0o755), os.Chdir(dir))
	open, oerr := os.Open(gone)
	if err = errors.Join(err, oerr, os.Remove(gone)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for i := range 2000 {
		if err := os.WriteFile(fmt.Sprint("f", i), nil, 0o600); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return until(1, func(_, i int) error {
		d, err := os.Open(".") // read in pieces: a daemon may die in between
		if err != nil {
			return err
		}
		defer d.Close()
		seen := make(map[string]bool)
		for {
			names, err := d.Readdirnames(50)
			for _, name := range names {
				if seen[name] {
					return fmt.Errorf("%s is listed twice", name)
				}
				seen[name] = true
			}
			if err == io.EOF {
				break
			} else if err != nil {
				return err
			}
		}
		if len(seen) != 2000 {
			return fmt.Errorf("%d names of 2000", len(seen))
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(open.Fd()), &st); err != nil || st.Nlink != 0 {
			return fmt.Errorf("the removed directory: %d links, %v", st.Nlink, err)
		}
		if wd, err := os.Getwd(); err != nil || !strings.HasSuffix(wd, "inside") {
			return fmt.Errorf("the working directory is %s: %v", wd, err)
		}
		return check("a name in the removed directory", unix.Mkdirat(int(open.Fd()), "x", 0o700), unix.ENOENT)
	})
}

// locks holds locks of both kinds, which no one else may get.
func locks(args []string) int {
	path := filepath.Join(args[0], "locked")
	held, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = errors.Join(unix.Flock(int(held.Fd()), unix.LOCK_EX),
			unix.FcntlFlock(held.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10}))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer held.Close()
	return until(1, func(int, int) error {
		other, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer other.Close()
		free := &unix.Flock_t{Type: unix.F_WRLCK, Start: 20, Len: 10}
		return errors.Join(
			check("flock of another", unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK),
			check("lock of another", unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 15, Len: 10}), unix.EAGAIN),
			check("lock beside it", unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, free), nil))
	})
}

// stores writes by a shared mapping and reads by read(2).
func stores(args []string) int {
	const size = 1 << 20
	f, err := os.OpenFile(filepath.Join(args[0], "mapped"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		_, err = f.Write(make([]byte, size))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return until(1, func(_, i int) error {
		at := rand.IntN(size/4096) * 4096
		want := fmt.Appendf(nil, "%20d", i)
		copy(mem[at:], want)
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, int64(at)); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("stored %q at %d, read %q: %v", want, at, got, err)
		}
		if i%100 == 0 {
			return unix.Msync(mem[at:at+4096], unix.MS_SYNC)
		}
		return nil
	})
}

// fill writes files until the volume is full, and removes them.
func fill(args []string) int {
	buf := make([]byte, 256<<10)
	return until(2, func(thread, i int) error {
		path := filepath.Join(args[0], fmt.Sprint("fill", thread))
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if errors.Is(err, unix.ENOSPC) {
			return nil
		} else if err != nil {
			return err
		}
		defer f.Close()
		for err == nil {
			_, err = unix.Write(int(f.Fd()), buf)
		}
		return errors.Join(check("write", err, unix.ENOSPC), os.Remove(path))
	})
}

// pace reads and writes an open file, 4 KiB at a time, and says how long that took at the most.
func pace(args []string) int {
	f, err := os.OpenFile(filepath.Join(args[0], "pace"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		_, err = f.Write(make([]byte, 1<<20))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer f.Close()
	buf := make([]byte, 4096)
	var longest [2]time.Duration
	code := until(1, func(_, i int) error {
		off := int64(i%256) * 4096
		began := time.Now()
		_, err := f.WriteAt(buf, off)
		wrote := time.Since(began)
		_, rerr := f.ReadAt(buf, off)
		longest[0], longest[1] = max(longest[0], wrote), max(longest[1], time.Since(began)-wrote)
		time.Sleep(time.Millisecond)
		return errors.Join(err, rerr)
	})
	fmt.Printf("longest write %s, longest read %s\n", longest[0], longest[1])
	return code
}
