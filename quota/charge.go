package quota

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// MinBlock is the smallest unit of charge in bytes.
	MinBlock = 4096

	// LinkCharge is what each link of a non-directory beyond its first
	// costs, in bytes: a directory entry takes up to 263 on ext4, and without
	// a price a volume's owner could fill the disk with names.
	LinkCharge = 512

	// PreallocXattr is the extended attribute of a backing inode that holds
	// the end of what was explicitly preallocated in it, in bytes from its
	// start, in decimal ASCII. Absent means 0. Only a process with
	// CAP_SYS_ADMIN sees or changes it (xattr(7), "trusted").
	PreallocXattr = "trusted.croft.prealloc"
)

// ErrBadPrealloc is returned when PreallocXattr holds something that is not an end.
var ErrBadPrealloc = errors.New("attribute " + PreallocXattr + " is malformed")

// Rule is the charge rule of a pool (see the package documentation).
type Rule struct {
	// Block is the unit in which data is charged, in bytes: the larger of
	// MinBlock and the backing filesystem's f_bsize. Less counts as MinBlock.
	Block uint64
	// Type is the backing filesystem's f_type (statfs(2)). By it Charge and MayHide know
	// what st_blocks counts; 0 counts as that of one whose st_blocks is of data only.
	Type int64
}

// Range is [From, To) of a file, in bytes.
type Range struct{ From, To uint64 }

// RuleFor returns the rule for the backing filesystem of fd, which may be O_PATH.
func RuleFor(fd int) (Rule, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(fd, &st) }); err != nil {
		return Rule{}, fmt.Errorf("statfs: %w", err)
	}
	return Rule{Block: max(MinBlock, uint64(st.Bsize)), Type: int64(st.Type)}, nil
}

func (r Rule) block() uint64 { return max(r.Block, MinBlock) }

func (r Rule) roundDown(n uint64) uint64 { return n - n%r.block() }

// roundUp saturates at the last multiple of the block, which no file reaches.
func (r Rule) roundUp(n uint64) uint64 {
	if n > math.MaxUint64-r.block() {
		return r.roundDown(math.MaxUint64)
	}
	return r.roundDown(n + r.block() - 1)
}

// inode is what the rule looks at.
type inode struct {
	mode         uint32
	nlink        uint64
	size, blocks uint64 // bytes; blocks as st_blocks counts them
}

func inodeOf(st *unix.Stat_t) inode {
	return inode{mode: st.Mode, nlink: uint64(st.Nlink), size: uint64(max(0, st.Size)), blocks: uint64(st.Blocks) * 512}
}

// plain returns the charge of an inode that needs no look at its mapping.
func (r Rule) plain(i inode) (charge uint64, ok bool) {
	size := r.roundUp(i.size)
	switch i.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return r.block(), true
	case unix.S_IFREG:
		switch {
		case i.blocks == 0 && i.size == 0:
			charge = 0
		case i.size <= 4*r.block() && i.blocks == size:
			charge = size
		default:
			return 0, false
		}
	default:
		charge = min(i.blocks, size)
	}
	return charge + i.links(), true
}

func (i inode) links() uint64 { return (max(i.nlink, 1) - 1) * LinkCharge }

// NeedsMap tells whether Charge has to look at the file's mapping: only then
// does it call open, and only then does prealloc matter.
func (r Rule) NeedsMap(st *unix.Stat_t) bool {
	_, ok := r.plain(inodeOf(st))
	return !ok
}

// Charge returns what the inode that st describes counts, in bytes, with
// LinkCharge for its further links. open is called at most once, when NeedsMap;
// it gives a new descriptor of the same inode that is open for reading, and done to
// call when it is no longer needed. prealloc is what ReadPrealloc says of it.
//
// st is read anew where blocks are being allocated, by which it is wrong for a
// moment; see AwaitAllocation.
func (r Rule) Charge(st *unix.Stat_t, open func() (fd int, done func(), err error), prealloc uint64) (uint64, error) {
	i := inodeOf(st)
	if charge, ok := r.plain(i); ok {
		return charge, nil
	}
	fd, done, err := open()
	if err != nil {
		return 0, fmt.Errorf("open for its mapping: %w", err)
	}
	defer done()
	return r.mappedCharge(st, fd, prealloc)
}

// mappedCharge is Charge where the mapping has to be looked at.
func (r Rule) mappedCharge(st *unix.Stat_t, fd int, prealloc uint64) (uint64, error) {
	i := inodeOf(st)
	mapped, err := r.Mapped(fd, 0, max(i.size, prealloc))
	if err == nil && r.doubtful(i, mapped, fd) {
		AwaitAllocation(fd)
		if err = retry(func() error { return unix.Fstat(fd, st) }); err != nil {
			return 0, err
		}
		i = inodeOf(st)
		if charge, ok := r.plain(i); ok {
			return charge, nil
		}
		mapped, err = r.Mapped(fd, 0, max(i.size, prealloc))
	}
	return mapped + i.links(), err
}

// doubtful tells whether the blocks that a small file has may be as many as its size, though
// st_blocks said something else when it was read: some of them are none of those that are mapped.
func (r Rule) doubtful(i inode, mapped uint64, fd int) bool {
	size := r.roundUp(i.size)
	if i.size > 4*r.block() || mapped >= size {
		return false
	}
	// Of ext4 that is one at the most.
	return r.Type == unix.XFS_SUPER_MAGIC || mapped+r.block() == size && r.MayHide(fd)
}

// MayHide tells whether st_blocks of the regular file behind fd, one of at most four blocks, may count some that
// are no data: xfs has some ready beyond the end, and both it and ext4 have one for
// attributes. fd may be O_PATH.
func (r Rule) MayHide(fd int) bool {
	switch r.Type {
	case unix.XFS_SUPER_MAGIC:
		return true
	case unix.EXT4_SUPER_MAGIC:
		size, err := unix.Listxattr(procPath(fd), nil)
		return err != nil || size > 0
	}
	return false
}

// AwaitAllocation waits until no block of the file is being allocated that was written before. When one is written
// back, it is taken off those that wait before it is counted as the file's, or the other way
// round, and in between st_blocks is wrong by that: on ext4 for as long as the kernel's thread is kept from
// running (ext4_da_update_reserve_space in fs/ext4/inode.c), on xfs for some
// instructions (xfs_bmap_alloc_account in fs/xfs/libxfs/xfs_bmap.c).
//
// Errors of writing back are for whoever syncs the file: fd, which is open and not O_PATH, should be
// a descriptor that nobody does that with, or it takes them away.
func AwaitAllocation(fd int) {
	_ = retry(func() error {
		return unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	})
}

// Mapped returns how many bytes are in blocks of [from, to) that are mapped:
// written, unwritten, or waiting for allocation. from is rounded down and to up to
// a whole block; a block counts once, if any part of it is mapped. fd is a
// regular file open for reading or writing, not O_PATH. Nothing is written
// back for it.
func (r Rule) Mapped(fd int, from, to uint64) (bytes uint64, err error) {
	err = r.walk(fd, from, to, func(run Range) { bytes += run.To - run.From })
	return bytes, err
}

// Unmapped returns the runs of blocks of [from, to) that are not mapped,
// ascending, none next to another: the complement of what Mapped counts.
func (r Rule) Unmapped(fd int, from, to uint64) (gaps []Range, err error) {
	if from >= to {
		return nil, nil
	}
	at, end := r.roundDown(from), r.roundUp(to)
	err = r.walk(fd, from, to, func(run Range) {
		if run.From > at {
			gaps = append(gaps, Range{From: at, To: run.From})
		}
		at = run.To
	})
	if err != nil {
		return nil, err
	}
	if at < end {
		gaps = append(gaps, Range{From: at, To: end})
	}
	return gaps, nil
}

// walk calls fn for runs of mapped blocks of [from, to), ascending and disjoint.
func (r Rule) walk(fd int, from, to uint64, fn func(Range)) error {
	if from >= to {
		return nil
	}
	lo, hi := r.roundDown(from), r.roundUp(to)
	m := fiemaps.Get().(*fiemap)
	defer fiemaps.Put(m)
	counted := lo // blocks before it have been given to fn
	for next := lo; next < hi; {
		extents, err := m.read(fd, next, hi-next)
		if err != nil {
			return err
		}
		if len(extents) == 0 {
			return nil
		}
		before := next
		for i := range extents {
			e := &extents[i]
			end := e.logical + e.length
			run := Range{From: max(counted, r.roundDown(e.logical)), To: min(hi, r.roundUp(end))}
			if run.From < run.To {
				fn(run)
				counted = run.To
			}
			if e.flags&fiemapExtentLast != 0 {
				return nil
			}
			next = max(next, end)
		}
		if next == before {
			return fmt.Errorf("mapping of the file: %w: no progress at byte %d", unix.EIO, next)
		}
	}
	return nil
}

// The FIEMAP ioctl: Linux include/uapi/linux/fiemap.h and
// Documentation/filesystems/fiemap.rst. golang.org/x/sys has none of it.
const (
	fsIocFiemap      = 0xc020660b // _IOWR('f', 11, struct fiemap)
	fiemapExtentLast = 0x1
	fiemapBatch      = 128
)

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

type fiemap struct {
	start, length uint64
	flags         uint32
	mapped, count uint32
	_             uint32
	extents       [fiemapBatch]fiemapExtent
}

var fiemaps = sync.Pool{New: func() any { return new(fiemap) }}

// read returns the next extents that overlap [start, start+length). The first
// may begin before start. They are valid until the next read.
func (m *fiemap) read(fd int, start, length uint64) ([]fiemapExtent, error) {
	m.start, m.length, m.flags, m.mapped, m.count = start, length, 0, 0, fiemapBatch
	err := retry(func() error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(m)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	switch err {
	case nil:
		return m.extents[:min(m.mapped, fiemapBatch)], nil
	case unix.EFBIG: // start is beyond what the filesystem can hold (fiemap_prep, fs/ioctl.c)
		return nil, nil
	default:
		return nil, fmt.Errorf("mapping of the file (FIEMAP): %w", err)
	}
}

// maxPrealloc bounds PreallocXattr: no file is longer (loff_t).
const maxPrealloc = math.MaxInt64

// ReadPrealloc returns the end of what was explicitly preallocated in the
// inode behind fd, which may be O_PATH; 0 when nothing was.
func ReadPrealloc(fd int) (uint64, error) {
	var buf [32]byte
	n, err := unix.Fgetxattr(fd, PreallocXattr, buf[:])
	if err == unix.EBADF { // O_PATH
		n, err = unix.Getxattr(procPath(fd), PreallocXattr, buf[:])
	}
	switch err {
	case nil:
	case unix.ENODATA, unix.EOPNOTSUPP:
		return 0, nil
	case unix.ERANGE:
		return 0, ErrBadPrealloc
	default:
		return 0, fmt.Errorf("read %s: %w", PreallocXattr, err)
	}
	end, err := strconv.ParseUint(string(buf[:n]), 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%w: %q", ErrBadPrealloc, buf[:n])
	}
	return end, nil
}

// WritePrealloc records end for ReadPrealloc; 0 removes the record. fd may be
// O_PATH. It is as durable as the file's other attributes: after fsync.
func WritePrealloc(fd int, end uint64) error {
	if end > maxPrealloc {
		return fmt.Errorf("write %s: %d: %w", PreallocXattr, end, unix.EFBIG)
	}
	var err error
	if end == 0 {
		if err = unix.Fremovexattr(fd, PreallocXattr); err == unix.EBADF {
			err = unix.Removexattr(procPath(fd), PreallocXattr)
		}
		if err == unix.ENODATA || err == unix.EOPNOTSUPP {
			return nil
		}
	} else {
		value := strconv.AppendUint(nil, end, 10)
		if err = unix.Fsetxattr(fd, PreallocXattr, value, 0); err == unix.EBADF {
			err = unix.Setxattr(procPath(fd), PreallocXattr, value, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", PreallocXattr, err)
	}
	return nil
}

// procPath names what fd is open on, of any type, for calls that take no O_PATH descriptor.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
