package posix_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

func TestRename(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		at := func(name string) string { return filepath.Join(dir, name) }
		rename := func(from, to string, flags uint) error {
			return unix.Renameat2(unix.AT_FDCWD, at(from), unix.AT_FDCWD, at(to), flags)
		}
		write(t, at("a"), "a")
		write(t, at("b"), "b")
		kit.IsErr(t, "NOREPLACE", rename("a", "b", unix.RENAME_NOREPLACE), unix.EEXIST)
		kit.OK(t, rename("a", "c", unix.RENAME_NOREPLACE))
		kit.OK(t, rename("c", "b", unix.RENAME_EXCHANGE))
		expect(t, at("b"), "a")
		expect(t, at("c"), "b")
		kit.IsErr(t, "EXCHANGE with nothing", rename("c", "none", unix.RENAME_EXCHANGE), unix.ENOENT)
		kit.IsErr(t, "both", rename("b", "c", unix.RENAME_EXCHANGE|unix.RENAME_NOREPLACE), unix.EINVAL)
		// A directory and a file change places.
		kit.OK(t, os.Mkdir(at("d"), 0o755))
		write(t, at("d/inner"), "inner")
		kit.OK(t, rename("d", "b", unix.RENAME_EXCHANGE))
		expect(t, at("b/inner"), "inner")
		expect(t, at("d"), "a")
		// Over an existing file and an empty directory; not over a full one, nor into itself.
		kit.OK(t, rename("c", "d", 0))
		expect(t, at("d"), "b")
		kit.OK(t, os.Mkdir(at("empty"), 0o755))
		kit.OK(t, os.Mkdir(at("full"), 0o755))
		write(t, at("full/x"), "x")
		if err := rename("empty", "full", 0); err != unix.ENOTEMPTY && err != unix.EEXIST { // POSIX has both, xfs the other one
			t.Errorf("over a full directory: %v", err)
		}
		kit.OK(t, rename("full", "empty", 0))
		expect(t, at("empty/x"), "x")
		kit.OK(t, os.Mkdir(at("empty/below"), 0o755))
		kit.IsErr(t, "into itself", rename("empty", "empty/below/y", 0), unix.EINVAL)
		kit.IsErr(t, "a file over a directory", rename("d", "empty", 0), unix.EISDIR)
		kit.IsErr(t, "a directory over a file", rename("empty", "d", 0), unix.ENOTDIR)
		// Two names of one file: nothing happens.
		kit.OK(t, os.Link(at("d"), at("d2")))
		kit.OK(t, rename("d", "d2", 0))
		expect(t, at("d"), "b")
		expect(t, at("d2"), "b")
	})
}

// TestRenameChangesCtime holds what pjdfstest asks of file systems that it knows
// by name only: a rename is a change of status, as on ext4, xfs and btrfs.
func TestRenameChangesCtime(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		old, renamed := filepath.Join(dir, "old"), filepath.Join(dir, "renamed")
		changed := func(path string) int64 {
			var st unix.Stat_t
			kit.OK(t, unix.Lstat(path, &st))
			return st.Ctim.Nano()
		}
		for what, create := range map[string]func() error{
			"file":      func() error { return os.WriteFile(old, nil, 0o644) },
			"directory": func() error { return os.Mkdir(old, 0o755) },
			"symlink":   func() error { return os.Symlink("nowhere", old) },
			"FIFO":      func() error { return unix.Mkfifo(old, 0o644) },
		} {
			kit.OK(t, create())
			before := changed(old)
			for after := before; after == before; { // the clock of inodes ticks coarsely
				kit.OK(t, unix.Rename(old, renamed))
				after = changed(renamed)
				if after < before {
					t.Fatalf("%s: the change time went back", what)
				}
				kit.OK(t, unix.Rename(renamed, old))
			}
			kit.OK(t, os.Remove(old))
		}
	})
}

func TestTmpfile(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		open := func(flags int) *os.File {
			fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|flags, 0o640)
			kit.OK(t, err)
			f := os.NewFile(uintptr(fd), "tmpfile")
			t.Cleanup(func() { f.Close() })
			return f
		}
		f := open(0)
		_, err := f.WriteString("nameless")
		kit.OK(t, err)
		var st unix.Stat_t
		kit.OK(t, unix.Fstat(int(f.Fd()), &st))
		if st.Nlink != 0 || st.Size != 8 || st.Mode != unix.S_IFREG|0o640 {
			t.Errorf("nlink %d, size %d, mode %o", st.Nlink, st.Size, st.Mode)
		}
		if names := list(t, dir); len(names) != 0 {
			t.Errorf("the directory holds %v", names)
		}
		path := filepath.Join(dir, "named")
		// Both ways that linkat(2) knows.
		kit.OK(t, unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW))
		expect(t, path, "nameless")
		kit.OK(t, unix.Linkat(int(f.Fd()), "", unix.AT_FDCWD, path+"2", unix.AT_EMPTY_PATH))
		if n := kit.Stat(t, path).Nlink; n != 2 {
			t.Errorf("nlink %d", n)
		}
		_, err = f.WriteString(" no more")
		kit.OK(t, err)
		expect(t, path+"2", "nameless no more")
		exclusive := open(unix.O_EXCL)
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", exclusive.Fd()), unix.AT_FDCWD, path+"3", unix.AT_SYMLINK_FOLLOW)
		kit.IsErr(t, "link of an O_EXCL one", err, unix.ENOENT)
	})
}

func TestLinkCounts(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		at := func(name string) string { return filepath.Join(dir, name) }
		write(t, at("a"), "x")
		expectLinks := func(name string, want uint64) {
			t.Helper()
			if n := uint64(kit.Stat(t, at(name)).Nlink); n != want {
				t.Errorf("%s has %d links, want %d", name, n, want)
			}
		}
		kit.OK(t, os.Link(at("a"), at("b")))
		kit.OK(t, os.Link(at("b"), at("c")))
		expectLinks("a", 3)
		f, err := os.Open(at("a"))
		kit.OK(t, err)
		defer f.Close()
		kit.OK(t, os.Remove(at("b")))
		expectLinks("c", 2)
		write(t, at("other"), "other")
		kit.OK(t, os.Rename(at("other"), at("c")))
		expectLinks("a", 1)
		kit.OK(t, os.Remove(at("a")))
		var st unix.Stat_t
		kit.OK(t, unix.Fstat(int(f.Fd()), &st))
		if st.Nlink != 0 {
			t.Errorf("%d links after the last name is gone", st.Nlink)
		}
		kit.OK(t, os.Mkdir(at("d"), 0o755))
		kit.IsErr(t, "link of a directory", os.Link(at("d"), at("e")), unix.EPERM)
		// A symbolic link can have links itself.
		kit.OK(t, os.Symlink("nowhere", at("s")))
		kit.OK(t, os.Link(at("s"), at("s2")))
		expectLinks("s2", 2)
	})
}

func TestUnlinkedOpen(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		f := create(t, filepath.Join(dir, "f"))
		_, err := f.WriteString("still here")
		kit.OK(t, err)
		kit.OK(t, os.Remove(f.Name()))
		kit.IsErr(t, "lookup", unix.Access(f.Name(), unix.F_OK), unix.ENOENT)
		buf := make([]byte, 10)
		if _, err := f.ReadAt(buf, 0); err != nil || string(buf) != "still here" {
			t.Errorf("read: %q, %v", buf, err)
		}
		_, err = f.WriteAt([]byte("!"), 1<<20)
		kit.OK(t, err)
		kit.OK(t, f.Truncate(5))
		kit.OK(t, f.Chmod(0o600))
		kit.OK(t, unix.Fsetxattr(int(f.Fd()), "user.x", []byte("y"), 0))
		kit.OK(t, f.Sync())
		again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
		kit.OK(t, err)
		f.Close()
		if fi, err := again.Stat(); err != nil || fi.Size() != 5 || fi.Mode().Perm() != 0o600 {
			t.Errorf("opened again: %v, %v", fi, err)
		}
		again.Close()
		// A file that a rename replaces, and a directory that is removed while open.
		old := create(t, filepath.Join(dir, "old"))
		_, err = old.WriteString("old")
		kit.OK(t, err)
		write(t, filepath.Join(dir, "new"), "new")
		kit.OK(t, os.Rename(filepath.Join(dir, "new"), old.Name()))
		if _, err := old.ReadAt(buf[:3], 0); err != nil || string(buf[:3]) != "old" {
			t.Errorf("replaced: %q, %v", buf[:3], err)
		}
		expect(t, old.Name(), "new")
		kit.OK(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		d, err := os.Open(filepath.Join(dir, "d"))
		kit.OK(t, err)
		defer d.Close()
		kit.OK(t, os.Remove(d.Name()))
		var st unix.Stat_t
		kit.OK(t, unix.Fstat(int(d.Fd()), &st))
		kit.IsErr(t, "create in a removed directory", closed(unix.Openat(int(d.Fd()), "x", unix.O_CREAT|unix.O_WRONLY, 0o644)), unix.ENOENT)
		_, err = unix.Getdents(int(d.Fd()), buf)
		kit.IsErr(t, "readdir of a removed directory", err, unix.ENOENT) // fs/readdir.c, iterate_dir
		kit.OK(t, d.Sync())
		kit.OK(t, d.Chmod(0o711))
		kit.OK(t, d.Chown(7, 8))
		kit.OK(t, unix.Futimes(int(d.Fd()), []unix.Timeval{{Sec: 5}, {Sec: 6}}))
		_, err = unix.Fgetxattr(int(d.Fd()), "user.none", buf)
		kit.IsErr(t, "attribute of a removed directory", err, unix.ENODATA)
		st, before := unix.Stat_t{}, st
		kit.OK(t, unix.Fstat(int(d.Fd()), &st))
		if st.Nlink != 0 || st.Mode != unix.S_IFDIR|0o711 || st.Uid != 7 || st.Gid != 8 || st.Atim.Sec != 5 || st.Mtim.Sec != 6 || st.Ino != before.Ino {
			t.Errorf("a removed directory: %+v, before %+v", st, before)
		}
		here, err := unix.Openat(int(d.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		kit.OK(t, closed(here, err))
	})
}

func closed(fd int, err error) error {
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	f, err := os.Open(dir)
	kit.OK(t, err)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	kit.OK(t, err)
	return names
}

func TestLargeDirectory(t *testing.T) {
	const entries = 10_000
	each(t, func(t *testing.T, dir string) {
		for i := range entries {
			kit.OK(t, unix.Mknod(filepath.Join(dir, fmt.Sprintf("entry-%05d", i)), unix.S_IFREG|0o644, 0))
		}
		for pass := range 2 { // the second one from the kernel's cache
			seen := map[string]int{}
			for _, name := range list(t, dir) {
				seen[name]++
			}
			if len(seen) != entries {
				t.Errorf("pass %d: %d names", pass, len(seen))
			}
			for name, n := range seen {
				if n != 1 {
					t.Errorf("pass %d: %s came %d times", pass, name, n)
				}
			}
		}
		// Seeking back to a cookie gives what came after it, whether the kernel
		// remembers that or asks again: how many entries come at a time is
		// another then.
		dirfd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		kit.OK(t, err)
		defer unix.Close(dirfd)
		some := func() []string {
			buf := make([]byte, 4096)
			n, err := unix.Getdents(dirfd, buf)
			kit.OK(t, err)
			_, _, names := unix.ParseDirent(buf[:n], -1, nil)
			return names
		}
		all := func() (names []string) {
			for {
				more := some()
				if len(more) == 0 {
					return names
				}
				names = append(names, more...)
			}
		}
		drop := func() { kit.OK(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0)) }
		begun := some()
		cookie, err := unix.Seek(dirfd, 0, unix.SEEK_CUR)
		kit.OK(t, err)
		rest := all()
		if n := len(begun) + len(rest); n != entries {
			t.Errorf("%d names, and %d after them", len(begun), len(rest))
		}
		for _, state := range []string{"remembered", "dropped between", "dropped before"} {
			if state == "dropped before" {
				drop()
			}
			_, err = unix.Seek(dirfd, cookie, unix.SEEK_SET)
			kit.OK(t, err)
			again := some()
			if state == "dropped between" {
				drop()
			}
			if again = append(again, all()...); !slices.Equal(again, rest) {
				t.Errorf("%s: after seeking back %d names are read, which are not the %d of before", state, len(again), len(rest))
			}
		}
		for i := range entries {
			kit.OK(t, unix.Unlink(filepath.Join(dir, fmt.Sprintf("entry-%05d", i))))
		}
		if names := list(t, dir); len(names) != 0 {
			t.Errorf("%d names are left", len(names))
		}
	})
}

func TestReaddirWhileChanging(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		const stable = 500
		for i := range stable {
			write(t, filepath.Join(dir, fmt.Sprintf("stable-%03d", i)), "")
		}
		var stop atomic.Bool
		var changers sync.WaitGroup
		faults := make(chan error, 4)
		for c := range 2 {
			changers.Go(func() {
				for i := 0; !stop.Load(); i++ {
					path := filepath.Join(dir, fmt.Sprintf("comes-%d-%d", c, i%700))
					err := os.Remove(path)
					if errors.Is(err, os.ErrNotExist) {
						err = os.WriteFile(path, nil, 0o644)
					}
					if err == nil && i%5 == 0 {
						err = os.Rename(path, path+"r")
						if errors.Is(err, os.ErrNotExist) {
							err = nil
						}
					}
					if err != nil {
						faults <- err
						return
					}
				}
			})
		}
		rounds := 50
		if testing.Short() {
			rounds = 10
		}
		// Several at a time: they share a stream.
		var listers sync.WaitGroup
		for lister := range 3 {
			listers.Go(func() {
				for round := 0; round < rounds && !t.Failed(); round++ {
					seen := map[string]int{}
					f, err := os.Open(dir)
					if err != nil {
						t.Error(err)
						return
					}
					for {
						names, err := f.Readdirnames(20)
						for _, name := range names {
							seen[name]++
						}
						if err != nil {
							break
						}
					}
					f.Close()
					for i := range stable {
						if n := seen[fmt.Sprintf("stable-%03d", i)]; n != 1 {
							t.Errorf("lister %d, round %d: stable-%03d came %d times", lister, round, i, n)
						}
					}
				}
			})
		}
		listers.Wait()
		stop.Store(true)
		changers.Wait()
		close(faults)
		for err := range faults {
			t.Error(err)
		}
	})
}

func TestSpecialFiles(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		fifo := filepath.Join(dir, "fifo")
		kit.OK(t, unix.Mkfifo(fifo, 0o644))
		socket := filepath.Join(dir, "socket")
		kit.OK(t, unix.Mknod(socket, unix.S_IFSOCK|0o600, 0))
		kit.OK(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		if st := kit.Stat(t, filepath.Join(dir, "null")); st.Rdev != unix.Mkdev(1, 3) || st.Mode != unix.S_IFCHR|0o600 {
			t.Errorf("device %x, mode %o", st.Rdev, st.Mode)
		}
		if st := kit.Stat(t, socket); st.Mode != unix.S_IFSOCK|0o600 {
			t.Errorf("mode %o", st.Mode)
		}
		// Through the FIFO, each end with an open of its own.
		got := make(chan string, 1)
		go func() {
			b, err := os.ReadFile(fifo)
			got <- fmt.Sprint(string(b), err)
		}()
		write(t, fifo, "through")
		if s := <-got; s != "through<nil>" {
			t.Errorf("the FIFO gave %s", s)
		}
	})
}
