package fs

import (
	"errors"
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// Read serves read(2), pread(2) and page cache fills.
func (f *FS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	h, err := f.useHandle(in.Fh)
	if err != nil {
		return nil, toStatus(err)
	}
	defer h.done()
	for {
		n, err := unix.Pread(h.fd, buf, int64(in.Offset))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, toStatus(err)
		}
		return fuse.ReadResultData(buf[:n]), fuse.OK
	}
}

// Write serves write(2) and the write-back of shared mappings. At the limit it
// writes what fits; ENOSPC when nothing does, and at write-back when not all
// does: there the kernel looks at the error only (fs/fuse/file.c,
// fuse_writepage_end), and what is not reported is lost in silence.
func (f *FS) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	var written uint64
	err := f.change(in.Fh, func(n *node, h *file) (err error) {
		if in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0 {
			if err := dropSetID(h.fd); err != nil {
				return err
			}
		}
		end, err := f.fillGapLocked(n, h.fd, in.Offset)
		if err != nil {
			return err
		}
		written, err = f.growLocked(n, h.fd, in.Offset, uint64(len(data)), true, func(length uint64) (uint64, error) {
			return pwrite(h.fd, data[:length], in.Offset)
		})
		if err != nil && written == 0 && end < in.Offset {
			err = errors.Join(err, f.truncateLocked(n, h.fd, end)) // nothing was written: as if never asked
		}
		return err
	})
	writeBack := in.WriteFlags&fuse.WRITE_CACHE != 0
	switch {
	case writeBack && err == nil && written < uint64(len(data)):
		return 0, fuse.Status(unix.ENOSPC)
	case written > 0 && (!writeBack || err == nil):
		return uint32(written), fuse.OK
	}
	return 0, toStatus(err)
}

// Writev leaves it to Write: the transport's buffer is one piece.
func (f *FS) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func pwrite(fd int, data []byte, off uint64) (uint64, error) {
	for {
		n, err := unix.Pwrite(fd, data, int64(off))
		if err == unix.EINTR {
			continue
		}
		return uint64(max(n, 0)), err
	}
}

// change runs fn as a change of an open file's inode, with node.mu held.
func (f *FS) change(fh uint64, fn func(*node, *file) error) error {
	h, err := f.handles.get(fh)
	if err != nil {
		return err
	}
	n := h.node
	if err := n.vol.begin(); err != nil {
		return err
	}
	defer n.vol.end()
	if err := h.use(); err != nil {
		return err
	}
	defer h.done()
	n.lock()
	defer n.unlock()
	defer f.liftLocked(n)()
	return fn(n, h)
}

// Fallocate serves fallocate(2). The kernel lets KEEP_SIZE, PUNCH_HOLE and
// ZERO_RANGE through (fs/fuse/file.c) and refuses the rest itself. Allocation
// is all or ENOSPC.
func (f *FS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	off, length := in.Offset, in.Length
	keep := in.Mode&unix.FALLOC_FL_KEEP_SIZE != 0
	return toStatus(f.change(in.Fh, func(n *node, h *file) error {
		if err := dropSetIDUnprivileged(h.fd, in); err != nil {
			return err
		}
		if in.Mode&unix.FALLOC_FL_PUNCH_HOLE != 0 {
			return f.punchLocked(n, h.fd, in.Mode, off, length)
		}
		if err := f.loadLocked(n, h.fd); err != nil {
			return err
		}
		if !keep && n.has(shared) && off > n.size { // without a hole in between, all or nothing
			off, length = n.size, off+length-n.size
		}
		beyond := keep && f.roundUp(off+length) > f.chargedEndLocked(n)
		_, err := f.growLocked(n, h.fd, off, length, false, func(uint64) (uint64, error) {
			if beyond {
				// Before the blocks: a preallocation that is recorded and not
				// there costs nothing, the other way round it would be uncharged.
				if err := quota.WritePrealloc(h.fd, off+length); err != nil {
					return 0, err
				}
			}
			if err := fallocate(h.fd, in.Mode, off, length); err != nil {
				return 0, err
			}
			if keep {
				return 0, nil // the size stays: let the charge be read back
			}
			return length, nil
		})
		return err
	}))
}

// dropSetIDUnprivileged clears set-id bits as the kernel's vfs_fallocate does
// for callers without CAP_FSETID; FUSE does not say which they are, so root
// (the only caller with uid 0) keeps them.
func dropSetIDUnprivileged(fd int, in *fuse.FallocateIn) error {
	if in.Uid == 0 {
		return nil
	}
	return dropSetID(fd)
}

// punchLocked makes a hole and credits the blocks that it freed.
func (f *FS) punchLocked(n *node, fd int, mode uint32, off, length uint64) error {
	if err := f.loadLocked(n, fd); err != nil {
		return err
	}
	// Without the blocks at either end that are holes already (see holeAtLocked).
	end := off + length
	if n.has(shared) { // zeros do instead of a hole
		if end = min(end, n.size); off >= end {
			return nil
		}
		err := fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, end-off)
		if err != nil { // it may have left a hole
			err = errors.Join(err, f.recountLocked(n, fd, 0))
		}
		return err
	}
	if hole, err := f.holeAtLocked(n, fd, off); err != nil {
		return err
	} else if hole {
		off = min(f.roundUp(off), end)
	}
	if hole, err := f.holeAtLocked(n, fd, end); err != nil {
		return err
	} else if hole {
		end = max(f.roundDown(end), off)
	}
	if off == end {
		return nil
	}
	err := fallocate(fd, mode, off, end-off)
	if rerr := f.recountLocked(n, fd, 0); err == nil {
		err = rerr
	}
	return err
}

// CopyFileRange serves copy_file_range(2): a reflink where the backing
// filesystem can, else a copy in its kernel. The target is charged for every
// block that it has afterwards, shared or not.
func (f *FS) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	src, err := f.handles.get(in.FhIn)
	if err != nil {
		return 0, toStatus(err)
	}
	var copied uint64
	err = f.change(in.FhOut, func(n *node, dst *file) error {
		if src != dst { // whose descriptor is pinned already
			if err := src.use(); err != nil {
				return err
			}
			defer src.done()
		}
		copied, err = f.copyLocked(n, src, dst, in)
		return err
	})
	if copied > 0 {
		return uint32(copied), fuse.OK
	}
	return 0, toStatus(err)
}

func (f *FS) copyLocked(n *node, src, dst *file, in *fuse.CopyFileRangeIn) (copied uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(src.fd, &st); err != nil || in.OffIn >= uint64(st.Size) {
		return 0, err
	}
	length := min(in.Len, uint64(st.Size)-in.OffIn, maxCopy)
	if in.Uid != 0 {
		if err := dropSetID(dst.fd); err != nil {
			return 0, err
		}
	}
	if n.has(shared) {
		return 0, unix.EXDEV // it could bring holes along; the kernel copies by itself then
	}
	if err := f.loadLocked(n, dst.fd); err != nil {
		return 0, err
	}
	if f.isXFS {
		f.rule.NoCowAhead(src.fd)
		f.rule.NoCowAhead(dst.fd)
	}
	n.dense = false // a reflink brings the source's holes along
	_, err = f.growLocked(n, dst.fd, in.OffOut, length, true, func(length uint64) (uint64, error) {
		copied, err = copyRange(src.fd, dst.fd, in.OffIn, in.OffOut, length)
		// Never "all of it", so that the charge is read back.
		return math.MaxUint64, err
	})
	return copied, err
}

func copyRange(src, dst int, offIn, offOut, length uint64) (uint64, error) {
	in, out := int64(offIn), int64(offOut)
	for {
		n, err := unix.CopyFileRange(src, &in, dst, &out, int(length), 0)
		if err == unix.EINTR {
			continue
		}
		return uint64(max(n, 0)), err
	}
}

// Lseek serves SEEK_DATA and SEEK_HOLE; the rest the kernel does by itself.
func (f *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	h, err := f.useHandle(in.Fh)
	if err != nil {
		return toStatus(err)
	}
	defer h.done()
	// The descriptor's own offset is used by nothing else.
	off, err := unix.Seek(h.fd, int64(in.Offset), int(in.Whence))
	if err != nil {
		return toStatus(err)
	}
	out.Offset = uint64(off)
	return fuse.OK
}

// Flush has nothing to do at a close: files are opened with FOPEN_NOFLUSH, and
// locks are the kernel's.
func (f *FS) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Fsync serves fsync(2) and fdatasync(2).
func (f *FS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	h, err := f.useHandle(in.Fh)
	if err != nil {
		return toStatus(err)
	}
	defer h.done()
	return toStatus(fsync(h.fd, in))
}

// FsyncDir serves fsync(2) of a directory.
func (f *FS) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if in.NodeId == rootIno {
		return toStatus(fsync(int(f.pool.Fd()), in))
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	err := f.withFD(n, func(fd int) error { return fsync(fd, in) })
	if isGone(err) && n.has(nameless) {
		return fuse.OK // it was removed while it was open: nothing of it is on the disk
	}
	return toStatus(err)
}

func fsync(fd int, in *fuse.FsyncIn) error {
	const dataOnly = 1 // FUSE_FSYNC_FDATASYNC
	if in.FsyncFlags&dataOnly != 0 {
		return unix.Fdatasync(fd)
	}
	return unix.Fsync(fd)
}

// Ioctl knows none: a request that would reach the backing file (flags,
// subvolumes, defragmentation) could get around the limit.
func (f *FS) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(unix.ENOTTY)
}

// Access is not asked under default_permissions.
func (f *FS) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// GetLk, SetLk and SetLkw are not asked: locks are the kernel's.
func (f *FS) GetLk(<-chan struct{}, *fuse.LkIn, *fuse.LkOut) fuse.Status { return fuse.ENOTSUP }

// SetLk is not asked; see GetLk.
func (f *FS) SetLk(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOTSUP }

// SetLkw is not asked; see GetLk.
func (f *FS) SetLkw(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOTSUP }
