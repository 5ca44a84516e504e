package pool

import (
	"context"
	"errors"
	"fmt"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// wipeChunk is how much is overwritten at a time, in bytes.
const wipeChunk = 1 << 20

var zeros [wipeChunk]byte

// wipe overwrites the data of dir/name with zeros, on the disk, if it is a regular file. What other files hold as
// well is left: it is overwritten when the last of them goes, if that one is to be wiped.
func (t *trash) wipe(ctx context.Context, dir *os.File, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Blocks == 0 && st.Size == 0 {
		return ignoreENOENT(err)
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open to overwrite: %w", err)
	}
	defer unix.Close(fd)
	var runs []quota.Range // first: overwriting moves them on some filesystems
	if err := quota.Owned(fd, func(r quota.Range) error { runs = append(runs, r); return nil }); err != nil {
		return err
	}
	for _, r := range runs {
		if err := overwrite(ctx, fd, r); errors.Is(err, unix.ENOSPC) {
			// It is not overwritten in place, so that more of it would be of no use.
			t.log.Warn("not overwritten: the disk is full", zap.String("name", name))
			return nil
		} else if err != nil {
			return fmt.Errorf("overwrite: %w", err)
		}
	}
	return nil
}

func overwrite(ctx context.Context, fd int, r quota.Range) error {
	for at := r.From; at < r.To; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.Pwrite(fd, zeros[:min(r.To-at, wipeChunk)], int64(at))
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		// The journal's commit of the unlink, which comes after, flushes the disk's cache.
		const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(fd, int64(at), int64(n), flags); err != nil {
			return err
		}
		at += uint64(n)
	}
	return nil
}

// fsNoCow is FS_NOCOW_FL (include/uapi/linux/fs.h): on btrfs, overwrite in place.
const fsNoCow = 0x00800000

// writeInPlace has the data of a new file, or of what will be made in a new directory, be overwritten where it is.
// Only btrfs writes elsewhere by itself.
func (p *Pool) writeInPlace(fd int) error {
	if p.fstype != "btrfs" {
		return nil
	}
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|fsNoCow))
	}
	if err != nil {
		return fmt.Errorf("switch copy on write off: %w", err)
	}
	return nil
}
