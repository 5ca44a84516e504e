package quota_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/test/kit"
)

// A filler fills the volume at dir. writers is how many do so at once: each may
// leave less than unit unused.
type filler struct {
	name    string
	writers uint64
	unit    uint64
	fill    func(t *testing.T, dir string)
}

var fillers = []filler{
	{"dd", 1, 1, fillDD},
	{"8 processes, a file each", 8, block, fillProcesses(func(i int) string { return fmt.Sprint("f", i) })},
	{"8 processes, one file", 8, block, fillProcesses(func(int) string { return "f" })},
	{"fallocate", 1, 1, fillFallocate(0)},
	{"fallocate keep size", 1, 1, fillFallocate(unix.FALLOC_FL_KEEP_SIZE)},
	{"8 fallocate", 8, block, fillFallocates},
	{"holes", 1, 1, fillHoles},
	{"8 writers into the holes of one file", 8, block, fillHolesTogether},
	{"hard links", 8, quota.LinkCharge, fillLinks},
	{"copy_file_range", 1, block, fillCopies(1, kit.Mi)},
	{"8 copy_file_range of odd lengths", 8, block, fillCopies(8, 300*kit.Ki+1234)},
	{"small files", 8, block, fillSmallFiles},
	{"directories", 8, block, fillDirectories},
	{"long symbolic links", 8, block, fillSymlinks},
}

func TestBytesExact(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		for i, f := range fillers {
			t.Run(f.name, func(t *testing.T) {
				volume := fmt.Sprint("v", i)
				dir := p.Create(volume, limit, "--inodes", "200000")
				sampler := p.Sample(volume)
				f.fill(t, dir)
				sampler.Stop(t, quota.Usage{Bytes: limit, Inodes: 200000})
				used := p.Used(volume).Bytes
				unit := f.unit
				if p.Tier == "hold" { // a write is allowed whole or not at all
					unit = max(unit, 8*block)
				}
				if used > limit || limit-used >= f.writers*unit {
					t.Errorf("used %d of %d: %d are left, less than %d writers of %d were to be",
						used, limit, int64(limit)-int64(used), f.writers, unit)
				}
				t.Logf("used %d of %d (%d samples)", used, limit, sampler.Samples)
				exact(t, p, volume)
				empty(t, p, volume)
				p.MustVolume("delete", volume)
			})
		}
	})
}

// exact compares the ledger with the disk, to the byte.
func exact(t *testing.T, p *kit.Pool, volume string) {
	t.Helper()
	for _, v := range p.Check().Volumes {
		if v.Name == volume && (v.Ledger != v.Disk || v.Disk.Bytes > v.Limit.Bytes) {
			t.Errorf("limit %v, ledger %v, disk %v", v.Limit, v.Ledger, v.Disk)
		}
	}
}

// empty removes all and expects all of it back.
func empty(t *testing.T, p *kit.Pool, volume string) {
	t.Helper()
	entries, err := os.ReadDir(p.Path(volume))
	kit.OK(t, err)
	for _, e := range entries {
		kit.OK(t, os.RemoveAll(p.Path(volume, e.Name())))
	}
	p.Idle()
	// What was mapped is given back when the kernel has forgotten it.
	kit.Poll(t, "an empty volume that uses nothing", func() bool { return p.Used(volume) == quota.Usage{} })
}

func fillDD(t *testing.T, dir string) {
	path := filepath.Join(dir, "f")
	r := kit.Exec(t, "dd", "if=/dev/zero", "of="+path, "bs=1M")
	if r.Code == 0 || !strings.Contains(r.Stderr, "No space left") {
		t.Fatalf("dd: %s", r)
	}
	if size := kit.Stat(t, path).Size; size != limit {
		t.Errorf("dd has written %d bytes", size)
	}
	overwrite(t, path)
}

func fillProcesses(name func(int) string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		together(t, 8, func(i int) error {
			p := kit.Process{Helper: "append", Args: []string{filepath.Join(dir, name(i)), strconv.Itoa(60000 + 7777*i)}}
			if r := p.Run(t); r.Code != 0 {
				return fmt.Errorf("writer %d: %s", i, r)
			}
			return nil
		})
	}
}

func fillFallocate(mode uint32) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		f, err := os.Create(filepath.Join(dir, "f"))
		kit.OK(t, err)
		defer f.Close()
		var end int64
		kit.OK(t, fill(3*kit.Mi, func(n int) error {
			err := unix.Fallocate(int(f.Fd()), mode, end, int64(n))
			if err == nil {
				end += int64(n)
			}
			return err
		}))
		if end != limit {
			t.Errorf("%d bytes are allocated", end)
		}
		// What is allocated can be written, and no more.
		if _, err := f.WriteAt(make([]byte, kit.Mi), limit-kit.Mi); err != nil {
			t.Errorf("writing into what is allocated: %v", err)
		}
		if _, err := f.WriteAt([]byte("x"), limit); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("writing beyond it: %v", err)
		}
	}
}

func fillFallocates(t *testing.T, dir string) {
	together(t, 8, func(i int) error {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("f", i)))
		if err != nil {
			return err
		}
		defer f.Close()
		var end int64
		return fill(500*kit.Ki, func(n int) error {
			err := unix.Fallocate(int(f.Fd()), 0, end, int64(n))
			if err == nil {
				end += int64(n)
			}
			return err
		})
	})
}

func fillHoles(t *testing.T, dir string) {
	f, err := os.Create(filepath.Join(dir, "f"))
	kit.OK(t, err)
	defer f.Close()
	kit.OK(t, f.Truncate(kit.Gi))
	var at int64
	kit.OK(t, fill(20000, func(n int) error {
		_, err := f.WriteAt(make([]byte, n), at)
		at += 3*int64(n) + 12345
		return err
	}))
}

func fillHolesTogether(t *testing.T, dir string) {
	path := filepath.Join(dir, "f")
	kit.OK(t, os.WriteFile(path, nil, 0o644))
	kit.OK(t, os.Truncate(path, 8*kit.Gi))
	together(t, 8, func(i int) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		for at := int64(i) * kit.Gi; ; at += 5 * block {
			if _, err := f.WriteAt(make([]byte, 2*block), at); errors.Is(err, unix.ENOSPC) {
				return nil
			} else if err != nil {
				return err
			}
		}
	})
}

func fillLinks(t *testing.T, dir string) {
	// All but the last MiB by data: links cost little, and a backing
	// filesystem's own limit for one file is 65,000.
	kit.OK(t, os.WriteFile(filepath.Join(dir, "data"), make([]byte, limit-kit.Mi), 0o644))
	together(t, 8, func(i int) error {
		sub := filepath.Join(dir, fmt.Sprint("d", i))
		if err := os.Mkdir(sub, 0o755); err != nil {
			return err
		}
		for n := 0; ; n++ {
			err := os.Link(filepath.Join(dir, "data"), filepath.Join(sub, strconv.Itoa(n)))
			if errors.Is(err, unix.ENOSPC) {
				return nil
			} else if err != nil {
				return err
			}
		}
	})
	if links := kit.Stat(t, filepath.Join(dir, "data")).Nlink; links != 1+(kit.Mi-8*block)/quota.LinkCharge {
		t.Errorf("%d links", links)
	}
}

func fillCopies(writers int, length int) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		source := filepath.Join(dir, "source")
		kit.OK(t, os.WriteFile(source, make([]byte, length), 0o644))
		together(t, writers, func(i int) error {
			src, err := os.Open(source)
			if err != nil {
				return err
			}
			defer src.Close()
			dst, err := os.Create(filepath.Join(dir, fmt.Sprint("copy", i)))
			if err != nil {
				return err
			}
			defer dst.Close()
			var out int64
			return fill(length, func(n int) error {
				in := int64(0)
				copied, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, n, 0)
				if err == nil && copied == 0 {
					return fmt.Errorf("copy_file_range of %d bytes copied nothing", n)
				}
				return err
			})
		})
	}
}

func fillSmallFiles(t *testing.T, dir string) {
	var n atomic.Int64
	together(t, 8, func(i int) error {
		return fill(5000+i*block, func(size int) error {
			return os.WriteFile(filepath.Join(dir, fmt.Sprint(n.Add(1))), make([]byte, size), 0o644)
		})
	})
}

func fillDirectories(t *testing.T, dir string) {
	// All but the last 16 MiB by data, so that it stays quick.
	kit.OK(t, os.WriteFile(filepath.Join(dir, "data"), make([]byte, limit-16*kit.Mi), 0o644))
	fillNames(t, func(n int64) error { return os.Mkdir(filepath.Join(dir, fmt.Sprint(n)), 0o755) })
}

func fillSymlinks(t *testing.T, dir string) {
	// 900 bytes do not fit into an inode.
	target := strings.Repeat("x/", 450)
	// All but the last 8 MiB by data, so that it stays quick.
	kit.OK(t, os.WriteFile(filepath.Join(dir, "data"), make([]byte, limit-8*kit.Mi), 0o644))
	fillNames(t, func(n int64) error { return os.Symlink(target, filepath.Join(dir, fmt.Sprint(n))) })
}

// fillNames has 8 goroutines call add with numbers until ENOSPC.
func fillNames(t *testing.T, add func(n int64) error) {
	t.Helper()
	var n atomic.Int64
	together(t, 8, func(int) error {
		for {
			if err := add(n.Add(1)); errors.Is(err, unix.ENOSPC) {
				return nil
			} else if err != nil {
				return err
			}
		}
	})
}

// TestLastByte has writers add single bytes to what is nearly full: the last
// block is used to its last byte.
func TestLastByte(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		dir := p.Create("v", kit.Mi)
		path := filepath.Join(dir, "f")
		kit.OK(t, os.WriteFile(path, make([]byte, kit.Mi-2*block), 0o644))
		var written atomic.Int64
		together(t, 4, func(int) error {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			for {
				if _, err := f.Write([]byte("x")); errors.Is(err, unix.ENOSPC) {
					return nil
				} else if err != nil {
					return err
				}
				written.Add(1)
			}
		})
		if size := kit.Stat(t, path).Size; size != kit.Mi || written.Load() != 2*block {
			t.Errorf("size %d after %d bytes more, the limit is %d", size, written.Load(), kit.Mi)
		}
		exact(t, p, "v")
	})
}

// TestPartialWrite expects of one write beyond the limit what a disk does: what
// fits is written. A write that is held is allowed whole or not at all.
func TestPartialWrite(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		dir := p.Create("v", kit.Mi)
		f, err := os.Create(filepath.Join(dir, "f"))
		kit.OK(t, err)
		defer f.Close()
		write := func(what string, length, off, fits int) {
			t.Helper()
			n, err := unix.Pwrite(int(f.Fd()), make([]byte, length), int64(off))
			if p.Tier == "hold" && fits > 0 {
				kit.IsErr(t, what, err, unix.ENOSPC)
				n, err = unix.Pwrite(int(f.Fd()), make([]byte, fits), int64(off))
			}
			if fits == 0 {
				kit.IsErr(t, what, err, unix.ENOSPC)
			} else if n != fits || err != nil {
				t.Errorf("%s: %d, %v", what, n, err)
			}
		}
		write("first write", 3*kit.Mi, 0, kit.Mi)
		write("second write", 1, kit.Mi, 0)
		// A hole at the front of a full volume cannot be filled, one byte freed
		// in the middle of a block frees nothing, a block does.
		kit.OK(t, f.Truncate(kit.Mi-1))
		write("write of two bytes where one fits", 2, kit.Mi-1, 1)
		kit.OK(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 2*block))
		write("write of four blocks where two fit", 4*block, kit.Mi, 2*block)
		write("write into the hole", 1, 0, 0)
		exact(t, p, "v")
	})
}

// TestOrphansCount holds that what is unlinked and open is still in use.
func TestOrphansCount(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		dir := p.Create("v", 4*kit.Mi)
		open, err := os.Create(filepath.Join(dir, "f"))
		kit.OK(t, err)
		defer open.Close()
		_, err = open.Write(make([]byte, 3*kit.Mi))
		kit.OK(t, err)
		kit.OK(t, os.Remove(open.Name()))
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		kit.OK(t, err)
		nameless := os.NewFile(uintptr(fd), "nameless")
		defer nameless.Close()
		if n, err := unix.Write(fd, make([]byte, kit.Mi)); n != kit.Mi {
			t.Errorf("O_TMPFILE: wrote %d, %v", n, err)
		}
		_, err = unix.Write(fd, []byte("x"))
		kit.IsErr(t, "O_TMPFILE beyond the limit", err, unix.ENOSPC)
		if used := p.Used("v"); used != (quota.Usage{Bytes: 4 * kit.Mi, Inodes: 2}) {
			t.Errorf("used %v", used)
		}
		exact(t, p, "v")
		open.Close()
		nameless.Close()
		kit.Poll(t, "the freeing of closed files", func() bool { return p.Used("v") == quota.Usage{} })
		exact(t, p, "v")
	})
}

// TestMappedHoles stores through a shared mapping into the holes of a full volume.
// What is passed through to the disk is not held there: test/gate.
func TestMappedHoles(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		if p.Tier == "hold" {
			return
		}
		dir := p.Create("v", 4*kit.Mi)
		f, err := os.Create(filepath.Join(dir, "sparse"))
		kit.OK(t, err)
		defer f.Close()
		kit.OK(t, f.Truncate(8*kit.Mi))
		sampler := p.Sample("v")
		m, err := unix.Mmap(int(f.Fd()), 0, 8*kit.Mi, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		kit.OK(t, err)
		for at := 0; at < len(m); at += block {
			m[at] = 1
		}
		kit.IsErr(t, "msync of twice what fits", unix.Msync(m, unix.MS_SYNC), unix.ENOSPC)
		kit.OK(t, unix.Munmap(m))
		sampler.Stop(t, quota.Usage{Bytes: 4 * kit.Mi, Inodes: 256})
		if used := p.Used("v"); used.Bytes > 4*kit.Mi {
			t.Errorf("used %v", used)
		}
		f.Close()
		p.Idle()
		exact(t, p, "v")
	})
}

// TestNeighbour holds that a full volume is nobody else's matter.
func TestNeighbour(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		full, other := p.Create("full", 8*kit.Mi), p.Create("other", 8*kit.Mi)
		kit.OK(t, appendUntilFull(filepath.Join(full, "f"), kit.Mi))
		before := kit.Statfs(t, other)
		if before.Bavail*uint64(before.Bsize) != 8*kit.Mi {
			t.Errorf("the neighbour has %d bytes", before.Bavail*uint64(before.Bsize))
		}
		// While writers knock at the full one, the other takes all it is to hold.
		stop := make(chan struct{})
		knocking := make(chan error, 1)
		go func() {
			for {
				select {
				case <-stop:
					knocking <- nil
					return
				default:
				}
				if err := appendUntilFull(filepath.Join(full, "g"), kit.Mi); err != nil {
					knocking <- err
					return
				}
			}
		}()
		kit.OK(t, os.WriteFile(filepath.Join(other, "f"), make([]byte, 8*kit.Mi), 0o644))
		close(stop)
		kit.OK(t, <-knocking)
		exact(t, p, "full")
		exact(t, p, "other")
	})
}
