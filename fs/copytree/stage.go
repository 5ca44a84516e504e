package copytree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

const (
	// stageShards is how many directories staged files are spread over: workers would wait for each other in one.
	stageShards = 64
	// settledFor is how long a file must not have changed to be staged. On a kernel whose ctimes are as coarse as its
	// clock (before Linux 6.13) a change right after another one would not be seen.
	settledFor = 100 * time.Millisecond
)

// Staged are files that were copied ahead, attributes included. Each is named by what tells whether it is still like its
// source: inode number, ctime and size. It needs no memory.
type Staged struct {
	shards [stageShards]*os.File
}

// Stage copies the regular files of the tree src into the directory dir, which is empty, while src may change. What
// vanishes or changes meanwhile is left out. What is left in dir after Copy, which moves what it can use, is the
// caller's to remove. Close it.
func Stage(ctx context.Context, src, dir *os.File, o Options) (*Staged, error) {
	s, err := newStaged(dir)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	c, err := newCopier(ctx, src, dir, o)
	if err == nil {
		c.staging = s
		err = c.run()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func newStaged(dir *os.File) (*Staged, error) {
	s := new(Staged)
	for i := range s.shards {
		name := strconv.Itoa(i)
		if err := unix.Mkdirat(int(dir.Fd()), name, 0o700); err != nil {
			return s, fmt.Errorf("stage: %w", err)
		}
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return s, fmt.Errorf("stage: %w", err)
		}
		s.shards[i] = os.NewFile(uintptr(fd), name)
	}
	return s, nil
}

// Close closes what was staged. It may be called more than once.
func (s *Staged) Close() error {
	var errs []error
	for i, f := range s.shards {
		if f != nil {
			errs = append(errs, f.Close())
			s.shards[i] = nil
		}
	}
	return errors.Join(errs...)
}

// at says where the copy of what st is of is staged.
func (s *Staged) at(st *unix.Stat_t) *dir { return &dir{dst: int(s.shards[st.Ino%stageShards].Fd())} }

func stagedName(st *unix.Stat_t) string {
	return fmt.Sprintf("%x-%x-%x-%x", st.Ino, st.Ctim.Sec, st.Ctim.Nsec, st.Size)
}

// stage copies one entry ahead, if it is a regular file that is not changing right now.
func (c *copier) stage(d *dir, name string, st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h, ok, err := c.subdir(d, name)
		if err == nil && ok {
			c.push(dirHandles{src: h})
		}
		return err
	case unix.S_IFREG:
		if st.Size < c.o.StageFrom {
			return nil
		}
	default:
		return nil
	}
	if st.Nlink > 1 {
		if _, first := c.links.claim(st.Ino); !first {
			return nil
		}
	}
	src, err := openRegular(d.src, name, st)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	if c.noCowAhead(src) { // which has changed it
		return nil
	}
	if c.noReflink.Load() {
		// Pages that mappings have made dirty already are stored into without a change of ctime.
		const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(src, 0, 0, flags); err != nil {
			return fmt.Errorf("write back: %w", err)
		}
		quota.AwaitWrite(src)
		if err := unix.Fstat(src, st); err != nil {
			return err
		}
	}
	if time.Since(time.Unix(st.Ctim.Unix())) < settledFor {
		return nil
	}
	return c.stageFile(src, *st)
}

func (c *copier) stageFile(src int, was unix.Stat_t) error {
	to, name, st := c.staging.at(&was), stagedName(&was), was
	dst, err := c.copyData(to, name, src, &st)
	if err != nil {
		return err
	}
	defer unix.Close(dst)
	if !same(&was, &st) {
		return unix.Unlinkat(to.dst, name, 0)
	}
	if err := copyAttributes(src, dst, &st); err != nil {
		return err
	}
	c.o.Progress.Entries.Add(1)
	c.o.Progress.Bytes.Add(uint64(st.Size))
	return nil
}

// take moves the staged copy of a regular file to where it belongs, if the file is still what was copied.
func (s *Staged) take(d *dir, name string, st *unix.Stat_t) (bool, error) {
	err := unix.Renameat2(s.at(st).dst, stagedName(st), d.dst, name, unix.RENAME_NOREPLACE)
	switch err {
	case nil:
		return true, nil
	case unix.ENOENT:
		return false, nil
	}
	return false, fmt.Errorf("take what was staged: %w", err)
}
