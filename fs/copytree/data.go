package copytree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

const (
	// maxCopy bounds one copy_file_range(2), in bytes, so that an end of the context is seen soon.
	maxCopy = 32 << 20
	// maxTries is how often a file is copied that changes meanwhile. Only stores into mappings go on for so long.
	maxTries = 3
	// smallFile is the size in bytes up to which a file without holes is read and written by one call each.
	smallFile = 64 << 10
)

// File copies the data of the regular file src to dst, which is empty, with its holes and what is preallocated.
// cloned tells that it was by reflink.
func File(ctx context.Context, src, dst *os.File, o Options) (cloned bool, err error) {
	c, err := newCopier(ctx, src, dst, o)
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(c.srcFD, &st); err != nil {
		return false, err
	}
	if err := c.fill(c.srcFD, c.dstFD, &st); err != nil {
		return false, err
	}
	c.o.Progress.Bytes.Add(uint64(st.Size))
	return !c.noReflink.Load(), nil
}

// copyData makes the file name in d with the data of src, and returns it open.
func (c *copier) copyData(d *dir, name string, src int, st *unix.Stat_t) (int, error) {
	dst, err := unix.Openat(d.dst, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, err
	}
	if err := c.fill(src, dst, st); err != nil {
		unix.Close(dst)
		return -1, err
	}
	return dst, nil
}

// fill gives dst the data of src, and makes st what src was then.
func (c *copier) fill(src, dst int, st *unix.Stat_t) error {
	cloned, err := c.reflink(src, dst, st)
	for try := 1; err == nil && !cloned; try++ {
		if st.Size == 0 && st.Blocks == 0 {
			break
		}
		quota.AwaitWrite(src)
		if err = unix.Fstat(src, st); err != nil {
			break
		}
		if err = c.copyRanges(src, dst, st); err != nil {
			break
		}
		var after unix.Stat_t
		if err = unix.Fstat(src, &after); err != nil || same(st, &after) || try == maxTries {
			break
		}
		err = unix.Ftruncate(dst, 0)
	}
	if err != nil {
		return err
	}
	return c.preallocate(src, dst, st)
}

// reflink shares the data of src, if the filesystem can.
func (c *copier) reflink(src, dst int, st *unix.Stat_t) (bool, error) {
	if st.Size == 0 || c.noReflink.Load() {
		return false, nil
	}
	switch err := unix.IoctlFileClone(dst, src); err {
	case nil:
		return true, nil
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS, unix.EXDEV:
		c.noReflink.Store(true)
		return false, nil
	case unix.EINVAL, unix.ETXTBSY: // this file only: without copy on write, a swap file
		return false, nil
	default:
		return false, fmt.Errorf("reflink: %w", err)
	}
}

// same tells whether no write has begun between two looks. Since Linux 6.13 ctime changes with each that
// comes after a look (multigrain timestamps).
func same(a, b *unix.Stat_t) bool {
	return a.Ino == b.Ino && a.Size == b.Size && a.Ctim == b.Ctim && a.Mtim == b.Mtim
}

// copyRanges copies what is data. Nothing is in dst.
func (c *copier) copyRanges(src, dst int, st *unix.Stat_t) error {
	size := st.Size
	if size <= smallFile {
		if hole, err := unix.Seek(src, 0, unix.SEEK_HOLE); err == nil && hole == size {
			return copySmall(src, dst, size)
		}
	}
	if err := unix.Ftruncate(dst, size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(src, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil // only a hole is left
		} else if err != nil {
			return err
		}
		hole, err := unix.Seek(src, data, unix.SEEK_HOLE)
		if err != nil && err != unix.ENXIO {
			return err
		}
		if at = min(hole, size); at <= data {
			return nil
		}
		if err := c.copyRange(src, dst, data, at); err != nil {
			return err
		}
	}
	return nil
}

var smallBuffers = sync.Pool{New: func() any { return new([smallFile]byte) }}

func copySmall(src, dst int, size int64) error {
	buf := smallBuffers.Get().(*[smallFile]byte)
	defer smallBuffers.Put(buf)
	n, err := unix.Pread(src, buf[:size], 0)
	for at := 0; err == nil && at < n; {
		var written int
		written, err = unix.Pwrite(dst, buf[at:n], int64(at))
		at += written
	}
	if err == nil && int64(n) < size {
		err = unix.Ftruncate(dst, size)
	}
	return err
}

func (c *copier) copyRange(src, dst int, from, to int64) error {
	for from < to {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		in, out := from, from
		n, err := unix.CopyFileRange(src, &in, dst, &out, int(min(to-from, maxCopy)), 0)
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return fmt.Errorf("copy_file_range: %w", err)
		}
		if n == 0 { // it has become shorter
			return nil
		}
		from += int64(n)
	}
	return nil
}

// preallocate gives dst the blocks that src has and holds no data in: reflink and copy leave them out.
func (c *copier) preallocate(src, dst int, st *unix.Stat_t) error {
	rule := c.o.Rule
	if !rule.NeedsMap(st) {
		return nil
	}
	prealloc, err := quota.ReadPrealloc(src)
	if err != nil {
		return err
	}
	end := max(uint64(st.Size), prealloc)
	has, errHas := rule.Mapped(src, 0, end)
	got, errGot := rule.Mapped(dst, 0, end)
	if err := errors.Join(errHas, errGot); err != nil {
		return err
	}
	if got < has {
		holes, err := rule.Unmapped(src, 0, end)
		if err != nil {
			return err
		}
		missing, err := rule.Unmapped(dst, 0, end)
		if err != nil {
			return err
		}
		for _, r := range without(missing, holes) {
			to := min(r.To, end)
			if err := unix.Fallocate(dst, unix.FALLOC_FL_KEEP_SIZE, int64(r.From), int64(to-r.From)); err != nil {
				return fmt.Errorf("preallocate: %w", err)
			}
		}
	}
	if prealloc == 0 {
		return nil
	}
	return quota.WritePrealloc(dst, prealloc)
}

// without returns what is in a and not in b; both are ascending and disjoint.
func without(a, b []quota.Range) (rest []quota.Range) {
	for _, r := range a {
		for len(b) > 0 && b[0].To <= r.From {
			b = b[1:]
		}
		from := r.From
		for _, x := range b {
			if x.From >= r.To {
				break
			}
			if x.From > from {
				rest = append(rest, quota.Range{From: from, To: x.From})
			}
			from = max(from, x.To)
		}
		if from < r.To {
			rest = append(rest, quota.Range{From: from, To: r.To})
		}
	}
	return rest
}
