package posix_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

func TestCopyFileRange(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		content := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
		src, dst := create(t, filepath.Join(dir, "src")), create(t, filepath.Join(dir, "dst"))
		_, err := src.Write(content)
		kit.OK(t, err)
		for in, out := int64(0), int64(100); in < int64(len(content)); {
			n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, len(content), 0)
			kit.OK(t, err)
			if n == 0 {
				t.Fatalf("nothing copied at %d", in)
			}
		}
		got, err := os.ReadFile(dst.Name())
		kit.OK(t, err)
		if !bytes.Equal(got, append(make([]byte, 100), content...)) {
			t.Errorf("the copy differs (%d bytes)", len(got))
		}
		// Within one file, not overlapping; overlapping is refused; from the end nothing comes.
		in, out := int64(0), int64(1<<20)
		// A backing filesystem that shares blocks may stop at the last whole one.
		if n, err := unix.CopyFileRange(int(src.Fd()), &in, int(src.Fd()), &out, 5000, 0); err != nil || n != 5000 && n != 4096 {
			t.Errorf("within one file: %d, %v", n, err)
		}
		in, out = 0, 100
		_, err = unix.CopyFileRange(int(src.Fd()), &in, int(src.Fd()), &out, 5000, 0)
		kit.IsErr(t, "overlapping", err, unix.EINVAL)
		in, out = 1<<30, 0
		if n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, 10, 0); n != 0 || err != nil {
			t.Errorf("from beyond the end: %d, %v", n, err)
		}
		// What was cached of the target before is not what is read after.
		back := make([]byte, 16)
		_, err = dst.ReadAt(back, 0)
		kit.OK(t, err)
		in, out = 0, 0
		_, err = unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, 4096, 0)
		kit.OK(t, err)
		if _, err := dst.ReadAt(back, 0); err != nil || string(back) != "0123456789abcdef" {
			t.Errorf("read after the copy: %q, %v", back, err)
		}
	})
}

func TestSeekHoles(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		f := create(t, filepath.Join(dir, "f"))
		kit.OK(t, f.Truncate(8<<20))
		_, err := f.WriteAt(make([]byte, 1<<20), 2<<20)
		kit.OK(t, err)
		seek := func(from int64, whence int) int64 {
			t.Helper()
			at, err := unix.Seek(int(f.Fd()), from, whence)
			kit.OK(t, err)
			return at
		}
		for _, test := range []struct {
			from   int64
			whence int
			want   int64
		}{
			{0, unix.SEEK_DATA, 2 << 20}, {0, unix.SEEK_HOLE, 0}, {2 << 20, unix.SEEK_HOLE, 3 << 20},
			{2<<20 + 7, unix.SEEK_DATA, 2<<20 + 7}, {5 << 20, unix.SEEK_HOLE, 5 << 20},
		} {
			if at := seek(test.from, test.whence); at != test.want {
				t.Errorf("whence %d from %d: %d, want %d", test.whence, test.from, at, test.want)
			}
		}
		_, err = unix.Seek(int(f.Fd()), 4<<20, unix.SEEK_DATA)
		kit.IsErr(t, "no more data", err, unix.ENXIO)
		_, err = unix.Seek(int(f.Fd()), 9<<20, unix.SEEK_HOLE)
		kit.IsErr(t, "beyond the end", err, unix.ENXIO)
	})
}

func TestFallocate(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		f := create(t, filepath.Join(dir, "f"))
		fd := int(f.Fd())
		size := func() int64 { return kit.Stat(t, f.Name()).Size }
		blocks := func() int64 { return kit.Stat(t, f.Name()).Blocks * 512 }
		kit.OK(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
		if size() != 0 || blocks() < 1<<20 {
			t.Errorf("KEEP_SIZE: size %d, %d allocated", size(), blocks())
		}
		kit.OK(t, unix.Fallocate(fd, 0, 0, 1<<20))
		if size() != 1<<20 {
			t.Errorf("size %d", size())
		}
		content := bytes.Repeat([]byte("x"), 1<<20)
		_, err := f.WriteAt(content, 0)
		kit.OK(t, err)
		kit.OK(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1000, 200_000))
		clear(content[1000:201_000])
		kit.OK(t, unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 500_000, 100_000))
		clear(content[500_000:600_000])
		if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, content) {
			t.Errorf("punched and zeroed: %d bytes that are not right, %v", len(got), err)
		}
		kit.OK(t, unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 1<<20, 4096))
		if size() != 1<<20+4096 {
			t.Errorf("ZERO_RANGE: size %d", size())
		}
		for _, mode := range []uint32{unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_INSERT_RANGE, unix.FALLOC_FL_UNSHARE_RANGE} {
			kit.IsErr(t, fmt.Sprintf("mode %#x", mode), unix.Fallocate(fd, mode, 0, 4096), unix.EOPNOTSUPP)
		}
		kit.IsErr(t, "nothing", unix.Fallocate(fd, 0, 0, 0), unix.EINVAL)
	})
}

func TestLargeFile(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		f := create(t, filepath.Join(dir, "f"))
		places := []int64{0, 1<<31 - 3, 1<<32 - 3, 1<<32 + 5, 1 << 40}
		for i, at := range places {
			_, err := f.WriteAt([]byte(fmt.Sprint("place ", i)), at)
			kit.OK(t, err)
		}
		for i, at := range places {
			b := make([]byte, 7)
			if _, err := f.ReadAt(b, at); err != nil || string(b) != fmt.Sprint("place ", i) {
				t.Errorf("at %d: %q, %v", at, b, err)
			}
		}
		if size := kit.Stat(t, f.Name()).Size; size != 1<<40+7 {
			t.Errorf("size %d", size)
		}
	})
}

func TestMmap(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		f := create(t, filepath.Join(dir, "f"))
		kit.OK(t, f.Truncate(64<<10))
		shared, err := unix.Mmap(int(f.Fd()), 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		kit.OK(t, err)
		private, err := unix.Mmap(int(f.Fd()), 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		kit.OK(t, err)
		copy(shared[5000:], "shared")
		copy(private[9000:], "private")
		b := make([]byte, 7)
		if _, err := f.ReadAt(b, 5000); err != nil || string(b[:6]) != "shared" {
			t.Errorf("read of a store: %q, %v", b, err)
		}
		if _, err := f.ReadAt(b, 9000); err != nil || string(b) == "private" {
			t.Errorf("a private store is in the file: %q, %v", b, err)
		}
		_, err = f.WriteAt([]byte("written"), 20_000)
		kit.OK(t, err)
		if string(shared[20_000:20_007]) != "written" || string(private[20_000:20_007]) != "written" {
			t.Error("a write is not in the mappings")
		}
		kit.OK(t, unix.Msync(shared, unix.MS_SYNC))
		kit.OK(t, unix.Munmap(private))
		// The mapping outlives the descriptor.
		f.Close()
		copy(shared[30_000:], "later")
		kit.OK(t, unix.Msync(shared, unix.MS_SYNC))
		kit.OK(t, unix.Munmap(shared))
		got, err := os.ReadFile(f.Name())
		kit.OK(t, err)
		if string(got[5000:5006]) != "shared" || string(got[30_000:30_005]) != "later" {
			t.Error("stores are lost")
		}
	})
}

func TestAppendProcesses(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "log")
		write(t, path, "")
		const writers, lines = 4, 500
		done := make(chan kit.Result, writers)
		for w := range writers {
			go func() {
				done <- kit.Process{Helper: "append", Args: []string{path, fmt.Sprint(lines), fmt.Sprint("w", w)}}.Run(t)
			}()
		}
		for range writers {
			if r := <-done; r.Code != 0 {
				t.Errorf("writer: %s", r)
			}
		}
		body, err := os.ReadFile(path)
		kit.OK(t, err)
		next := map[string]int{}
		for line := range strings.Lines(string(body)) {
			var w, rest string
			var i int
			if n, _ := fmt.Sscan(line, &w, &i, &rest); n < 2 || i != next[w] || len(rest) != i%300 {
				t.Fatalf("a torn or lost line: %q, wanted %d of %s", line, next[w], w)
			}
			next[w]++
		}
		for w := range writers {
			if n := next[fmt.Sprint("w", w)]; n != lines {
				t.Errorf("writer %d: %d lines", w, n)
			}
		}
	})
}

func TestDirectAndSync(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "f")
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o644)
		kit.OK(t, err)
		defer unix.Close(fd)
		buf := aligned(8192)
		for i := range buf {
			buf[i] = byte(i / 7)
		}
		if n, err := unix.Pwrite(fd, buf, 4096); n != len(buf) || err != nil {
			t.Fatalf("O_DIRECT write: %d, %v", n, err)
		}
		got := aligned(8192)
		if n, err := unix.Pread(fd, got, 4096); n != len(got) || err != nil || !bytes.Equal(got, buf) {
			t.Errorf("O_DIRECT read: %d, %v", n, err)
		}
		body, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(body[4096:], buf) {
			t.Errorf("a cached read after it: %v", err)
		}
		// A direct write replaces what was just cached.
		buf[0] = 'Z'
		_, err = unix.Pwrite(fd, buf, 4096)
		kit.OK(t, err)
		if body, err = os.ReadFile(path); err != nil || body[4096] != 'Z' {
			t.Errorf("stale after a direct write: %q, %v", body[4096], err)
		}
		for _, flag := range []int{unix.O_SYNC, unix.O_DSYNC} {
			fd, err := unix.Open(path, unix.O_WRONLY|flag, 0)
			kit.OK(t, err)
			if n, err := unix.Pwrite(fd, []byte("synced"), 0); n != 6 || err != nil {
				t.Errorf("flags %#x: %d, %v", flag, n, err)
			}
			unix.Close(fd)
		}
		d, err := os.Open(dir)
		kit.OK(t, err)
		defer d.Close()
		kit.OK(t, d.Sync())
		kit.OK(t, unix.Fdatasync(fd))
		kit.OK(t, unix.Syncfs(fd))
	})
}

// aligned returns memory that starts at a page, as O_DIRECT may want.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := int(4096 - uintptr(unsafe.Pointer(&b[0]))%4096)
	return b[skip : skip+n]
}

func TestTimes(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "f")
		write(t, path, "x")
		set := func(atime, mtime unix.Timespec) unix.Stat_t {
			t.Helper()
			kit.OK(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{atime, mtime}, 0))
			return kit.Stat(t, path)
		}
		st := set(unix.Timespec{Sec: 1_000_000_000, Nsec: 123_456_789}, unix.Timespec{Sec: 2_000_000_000, Nsec: 987_654_321})
		if st.Atim.Sec != 1_000_000_000 || st.Atim.Nsec != 123_456_789 || st.Mtim.Sec != 2_000_000_000 || st.Mtim.Nsec != 987_654_321 {
			t.Errorf("atime %v, mtime %v", st.Atim, st.Mtim)
		}
		st = set(unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Sec: 5})
		if st.Atim.Sec != 1_000_000_000 || st.Mtim.Sec != 5 {
			t.Errorf("OMIT: atime %v, mtime %v", st.Atim, st.Mtim)
		}
		st = set(unix.Timespec{Nsec: unix.UTIME_NOW}, unix.Timespec{Nsec: unix.UTIME_OMIT})
		if st.Atim.Sec <= 1_000_000_000 || st.Mtim.Sec != 5 {
			t.Errorf("NOW: atime %v, mtime %v", st.Atim, st.Mtim)
		}
		// A write moves mtime and ctime, chmod moves ctime only.
		before := kit.Stat(t, path)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		kit.OK(t, err)
		_, err = f.WriteString("y")
		kit.OK(t, errors.Join(err, f.Close()))
		after := kit.Stat(t, path)
		if after.Mtim.Nano() <= before.Mtim.Nano() || after.Ctim.Nano() < before.Ctim.Nano() {
			t.Errorf("write: mtime %v → %v, ctime %v → %v", before.Mtim, after.Mtim, before.Ctim, after.Ctim)
		}
		kit.OK(t, os.Chmod(path, 0o600))
		if st := kit.Stat(t, path); st.Mtim != after.Mtim || st.Ctim.Nano() < after.Ctim.Nano() {
			t.Errorf("chmod: mtime %v → %v, ctime %v → %v", after.Mtim, st.Mtim, after.Ctim, st.Ctim)
		}
		// The birth time comes with statx, and stays.
		var stx unix.Statx_t
		kit.OK(t, unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BTIME|unix.STATX_BASIC_STATS, &stx))
		if stx.Mask&unix.STATX_BTIME == 0 || stx.Btime.Sec == 0 || stx.Btime.Sec > st.Ctim.Sec+1 {
			t.Errorf("birth time %v, mask %#x", stx.Btime, stx.Mask)
		}
		// Of a symbolic link itself.
		kit.OK(t, os.Symlink("f", path+"l"))
		kit.OK(t, unix.UtimesNanoAt(unix.AT_FDCWD, path+"l", []unix.Timespec{{Sec: 7}, {Sec: 8}}, unix.AT_SYMLINK_NOFOLLOW))
		if st := kit.Stat(t, path+"l"); st.Mtim.Sec != 8 {
			t.Errorf("mtime of a link: %v", st.Mtim)
		}
	})
}

func TestLocks(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		for _, kind := range []string{"flock", "posix", "ofd"} {
			path := filepath.Join(dir, kind)
			write(t, path, strings.Repeat("x", 100))
			holder := kit.Process{Helper: "lock", Args: []string{kind, path}}.Start(t)
			if got := holder.Line(); got != "locked" {
				t.Fatalf("%s: the first process is %s", kind, got)
			}
			other := func() string {
				r := kit.Process{Helper: "lock", Args: []string{kind, path, "try"}}.Run(t)
				return strings.TrimSpace(r.Stdout)
			}
			if got := other(); got != "refused" {
				t.Errorf("%s: the second process is %q", kind, got)
			}
			// A lock goes with its process, however that ends.
			holder.Kill()
			if got := other(); got != "locked" {
				t.Errorf("%s: after the first has died the second is %q", kind, got)
			}
		}
	})
}
