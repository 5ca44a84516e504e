package quota_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestMixedPassed is TestMixed among those who open the same files for reading
// only, for writing only and for both, map them, keep the mappings after the close, and
// store by them: what is passed through is what the daemon does not see.
func TestMixedPassed(t *testing.T) {
	mix(t, 3, []string{"--tier", "read"}, func(i int, dir string, random *rand.Rand) error {
		if i < 4 {
			return mixerSteps(dir, random)
		}
		k := &keeper{dir: dir, random: random}
		defer k.close()
		for range 3 * mixSteps {
			if err := k.step(); err != nil {
				return err
			}
		}
		return nil
	})
}

// keeper opens and maps a Mixer's files in every way and lets go of them in no order.
type keeper struct {
	dir    string
	random *rand.Rand
	open   []*os.File
	maps   []mapping
}

type mapping struct {
	mem    []byte
	stores bool
}

func (k *keeper) close() {
	for _, f := range k.open {
		f.Close()
	}
	for _, m := range k.maps {
		_ = unix.Munmap(m.mem)
	}
}

// step does something. No open fails but for what a disk's would.
func (k *keeper) step() error {
	switch n := k.random.IntN(10); {
	case n < 5:
		flags := []int{os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR}[k.random.IntN(4)]
		f, err := os.OpenFile(filepath.Join(k.dir, fmt.Sprint("f", k.random.IntN(9))), flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		switch {
		case err == nil:
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENOSPC),
			errors.Is(err, unix.ELOOP), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENXIO): // a symbolic link, a whiteout, a FIFO
			return nil
		default:
			return err
		}
		k.open = append(k.open, f)
		if flags != os.O_WRONLY {
			k.keep(f, flags == os.O_RDWR)
		}
	case n < 8 && len(k.open) > 0:
		i := k.random.IntN(len(k.open))
		k.open[i].Close()
		k.open = append(k.open[:i], k.open[i+1:]...)
	case len(k.maps) > 0:
		i := k.random.IntN(len(k.maps))
		if n == 9 && k.maps[i].stores {
			return k.store(k.maps[i].mem)
		}
		err := unix.Munmap(k.maps[i].mem)
		k.maps = append(k.maps[:i], k.maps[i+1:]...)
		return err
	}
	return nil
}

// keep maps more than there is of a file, which may grow.
func (k *keeper) keep(f *os.File, stores bool) {
	prot := unix.PROT_READ
	if stores {
		prot |= unix.PROT_WRITE
	}
	if mem, err := unix.Mmap(int(f.Fd()), 0, 3*kit.Mi, prot, unix.MAP_SHARED); err == nil {
		k.maps = append(k.maps, mapping{mem, stores})
	}
}

// store fills some of a mapping; the kernel does it, so that the file's end is an error, not SIGBUS.
func (k *keeper) store(mem []byte) error {
	zero, err := os.Open("/dev/zero")
	if err != nil {
		return err
	}
	defer zero.Close()
	at := k.random.IntN(len(mem))
	_, err = unix.Read(int(zero.Fd()), mem[at:min(len(mem), at+50_000)])
	if errors.Is(err, unix.EFAULT) {
		return nil
	}
	return err
}

// TestRemovedButMapped holds that what was removed and is mapped is still in use, whoever mapped it
// and however it was removed, and that a check and a repair know it.
func TestRemovedButMapped(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		for _, tier := range kit.Tiers {
			t.Run(tier, func(t *testing.T) {
				p := kit.NewPool(t, fstype)
				p.MountArgs = []string{"--tier", tier}
				p.Mount()
				dir := p.Create("v", 8*kit.Mi)
				var maps [][]byte
				for i, remove := range []func(path string) error{
					os.Remove,
					func(path string) error {
						return errors.Join(os.WriteFile(path+"n", nil, 0o600), os.Rename(path+"n", path))
					},
				} {
					path := filepath.Join(dir, fmt.Sprint("f", i))
					kit.OK(t, os.WriteFile(path, make([]byte, 3*kit.Mi), 0o600))
					f, err := os.Open(path)
					kit.OK(t, err)
					m, err := unix.Mmap(int(f.Fd()), 0, 3*kit.Mi, unix.PROT_READ, unix.MAP_SHARED)
					kit.OK(t, err)
					maps = append(maps, m)
					f.Close()
					kit.OK(t, remove(path))
				}
				used := func() uint64 { return p.Used("v").Bytes }
				if used() != 6*kit.Mi {
					t.Errorf("used %d bytes", used())
				}
				exact(t, p, "v")
				if r := p.Croft("check", "--pool", p.Dir, "--repair"); r.Code != 0 {
					t.Errorf("repair: %s", r)
				}
				if n, err := os.Create(filepath.Join(dir, "more")); err != nil {
					t.Error(err)
				} else {
					if got, err := n.Write(make([]byte, 2*kit.Mi)); got != 2*kit.Mi {
						t.Errorf("wrote %d beside what is mapped: %v", got, err)
					}
					_, err := n.Write([]byte("x"))
					kit.IsErr(t, "write beyond the limit", err, unix.ENOSPC)
					n.Close()
				}
				if r := p.Resize("v", 5*kit.Mi); r.Code == 0 {
					t.Errorf("shrunk below what is used")
				}
				for _, m := range maps {
					kit.OK(t, unix.Munmap(m))
				}
				kit.Poll(t, "the freeing of what is mapped no more", func() bool { return used() == 2*kit.Mi })
				exact(t, p, "v")
			})
		}
	})
}

// TestRefusedBeyondTheEnd holds that a write or an allocation beyond the end of a file that mappings may
// store into, and that does not fit, leaves the file and the use as they were, though the gap did fit.
func TestRefusedBeyondTheEnd(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := kit.NewPool(t, fstype)
		p.MountArgs = []string{"--tier", "read"}
		p.Mount()
		dir := p.Create("v", 2*kit.Mi)
		path := filepath.Join(dir, "f")
		kit.OK(t, os.WriteFile(path, make([]byte, kit.Mi), 0o600))
		reader, err := os.Open(path)
		kit.OK(t, err)
		defer reader.Close()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		kit.OK(t, err)
		defer f.Close()
		kit.OK(t, os.WriteFile(filepath.Join(dir, "rest"), make([]byte, kit.Mi-64*kit.Ki), 0o600))
		unchanged := func(what string) {
			t.Helper()
			for _, h := range []*os.File{reader, f} {
				if fi, err := h.Stat(); err != nil || fi.Size() != kit.Mi {
					t.Errorf("%s: %d bytes, %v", what, fi.Size(), err)
				}
			}
			if used := p.Used("v").Bytes; used != 2*kit.Mi-64*kit.Ki {
				t.Errorf("%s: %d bytes used", what, used)
			}
		}
		_, err = f.WriteAt([]byte("x"), kit.Mi+64*kit.Ki)
		kit.IsErr(t, "write", err, unix.ENOSPC)
		unchanged("write")
		kit.IsErr(t, "fallocate", unix.Fallocate(int(f.Fd()), 0, kit.Mi+32*kit.Ki, 64*kit.Ki), unix.ENOSPC)
		unchanged("fallocate")
		_, err = f.WriteAt(make([]byte, 64*kit.Ki), kit.Mi)
		kit.OK(t, err)
		exact(t, p, "v")
	})
}
