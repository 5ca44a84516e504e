package copytree

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// stageFrom is the smallest file that is staged, in bytes: below it the copying is quicker than the care.
const stageFrom = 256 << 10

// Staged are files that were copied ahead. They are named by the inode numbers of their sources.
type Staged struct {
	dir *os.File

	mu    sync.Mutex // guards files
	files map[uint64]unix.Stat_t
}

// Stage copies the large files of the tree src into the directory dir, while src may change. What vanishes or changes
// meanwhile is left out. dir must stay open until Copy, which moves what it can use, has ended; what is left
// in it then is the caller's to remove.
func Stage(ctx context.Context, src, dir *os.File, o Options) (*Staged, error) {
	s := &Staged{dir: dir, files: make(map[uint64]unix.Stat_t)}
	c, err := newCopier(ctx, src, dir, o)
	if err != nil {
		return nil, err
	}
	c.staging = s
	c.noReflink.Store(true)
	return s, c.run()
}

func stagedName(ino uint64) string { return strconv.FormatUint(ino, 16) }

// stage copies one entry ahead, if it is a large file.
func (c *copier) stage(d *dir, name string, st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h, ok, err := c.subdir(d, name)
		if err == nil && ok {
			c.push(dirHandles{src: h})
		}
		return err
	case unix.S_IFREG:
		if st.Size < stageFrom || st.Blocks*512 < stageFrom {
			return nil
		}
	default:
		return nil
	}
	if _, first := c.links.claim(st.Ino); !first {
		return nil
	}
	src, err := openRegular(d.src, name, st)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	dst, err := unix.Openat(c.dstFD, stagedName(st.Ino), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	defer unix.Close(dst)
	// Once: what changes meanwhile is found out by Copy.
	settle(src)
	if err := unix.Fstat(src, st); err != nil {
		return err
	}
	if err := c.copyRanges(src, dst, st.Size); err != nil {
		return err
	}
	c.o.Progress.Bytes.Add(uint64(st.Size))
	c.staging.mu.Lock()
	defer c.staging.mu.Unlock()
	c.staging.files[st.Ino] = *st
	return nil
}

// takeStaged moves the staged copy of src to where it belongs, if src is what was copied.
func (c *copier) takeStaged(d *dir, name string, src int, st *unix.Stat_t) (bool, error) {
	s := c.o.Staged
	s.mu.Lock()
	was, ok := s.files[st.Ino]
	delete(s.files, st.Ino)
	s.mu.Unlock()
	if !ok {
		return false, nil
	}
	settle(src)
	if err := unix.Fstat(src, st); err != nil {
		return false, err
	}
	if !same(&was, st) {
		// Its space is needed for the copy that is right.
		return false, unix.Unlinkat(int(s.dir.Fd()), stagedName(st.Ino), 0)
	}
	if err := unix.Renameat2(int(s.dir.Fd()), stagedName(st.Ino), d.dst, name, unix.RENAME_NOREPLACE); err != nil {
		return false, err
	}
	return true, nil
}

// openStaged opens what takeStaged has moved, and completes it.
func (c *copier) openStaged(d *dir, name string, src int, st *unix.Stat_t) (int, error) {
	dst, err := unix.Openat(d.dst, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := c.preallocate(src, dst, st); err != nil {
		unix.Close(dst)
		return -1, err
	}
	return dst, nil
}
