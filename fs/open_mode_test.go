package fs_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/quota"
)

// eventually polls: RELEASE and FORGET come when nobody waits for them.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func (m *mounted) create(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(m.dir, name)
	must(t, os.WriteFile(path, data, 0o644))
	return path
}

// Whatever is open how and in which order, and however it is written: every
// reader sees it.
func TestOpenModesAreCoherent(t *testing.T) {
	for _, tier := range []fs.Tier{fs.TierDaemon, fs.TierRead} {
		t.Run(string(tier), func(t *testing.T) {
			m := mountTier(t, quota.Usage{Bytes: 1 << 30, Inodes: 64}, tier)
			random := rand.New(rand.NewPCG(1, 2))
			for i := range 40 {
				checkCoherence(t, random, m.create(t, fmt.Sprint("f", i), make([]byte, 3*4096)))
			}
		})
	}
}

// checkCoherence opens a file of 3 blocks in every way, in random order, closing
// some again, and writes and reads by all of them.
func checkCoherence(t *testing.T, random *rand.Rand, path string) {
	want := make([]byte, 3*4096)
	var open []int
	var history []string
	flags := map[int]int{}
	defer func() {
		for _, fd := range open {
			unix.Close(fd)
		}
	}()
	for step := range 24 {
		if random.IntN(4) == 0 && len(open) > 0 {
			i := random.IntN(len(open))
			unix.Close(open[i])
			history = append(history, fmt.Sprint("close ", open[i]))
			open = append(open[:i], open[i+1:]...)
		} else {
			how := []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR}[random.IntN(3)]
			fd := openFile(t, path, how)
			history = append(history, fmt.Sprint("open ", how, " is ", fd))
			open, flags[fd] = append(open, fd), how
		}
		for _, fd := range open {
			if flags[fd] == unix.O_RDONLY {
				continue
			}
			off, text := random.IntN(len(want)-8), fmt.Sprintf("%08d", step)
			if n, err := unix.Pwrite(fd, []byte(text), int64(off)); n != len(text) || err != nil {
				t.Fatalf("%v: write by %d: %d, %v", history, fd, n, err)
			}
			history = append(history, fmt.Sprint("write by ", fd))
			copy(want[off:], text)
		}
		for _, fd := range open {
			if flags[fd] == unix.O_WRONLY {
				continue
			}
			got := make([]byte, len(want)+1)
			if n, err := unix.Pread(fd, got, 0); n != len(want) || err != nil || !bytes.Equal(got[:n], want) {
				t.Fatalf("%v: read by %d: %d, %v, the same: %t", history, fd, n, err, bytes.Equal(got[:len(want)], want))
			}
		}
	}
}

// What is read stays in the kernel in one tier, and comes to the daemon in the other.
func TestReadsPassThrough(t *testing.T) {
	for tier, reads := range map[fs.Tier]bool{fs.TierDaemon: true, fs.TierRead: false} {
		t.Run(string(tier), func(t *testing.T) {
			m := mountTier(t, quota.Usage{Bytes: 1 << 30, Inodes: 64}, tier)
			path := m.create(t, "f", make([]byte, 1<<20))
			fd := openFile(t, path, unix.O_RDONLY)
			defer unix.Close(fd)
			must(t, unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED))
			if n, err := unix.Pread(fd, make([]byte, 1<<20), 0); n == 0 || err != nil {
				t.Fatalf("%d bytes, %v", n, err)
			}
			if n := m.conn.Counts()["READ"]; reads != (n > 0) {
				t.Errorf("%d READ", n)
			}
		})
	}
}

// A file that was made by its size first and filled then is passed through like
// any other, and so is one that was filled by an earlier open.
func TestFilledFileIsPassedThrough(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 1 << 30, Inodes: 64})
	for name, order := range map[string][]int{"forward": {0, 1, 2, 3}, "backward": {3, 2, 1, 0}} {
		path := filepath.Join(m.dir, name)
		fd := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
		must(t, unix.Ftruncate(fd, 1<<20))
		for _, part := range order {
			reader := openFile(t, path, unix.O_RDONLY)
			_, err := unix.Pwrite(fd, make([]byte, 1<<18), int64(part)<<18)
			must(t, err)
			unix.Close(reader)
		}
		must(t, unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED))
		unix.Close(fd)
		eventually(t, "no file is open", func() bool { return m.fs.OpenFiles("v") == 0 })
		before := m.conn.Counts()["READ"]
		got, err := os.ReadFile(path)
		if err != nil || len(got) != 1<<20 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if reads := m.conn.Counts()["READ"] - before; reads > 0 {
			t.Errorf("%s: %d READ", name, reads)
		}
	}
}

func mapShared(t *testing.T, fd, length, prot int) []byte {
	t.Helper()
	mapping, err := unix.Mmap(fd, 0, length, prot, unix.MAP_SHARED)
	must(t, err)
	return mapping
}

// A removed file keeps its blocks while it is mapped, and so its charge, though
// nobody has it open. The space cannot be had twice.
func TestRemovedFileIsChargedWhileMapped(t *testing.T) {
	const size = 8 << 20
	remove := map[string]func(m *mounted, path string) error{
		"unlink": func(_ *mounted, path string) error { return unix.Unlink(path) },
		"rename over it": func(m *mounted, path string) error {
			return errors.Join(os.WriteFile(path+".new", nil, 0o644), unix.Rename(path+".new", path))
		},
		"unlink while open": func(_ *mounted, path string) error {
			fd, err := unix.Open(path, unix.O_RDONLY, 0)
			if err != nil {
				return err
			}
			return errors.Join(unix.Unlink(path), unix.Close(fd))
		},
	}
	for name, do := range remove {
		t.Run(name, func(t *testing.T) {
			m := mount(t, quota.Usage{Bytes: size + size/2, Inodes: 64})
			path := m.create(t, "f", bytes.Repeat([]byte{7}, size))
			fd := openFile(t, path, unix.O_RDONLY)
			mapping := mapShared(t, fd, size, unix.PROT_READ)
			unix.Close(fd)
			must(t, do(m, path))
			eventually(t, "no file is open", func() bool { return m.fs.OpenFiles("v") == 0 })
			if used := m.ledger.Used().Bytes; used < size {
				t.Errorf("%d bytes are charged while %d are mapped", used, size)
			}
			m.check(t) // what is charged outside the tree is known
			if err := os.WriteFile(filepath.Join(m.dir, "g"), make([]byte, size), 0o644); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("the space of a mapped file was given away: %v", err)
			}
			must(t, os.Remove(filepath.Join(m.dir, "g")))
			if mapping[size-1] != 7 {
				t.Errorf("the mapping holds %d", mapping[size-1])
			}
			must(t, unix.Munmap(mapping))
			eventually(t, "its space is back", func() bool { return m.ledger.Used().Bytes < size })
			must(t, os.WriteFile(filepath.Join(m.dir, "g"), make([]byte, size), 0o644))
		})
	}
}

// Stores by way of a passed mapping are refused by nobody, so such a file gets no
// holes for them to fall into, whatever is tried, after its last close as well.
func TestSharedMappingFindsNoHoles(t *testing.T) {
	const limit = 4 << 20
	m := mount(t, quota.Usage{Bytes: limit, Inodes: 64})
	path := m.create(t, "f", make([]byte, 1<<20))
	reader := openFile(t, path, unix.O_RDONLY)
	fd := openFile(t, path, unix.O_RDWR)
	mapping := mapShared(t, fd, limit, unix.PROT_READ|unix.PROT_WRITE)
	unix.Close(fd)
	unix.Close(reader)
	eventually(t, "no file is open", func() bool { return m.fs.OpenFiles("v") == 0 })
	store := func(what string, size int) {
		t.Helper()
		for i := 0; i < size; i += 4096 {
			mapping[i]++
		}
		if used := m.ledger.Used().Bytes; used > limit {
			t.Errorf("%s: %d bytes are used", what, used)
		}
		m.check(t)
	}
	store("as it was", 1<<20)
	if err := unix.Truncate(path, 1<<30); err != unix.ENOSPC {
		t.Errorf("a hole beyond the limit: %v", err)
	}
	must(t, unix.Truncate(path, 2<<20))
	store("extended", 2<<20)
	fd = openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	must(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 2<<20))
	if mapping[0] != 0 {
		t.Error("what was punched is not zero")
	}
	store("punched", 2<<20)
	_, err := unix.Pwrite(fd, []byte("x"), 3<<20)
	must(t, err)
	store("a gap", 3<<20)
	sparse := filepath.Join(m.dir, "sparse")
	must(t, errors.Join(os.WriteFile(sparse, nil, 0o644), os.Truncate(sparse, 1<<20)))
	from := openFile(t, sparse, unix.O_RDONLY)
	defer unix.Close(from)
	for off, in := int64(1<<20), int64(0); in < 1<<20; {
		n, err := unix.CopyFileRange(from, &in, fd, &off, 1<<20, 0)
		must(t, err)
		if n == 0 {
			t.Fatal("copy_file_range ended early")
		}
	}
	store("holes copied", 3<<20)
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	if st.Size != 3<<20+1 || uint64(st.Blocks)*512 < uint64(st.Size) {
		t.Errorf("%d bytes in %d blocks", st.Size, st.Blocks)
	}
	must(t, unix.Munmap(mapping))
	runtime.KeepAlive(mapping)
}

// A file with a hole that is opened for both, while it is passed through, gets
// its hole filled, or is refused.
func TestOpenFillsHoles(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 4 << 20, Inodes: 64})
	path := m.create(t, "f", make([]byte, 1<<20))
	reader := openFile(t, path, unix.O_RDONLY)
	defer unix.Close(reader)
	must(t, unix.Truncate(path, 64<<20))
	if fd, err := unix.Open(path, unix.O_RDWR, 0); err != unix.ENOSPC {
		unix.Close(fd)
		t.Errorf("a hole larger than the volume: %v", err)
	}
	must(t, unix.Truncate(path, 2<<20))
	fd := openFile(t, path, unix.O_RDWR)
	defer unix.Close(fd)
	if used := m.ledger.Used().Bytes; used != 2<<20 {
		t.Errorf("used %d bytes", used)
	}
}
