package quota

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// chargeOf charges the inode at path as one who serves it does.
func chargeOf(t *testing.T, r Rule, path string) uint64 {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	prealloc, err := ReadPrealloc(fd)
	if err != nil {
		t.Fatal(err)
	}
	opened := false
	charge, err := r.Charge(&st, func() (int, func(), error) {
		opened = true
		fd, err := unix.Open(procPath(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return fd, func() { unix.Close(fd) }, err
	}, prealloc)
	if err != nil {
		t.Fatalf("charge of %s: %v", path, err)
	}
	if opened != r.NeedsMap(&st) {
		t.Errorf("%s: opened %v, but NeedsMap says %v", path, opened, !opened)
	}
	return charge
}

func ruleFor(t *testing.T, dir string) Rule {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := RuleFor(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// file makes a file and hands it to each of do.
func file(t *testing.T, path string, do ...func(f *os.File) error) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	defer f.Close()
	for _, d := range do {
		must(t, d(f))
	}
}

func write(off, n int64) func(*os.File) error {
	return func(f *os.File) error {
		_, err := f.WriteAt(bytes.Repeat([]byte{'x'}, int(n)), off)
		return err
	}
}

func truncate(n int64) func(*os.File) error { return func(f *os.File) error { return f.Truncate(n) } }

func allocate(mode uint32, off, n int64) func(*os.File) error {
	return func(f *os.File) error { return unix.Fallocate(int(f.Fd()), mode, off, n) }
}

func prealloc(end uint64) func(*os.File) error {
	return func(f *os.File) error { return WritePrealloc(int(f.Fd()), end) }
}

func flush(f *os.File) error { return f.Sync() }

const (
	keep  = unix.FALLOC_FL_KEEP_SIZE
	punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	mib   = int64(1 << 20)
)

func TestChargeOfFiles(t *testing.T) {
	onBackings(t, func(t *testing.T, dir string) {
		r := ruleFor(t, dir)
		b := int64(r.Block)
		for _, c := range []struct {
			name string
			do   []func(*os.File) error
			want int64
		}{
			{"empty", nil, 0},
			{"one byte", []func(*os.File) error{write(0, 1)}, b},
			{"one block", []func(*os.File) error{write(0, b)}, b},
			{"a block and a byte", []func(*os.File) error{write(0, b+1)}, 2 * b},
			{"four blocks", []func(*os.File) error{write(0, 4*b)}, 4 * b},
			{"dense", []func(*os.File) error{write(0, 3*mib+1)}, 3*mib + b},
			{"dense, written back", []func(*os.File) error{write(0, 3*mib+1), flush}, 3*mib + b},
			{"a hole only", []func(*os.File) error{truncate(5 << 40)}, 0},
			{"a byte far out", []func(*os.File) error{write(1<<40, 1)}, b},
			{"a byte far out in a hole", []func(*os.File) error{write(1<<40, 1), truncate(2 << 40)}, b},
			{"a hole in a small file", []func(*os.File) error{write(2*b, b), flush}, b},
			{"across a block's edge", []func(*os.File) error{truncate(mib), write(5*b-1, 2)}, 2 * b},
			{"shortened", []func(*os.File) error{write(0, mib), truncate(5)}, b},
			{"shortened, written back", []func(*os.File) error{write(0, mib), flush, truncate(5), flush}, b},
			{"allocated inside", []func(*os.File) error{allocate(0, 0, mib)}, mib},
			{"allocated beyond the end", []func(*os.File) error{write(0, 1), allocate(keep, 0, mib), prealloc(uint64(mib))}, mib},
			{"allocated beyond the end, off a block", []func(*os.File) error{allocate(keep, 0, mib-1), prealloc(uint64(mib - 1))}, mib},
			{"allocated beyond a hole", []func(*os.File) error{truncate(mib), allocate(keep, 2*mib, mib), prealloc(uint64(3 * mib))}, mib},
			{"allocated beyond the end, not recorded", []func(*os.File) error{write(0, 1), allocate(keep, 0, mib)}, b},
			{"recorded, not allocated", []func(*os.File) error{write(0, 10*b), prealloc(uint64(mib))}, 10 * b},
			{"recorded and taken back", []func(*os.File) error{write(0, 10*b), prealloc(uint64(mib)), prealloc(0)}, 10 * b},
			{"punched", []func(*os.File) error{write(0, mib), allocate(punch, b, 4*b)}, mib - 4*b},
			{"punched off the blocks", []func(*os.File) error{write(0, mib), allocate(punch, b-1, 4*b)}, mib - 3*b},
			{"punched whole", []func(*os.File) error{write(0, mib), allocate(punch, 0, mib)}, 0},
			{"allocated and written", []func(*os.File) error{allocate(0, 0, mib), write(b, b), flush}, mib},
		} {
			t.Run(c.name, func(t *testing.T) {
				path := filepath.Join(dir, "file")
				defer os.Remove(path)
				file(t, path, c.do...)
				if got := chargeOf(t, r, path); got != uint64(c.want) {
					t.Errorf("charge %d, want %d", got, c.want)
				}
				// It must not move by itself.
				file(t, path, flush)
				if got := chargeOf(t, r, path); got != uint64(c.want) {
					t.Errorf("charge %d once written back, want %d", got, c.want)
				}
			})
		}
	})
}

func TestChargeOfOthers(t *testing.T) {
	onBackings(t, func(t *testing.T, dir string) {
		r := ruleFor(t, dir)
		at := func(name string) string { return filepath.Join(dir, name) }
		must(t, os.Mkdir(at("dir"), 0o700))
		must(t, os.Mkdir(at("dir/sub"), 0o700))
		must(t, os.Symlink("target", at("short")))
		must(t, os.Symlink(string(bytes.Repeat([]byte{'t'}, 1000)), at("long")))
		must(t, unix.Mkfifo(at("fifo"), 0o600))
		must(t, unix.Mknod(at("null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		must(t, unix.Mknod(at("socket"), unix.S_IFSOCK|0o600, 0))
		file(t, at("a"), write(0, 100))
		must(t, os.Link(at("a"), at("b")))
		must(t, os.Link(at("a"), at("c")))
		must(t, os.Link(at("fifo"), at("fifo2")))
		for name, want := range map[string]uint64{
			"dir":    r.Block, // three links, none of them a name more
			"fifo":   LinkCharge,
			"null":   0,
			"socket": 0,
			"a":      r.Block + 2*LinkCharge,
			"c":      r.Block + 2*LinkCharge,
		} {
			if got := chargeOf(t, r, at(name)); got != want {
				t.Errorf("%s: charge %d, want %d", name, got, want)
			}
		}
		for _, name := range []string{"short", "long"} {
			if got := chargeOf(t, r, at(name)); got > r.Block {
				t.Errorf("symlink %s: charge %d, want at most a block", name, got)
			}
		}
	})
}

// TestMappedOfManyExtents has more extents than one call of FIEMAP gives, and checks
// every range against what was written.
func TestMappedOfManyExtents(t *testing.T) {
	onBackings(t, func(t *testing.T, dir string) {
		r := ruleFor(t, dir)
		const blocks = 2000
		var mapped [blocks]bool
		rnd := rand.New(rand.NewPCG(1, 2))
		f, err := os.Create(filepath.Join(dir, "file"))
		must(t, err)
		defer f.Close()
		must(t, f.Truncate(blocks*int64(r.Block)))
		for i := range mapped {
			if mapped[i] = rnd.IntN(2) == 0; mapped[i] {
				must(t, write(int64(i)*int64(r.Block)+rnd.Int64N(int64(r.Block)), 1)(f))
			}
			if i == blocks/2 {
				must(t, f.Sync()) // the rest waits for allocation
			}
		}
		check := func(from, to uint64) {
			t.Helper()
			var want uint64
			var gaps []Range
			for i := from / r.Block; i*r.Block < to; i++ {
				at := i * r.Block
				if mapped[i] {
					want += r.Block
				} else if n := len(gaps); n > 0 && gaps[n-1].To == at {
					gaps[n-1].To += r.Block
				} else {
					gaps = append(gaps, Range{From: at, To: at + r.Block})
				}
			}
			got, err := r.Mapped(int(f.Fd()), from, to)
			if err != nil || got != want {
				t.Fatalf("Mapped(%d, %d) = %d, %v, want %d", from, to, got, err, want)
			}
			gotGaps, err := r.Unmapped(int(f.Fd()), from, to)
			if err != nil || !slices.Equal(gotGaps, gaps) {
				t.Fatalf("Unmapped(%d, %d) = %v, %v, want %v", from, to, gotGaps, err, gaps)
			}
		}
		check(0, blocks*r.Block)
		for range 200 {
			from := rnd.Uint64N(blocks * r.Block)
			check(from, from+rnd.Uint64N(blocks*r.Block-from)+1)
		}
		// Blocks of charge that are larger than those of the filesystem count
		// once, if any part is mapped.
		coarse := Rule{Block: 8 * r.Block}
		var want uint64
		for i := 0; i < blocks; i += 8 {
			if slices.Contains(mapped[i:i+8], true) {
				want += coarse.Block
			}
		}
		if got, err := coarse.Mapped(int(f.Fd()), 0, blocks*r.Block); err != nil || got != want {
			t.Errorf("coarse: Mapped = %d, %v, want %d", got, err, want)
		}
	})
}

func TestMappedAtTheEdges(t *testing.T) {
	onBackings(t, func(t *testing.T, dir string) {
		r := ruleFor(t, dir)
		f, err := os.Create(filepath.Join(dir, "file"))
		must(t, err)
		defer f.Close()
		must(t, write(0, int64(r.Block))(f))
		fd := int(f.Fd())
		for _, c := range []struct{ from, to, want uint64 }{
			{0, 0, 0}, {5, 5, 0}, {5, 3, 0}, {0, 1, r.Block}, {r.Block, 1 << 40, 0},
			{0, 1<<64 - 1, r.Block}, {1 << 62, 1<<62 + 1, 0}, {1<<64 - 2, 1<<64 - 1, 0},
		} {
			if got, err := r.Mapped(fd, c.from, c.to); err != nil || got != c.want {
				t.Errorf("Mapped(%d, %d) = %d, %v, want %d", c.from, c.to, got, err, c.want)
			}
		}
		gaps, err := r.Unmapped(fd, 0, 10*r.Block)
		if want := []Range{{r.Block, 10 * r.Block}}; err != nil || !slices.Equal(gaps, want) {
			t.Errorf("Unmapped = %v, %v, want %v", gaps, err, want)
		}
		if _, err := r.Mapped(-1, 0, 1); !errors.Is(err, unix.EBADF) {
			t.Errorf("no descriptor: %v", err)
		}
	})
}

func TestPrealloc(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	file(t, path)
	for _, flags := range []int{unix.O_RDWR, unix.O_PATH} {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		must(t, err)
		defer unix.Close(fd)
		for _, end := range []uint64{0, 1, maxPrealloc, 4096, 0, 0} {
			must(t, WritePrealloc(fd, end))
			if got, err := ReadPrealloc(fd); err != nil || got != end {
				t.Errorf("read %d, %v; written %d", got, err, end)
			}
		}
		if err := WritePrealloc(fd, maxPrealloc+1); !errors.Is(err, unix.EFBIG) {
			t.Errorf("too large: %v", err)
		}
		for _, bad := range []string{"", "x", "-1", " 1", "99999999999999999999", "00000000000000000000000000000000000000000001"} {
			must(t, unix.Setxattr(path, PreallocXattr, []byte(bad), 0))
			if _, err := ReadPrealloc(fd); !errors.Is(err, ErrBadPrealloc) {
				t.Errorf("%q: %v", bad, err)
			}
		}
		must(t, WritePrealloc(fd, 0))
	}
	if _, err := ReadPrealloc(-1); err == nil {
		t.Error("no descriptor, and no error")
	}
}

// TestChargeLooksAgain: st_blocks that was read in the moment when a block is being allocated is one too few.
func TestChargeLooksAgain(t *testing.T) {
	dir := t.TempDir()
	r := ruleFor(t, dir)
	f, err := os.Create(filepath.Join(dir, "f"))
	must(t, err)
	defer f.Close()
	block := make([]byte, r.Block)
	for _, at := range []int64{0, 2} { // and a hole between
		_, err := f.WriteAt(block, at*int64(r.Block))
		must(t, err)
	}
	must(t, unix.Fsetxattr(int(f.Fd()), "user.x", make([]byte, 3000), 0))
	charge := func(st unix.Stat_t) uint64 {
		t.Helper()
		got, err := r.Charge(&st, func() (int, func(), error) {
			fd, err := unix.Open(f.Name(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			return fd, func() { unix.Close(fd) }, err
		}, 0)
		must(t, err)
		return got
	}
	var st unix.Stat_t
	must(t, unix.Fstat(int(f.Fd()), &st))
	short := st
	short.Blocks -= int64(r.Block / 512)
	if want, got := charge(st), charge(short); got != want {
		t.Errorf("%d bytes with st_blocks of %d, %d with %d", want, st.Blocks, got, short.Blocks)
	}
}
