package kit

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

const chargeBlock = quota.MinBlock

// Mixer does everything that a filesystem can do, at random, to the same few files
// of a directory. Several may work in one directory.
type Mixer struct {
	Dir    string
	Random *rand.Rand
	open   []*os.File
}

func (m *Mixer) path() string {
	return filepath.Join(m.Dir, []string{"", "d0", "d1"}[m.Random.IntN(3)], fmt.Sprint("f", m.Random.IntN(9)))
}

// size is small, near a few blocks, or large.
func (m *Mixer) size() int64 {
	switch m.Random.IntN(3) {
	case 0:
		return 1 + m.Random.Int64N(3*chargeBlock)
	case 1:
		return m.Random.Int64N(8) * chargeBlock
	default:
		return m.Random.Int64N(2 * Mi)
	}
}

// Close closes the files that are still open.
func (m *Mixer) Close() {
	for _, f := range m.open {
		f.Close()
	}
	m.open = nil
}

// file opens one of the files, or takes one that is open.
func (m *Mixer) file(flags int) (*os.File, error) {
	if n := len(m.open); n > 0 && m.Random.IntN(3) == 0 {
		return m.open[m.Random.IntN(n)], nil
	}
	f, err := os.OpenFile(m.path(), os.O_RDWR|os.O_CREATE|flags, 0o644)
	if err != nil {
		return nil, err
	}
	m.open = append(m.open, f)
	return f, nil
}

// Step does something. What a full volume, or another goroutine's doing,
// explains is no error: among them a symbolic link or a whiteout in the place of a file.
func (m *Mixer) Step() error {
	for len(m.open) > 4 {
		m.open[0].Close()
		m.open = m.open[1:]
	}
	err := m.operations()[m.Random.IntN(len(m.operations()))]()
	for _, expected := range []error{
		unix.ENOSPC, unix.ENOENT, unix.EEXIST, unix.ENOTEMPTY, unix.ENOTDIR, unix.EISDIR, unix.EINVAL, unix.ENODATA, unix.EBUSY, unix.EPERM, unix.EACCES, unix.ENAMETOOLONG,
		unix.EBADF, // copy_file_range to a file that was opened with O_APPEND
	} {
		if errors.Is(err, expected) {
			return nil
		}
	}
	return err
}

func (m *Mixer) operations() []func() error {
	onFile := func(flags int, fn func(fd int) error) func() error {
		return func() error {
			f, err := m.file(flags)
			if err != nil {
				return err
			}
			return fn(int(f.Fd()))
		}
	}
	write := func(fd int) error {
		_, err := unix.Pwrite(fd, make([]byte, 1+m.size()/8), m.size())
		return err
	}
	allocate := func(mode uint32) func(fd int) error {
		return func(fd int) error { return unix.Fallocate(fd, mode, m.size(), 1+m.size()/4) }
	}
	return []func() error{
		onFile(0, write), onFile(0, write), onFile(os.O_APPEND, write), onFile(os.O_TRUNC, write), onFile(os.O_SYNC, write),
		onFile(0, func(fd int) error { return unix.Ftruncate(fd, m.size()) }),
		onFile(0, func(fd int) error { return unix.Ftruncate(fd, m.size()) }),
		onFile(0, allocate(0)), onFile(0, allocate(unix.FALLOC_FL_KEEP_SIZE)),
		onFile(0, allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE)),
		onFile(0, allocate(unix.FALLOC_FL_ZERO_RANGE)), onFile(0, allocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE)),
		onFile(0, func(fd int) error { return m.store(fd) }),
		onFile(0, func(to int) error {
			from, err := m.file(0)
			if err != nil {
				return err
			}
			in, out := m.size(), m.size()
			_, err = unix.CopyFileRange(int(from.Fd()), &in, to, &out, int(m.size()), 0)
			return err
		}),
		onFile(0, func(fd int) error { return unix.Fsetxattr(fd, "user.x", make([]byte, m.Random.IntN(3500)), 0) }),
		onFile(0, func(fd int) error { return unix.Fremovexattr(fd, "user.x") }),
		onFile(0, unix.Fsync),
		func() error { return os.Remove(m.path()) },
		func() error { return os.Remove(m.path()) },
		func() error { return os.Rename(m.path(), m.path()) },
		func() error {
			return unix.Renameat2(unix.AT_FDCWD, m.path(), unix.AT_FDCWD, m.path(), unix.RENAME_EXCHANGE)
		},
		func() error {
			return unix.Renameat2(unix.AT_FDCWD, m.path(), unix.AT_FDCWD, m.path(), unix.RENAME_WHITEOUT)
		},
		func() error { return os.Link(m.path(), m.path()) },
		func() error { return os.Symlink(strings.Repeat("x", 1000), m.path()) },
		func() error { return unix.Mkfifo(m.path()+"p", 0o600) },
		func() error { return os.Remove(m.path() + "p") },
		func() error { return os.Mkdir(filepath.Join(m.Dir, fmt.Sprint("d", m.Random.IntN(2))), 0o755) },
		func() error {
			return os.Rename(filepath.Join(m.Dir, fmt.Sprint("d", m.Random.IntN(2))), filepath.Join(m.Dir, fmt.Sprint("d", m.Random.IntN(2))))
		},
		func() error { return os.RemoveAll(filepath.Join(m.Dir, fmt.Sprint("d", m.Random.IntN(2)))) },
		func() error {
			fd, err := unix.Open(m.Dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
			if err != nil {
				return err
			}
			f := os.NewFile(uintptr(fd), "tmpfile")
			m.open = append(m.open, f)
			if m.Random.IntN(2) == 0 {
				return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, m.path(), unix.AT_SYMLINK_FOLLOW)
			}
			return write(fd)
		},
	}
}

// store writes through a shared mapping, inside of the file.
func (m *Mixer) store(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Size < chargeBlock {
		return err
	}
	length := st.Size / chargeBlock * chargeBlock
	// A truncation by another goroutine would be a SIGBUS at the store: the
	// kernel copies instead, and answers an error.
	mem, err := unix.Mmap(fd, 0, int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(mem) }()
	src, err := os.Open("/dev/zero")
	if err != nil {
		return err
	}
	defer src.Close()
	at := m.Random.Int64N(length)
	if _, err := unix.Read(int(src.Fd()), mem[at:min(length, at+50_000)]); err != nil && !errors.Is(err, unix.EFAULT) {
		return err
	}
	if err := unix.Msync(mem, unix.MS_SYNC); err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
		return err
	}
	return nil
}
