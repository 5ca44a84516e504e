package posix_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// eachTier is each in every tier: how an open file is treated depends on it.
func eachTier(t *testing.T, test func(t *testing.T, p *kit.Pool, dir string)) {
	t.Helper()
	kit.EachFS(t, func(t *testing.T, fstype string) {
		for _, tier := range kit.Tiers {
			t.Run(tier, func(t *testing.T) {
				p := kit.NewPool(t, fstype)
				p.MountArgs = []string{"--tier", tier}
				p.Mount()
				test(t, p, p.Create("v", 1*kit.Gi))
			})
		}
	})
}

func open(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatalf("open %s with %#x: %v", filepath.Base(path), flags, err)
	}
	return fd
}

func mapped(t *testing.T, fd, length, prot int) []byte {
	t.Helper()
	m, err := unix.Mmap(fd, 0, length, prot, unix.MAP_SHARED)
	kit.OK(t, err)
	return m
}

// A mapping outlives the close of the file that it was made of, and goes on to show what others do
// to the file, however they opened it.
func TestMappingOutlivesClose(t *testing.T) {
	eachTier(t, func(t *testing.T, p *kit.Pool, dir string) {
		path := filepath.Join(dir, "f")
		const size = 4 * 4096
		write(t, path, strings.Repeat("a", size))
		fd := open(t, path, unix.O_RDONLY)
		old := mapped(t, fd, size, unix.PROT_READ)
		private, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		kit.OK(t, err)
		unix.Close(fd)
		fd = open(t, path, unix.O_RDWR)
		m := mapped(t, fd, size, unix.PROT_READ|unix.PROT_WRITE)
		see := func(what string, at int, want byte) {
			t.Helper()
			b := make([]byte, 1)
			if _, err := unix.Pread(fd, b, int64(at)); err != nil {
				t.Error(err)
			}
			if old[at] != want || m[at] != want || private[at] != want || b[0] != want {
				t.Errorf("%s: the old mapping shows %q, a private one %q, the new one %q, the file %q", what, old[at], private[at], m[at], b[0])
			}
		}
		see("opened", 0, 'a')
		m[0] = 'b'
		see("stored", 0, 'b')
		_, err = unix.Pwrite(fd, []byte("c"), 4096)
		kit.OK(t, err)
		see("written", 4096, 'c')
		w := open(t, path, unix.O_WRONLY)
		_, err = unix.Pwrite(w, []byte("d"), 8192)
		kit.OK(t, err)
		see("written by another", 8192, 'd')
		unix.Close(w)
		unix.Close(fd)
		fd = open(t, path, unix.O_RDWR)
		m[1] = 'e' // of a file that is closed
		see("stored by a mapping of a closed file", 1, 'e')
		unix.Close(fd)
		for _, mapping := range [][]byte{old, m, private} {
			kit.OK(t, unix.Munmap(mapping))
		}
	})
}

// Who changes a file by whatever way changes its times and its mode as on a local disk.
func TestSetIDAndTimesAfterWrites(t *testing.T) {
	eachTier(t, func(t *testing.T, p *kit.Pool, dir string) {
		kit.OK(t, os.Chmod(dir, 0o777))
		path := filepath.Join(dir, "f")
		for _, flags := range []int{unix.O_WRONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_APPEND, unix.O_WRONLY | unix.O_SYNC, unix.O_WRONLY | unix.O_TRUNC} {
			for _, reader := range []bool{false, true} {
				_ = os.Remove(path)
				write(t, path, strings.Repeat("a", 8192))
				kit.OK(t, os.Chown(path, 64321, 64321))
				kit.OK(t, unix.Setxattr(path, "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
				kit.OK(t, unix.Chmod(path, 0o6755))
				past := []unix.Timespec{{Sec: 1000}, {Sec: 1000}}
				kit.OK(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, past, 0))
				if reader {
					fd := open(t, path, unix.O_RDONLY)
					defer unix.Close(fd)
				}
				if st := kit.Stat(t, path); st.Mode&0o7777 != 0o6755 {
					t.Fatalf("mode %o", st.Mode)
				}
				r := kit.Process{Helper: "writeonce", Args: []string{path, fmt.Sprint(flags)}, UID: 64321, GID: 64321}.Run(t)
				if r.Code != 0 {
					t.Fatalf("flags %#x: %s", flags, r)
				}
				st := kit.Stat(t, path)
				what := fmt.Sprintf("flags %#x, with a reader: %t", flags, reader)
				if st.Mode&0o6000 != 0 {
					t.Errorf("%s: the mode is %o after a write", what, st.Mode)
				}
				if st.Mtim.Sec == 1000 {
					t.Errorf("%s: the modification time is as before", what)
				}
				if n, err := unix.Getxattr(path, "security.capability", nil); err != unix.ENODATA {
					t.Errorf("%s: capabilities are left: %d, %v", what, n, err)
				}
			}
		}
	})
}

// Stores by a mapping show in the times a moment later at the most.
func TestTimesAfterStores(t *testing.T) {
	eachTier(t, func(t *testing.T, p *kit.Pool, dir string) {
		path := filepath.Join(dir, "f")
		write(t, path, strings.Repeat("a", 8192))
		reader := open(t, path, unix.O_RDONLY)
		defer unix.Close(reader)
		past := []unix.Timespec{{Sec: 1000}, {Sec: 1000}}
		kit.OK(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, past, 0))
		kit.Stat(t, path)
		fd := open(t, path, unix.O_RDWR)
		defer unix.Close(fd)
		kit.Stat(t, path)
		m := mapped(t, fd, 8192, unix.PROT_READ|unix.PROT_WRITE)
		m[0] = 'b'
		kit.OK(t, unix.Msync(m, unix.MS_SYNC))
		kit.Poll(t, "a new modification time", func() bool { return kit.Stat(t, path).Mtim.Sec != 1000 })
		kit.OK(t, unix.Munmap(m))
	})
}

// writeOnce writes a byte to a file opened with those flags.
func writeOnce(args []string) int {
	var flags int
	_, _ = fmt.Sscan(args[1], &flags)
	fd, err := unix.Open(args[0], flags, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte("x"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// world is a few files, who has them open and mapped, and what must be in them.
type world struct {
	t       *testing.T
	dir     string
	random  *rand.Rand
	files   map[string]*content
	open    []*opened
	maps    []*mapping
	history []string
}

type content struct{ data []byte }

type opened struct {
	fd, flags int
	of        *content
}

type mapping struct {
	mem []byte
	rw  bool
	of  *content
}

func (w *world) note(format string, args ...any) {
	w.history = append(w.history, fmt.Sprintf(format, args...))
}

func (w *world) fatal(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\n%s", fmt.Sprintf(format, args...), strings.Join(w.history[max(0, len(w.history)-60):], "\n"))
}

func (w *world) name() string { return fmt.Sprint("f", w.random.IntN(2)) }

const worldSize = 6 * 4096 // of what is mapped

func (w *world) step() {
	name := w.name()
	path := filepath.Join(w.dir, name)
	c := w.files[name]
	must := func(what string, err error) {
		w.t.Helper()
		if err != nil {
			w.fatal("%s %s: %v", what, name, err)
		}
	}
	resize := func(size int) {
		if size <= len(c.data) {
			c.data = c.data[:size]
		} else {
			c.data = append(c.data, make([]byte, size-len(c.data))...)
		}
	}
	switch k := w.random.IntN(18); {
	case c == nil:
		flags := []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR}[w.random.IntN(3)]
		w.note("create %s %d", name, flags)
		fd, err := unix.Open(path, flags|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
		must("create", err)
		c = &content{}
		w.files[name] = c
		w.open = append(w.open, &opened{fd, flags, c})
	case k < 5:
		flags := []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR}[w.random.IntN(3)] | []int{0, 0, 0, unix.O_SYNC, unix.O_TRUNC, unix.O_NOATIME}[w.random.IntN(6)]
		if flags&unix.O_ACCMODE == unix.O_RDONLY {
			flags &^= unix.O_TRUNC
		}
		w.note("open %s %#x", name, flags)
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		must("open", err)
		if flags&unix.O_TRUNC != 0 {
			c.data = nil
		}
		w.open = append(w.open, &opened{fd, flags, c})
	case k == 5 && w.random.IntN(3) == 0:
		w.note("close all")
		for _, o := range w.open {
			unix.Close(o.fd)
		}
		w.open = nil
		time.Sleep(time.Duration(w.random.IntN(3)) * time.Millisecond) // the daemon learns of it later
	case k < 9 && len(w.open) > 0:
		i := w.random.IntN(len(w.open))
		w.note("close %d", w.open[i].fd)
		unix.Close(w.open[i].fd)
		w.open = append(w.open[:i], w.open[i+1:]...)
	case k < 10 && len(w.open) > 0 && len(w.maps) < 12:
		o := w.open[w.random.IntN(len(w.open))]
		if o.flags&unix.O_ACCMODE == unix.O_WRONLY {
			return
		}
		prot, rw := unix.PROT_READ, o.flags&unix.O_ACCMODE == unix.O_RDWR
		if rw {
			prot |= unix.PROT_WRITE
		}
		w.note("map %d, to write %t", o.fd, rw)
		mem, err := unix.Mmap(o.fd, 0, worldSize, prot, unix.MAP_SHARED)
		must("map", err)
		w.maps = append(w.maps, &mapping{mem, rw, o.of})
	case k < 11 && len(w.maps) > 0:
		i := w.random.IntN(len(w.maps))
		w.note("unmap %d", i)
		must("unmap", unix.Munmap(w.maps[i].mem))
		w.maps = append(w.maps[:i], w.maps[i+1:]...)
	case k < 12:
		size := w.random.IntN(worldSize)
		w.note("truncate %s %d", name, size)
		must("truncate", unix.Truncate(path, int64(size)))
		resize(size)
	case k < 13:
		w.note("unlink %s", name)
		must("unlink", unix.Unlink(path))
		delete(w.files, name)
	case k < 14:
		other := w.name()
		w.note("rename %s %s", name, other)
		must("rename", unix.Rename(path, filepath.Join(w.dir, other)))
		if other != name {
			w.files[other] = c
			delete(w.files, name)
		}
	case k < 16 && len(w.maps) > 0:
		m := w.maps[w.random.IntN(len(w.maps))]
		if !m.rw || len(m.of.data) == 0 {
			return
		}
		at := w.random.IntN(len(m.of.data))
		w.note("store at %d", at)
		m.mem[at]++
		m.of.data[at]++
	case len(w.open) > 0:
		o := w.open[w.random.IntN(len(w.open))]
		if o.flags&unix.O_ACCMODE == unix.O_RDONLY {
			return
		}
		c, at := o.of, w.random.IntN(worldSize)
		switch w.random.IntN(6) {
		case 0:
			length := 1 + w.random.IntN(worldSize)
			w.note("punch %d at %d for %d", o.fd, at, length)
			must("punch", unix.Fallocate(o.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(at), int64(length)))
			for i := at; i < min(at+length, len(c.data)); i++ {
				c.data[i] = 0
			}
		case 1:
			w.note("fallocate %d up to %d", o.fd, at+1)
			must("fallocate", unix.Fallocate(o.fd, 0, 0, int64(at+1)))
			if at+1 > len(c.data) {
				c.data = append(c.data, make([]byte, at+1-len(c.data))...)
			}
		case 2:
			w.note("ftruncate %d %d", o.fd, at)
			must("ftruncate", unix.Ftruncate(o.fd, int64(at)))
			if at <= len(c.data) {
				c.data = c.data[:at]
			} else {
				c.data = append(c.data, make([]byte, at-len(c.data))...)
			}
		default:
			data := bytes.Repeat([]byte{byte(1 + w.random.IntN(250))}, 1+w.random.IntN(5000))
			if at+len(data) > worldSize {
				at = 0
			}
			w.note("write %d at %d for %d", o.fd, at, len(data))
			n, err := unix.Pwrite(o.fd, data, int64(at))
			if n != len(data) {
				w.fatal("write: %d, %v", n, err)
			}
			if at+len(data) > len(c.data) {
				c.data = append(c.data, make([]byte, at+len(data)-len(c.data))...)
			}
			copy(c.data[at:], data)
		}
	}
}

// check compares all that can be read with what must be there.
func (w *world) check() {
	w.t.Helper()
	for _, o := range w.open {
		var st unix.Stat_t
		if err := unix.Fstat(o.fd, &st); err != nil || st.Size != int64(len(o.of.data)) {
			w.fatal("fstat %d: %d bytes, %v, not %d", o.fd, st.Size, err, len(o.of.data))
		}
		if o.flags&unix.O_ACCMODE == unix.O_WRONLY {
			continue
		}
		got := make([]byte, 2*worldSize)
		n, err := unix.Pread(o.fd, got, 0)
		if err != nil || !bytes.Equal(got[:n], o.of.data) {
			w.fatal("read by %d (%#x): %d bytes, %v, not %d; they differ from %d on", o.fd, o.flags, n, err, len(o.of.data), differ(got[:n], o.of.data))
		}
	}
	for i, m := range w.maps {
		if end := min(len(m.of.data), worldSize); !bytes.Equal(m.mem[:end], m.of.data[:end]) {
			w.fatal("mapping %d (to write: %t) differs from %d on", i, m.rw, differ(m.mem[:end], m.of.data[:end]))
		}
	}
	names, err := os.ReadDir(w.dir)
	if err != nil || len(names) != len(w.files) {
		w.fatal("%d names are listed, %v, not %d", len(names), err, len(w.files))
	}
}

func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// Whatever happens in whatever order, every descriptor and every mapping shows the same.
func TestEverythingIsCoherent(t *testing.T) {
	eachTier(t, func(t *testing.T, p *kit.Pool, dir string) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		for range 12 {
			w := &world{t: t, dir: dir, random: random, files: map[string]*content{}}
			for range 120 {
				w.step()
				w.check()
			}
			for _, o := range w.open {
				unix.Close(o.fd)
			}
			for _, m := range w.maps {
				kit.OK(t, unix.Munmap(m.mem))
			}
			for name := range w.files {
				kit.OK(t, os.Remove(filepath.Join(dir, name)))
			}
		}
		p.Idle()
		kit.Poll(t, "all space is back", func() bool { return p.Show("v").Used.Bytes == 0 })
	})
}
