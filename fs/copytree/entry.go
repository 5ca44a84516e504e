package copytree

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// errChanged is returned when an entry is no longer what it was when it was looked at.
var errChanged = errors.New("it was replaced meanwhile")

func (c *copier) copyEntry(d *dir, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(d.src, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if c.staging != nil {
		if err == nil {
			err = c.stage(d, name, &st)
		}
		if gone(err) || errors.Is(err, errChanged) {
			err = nil
		}
		return err
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return c.copySubdir(d, name)
	}
	if st.Nlink > 1 {
		return c.copyLinked(d, name, &st)
	}
	return c.copyFile(d, name, &st)
}

// subdir returns the handle of a directory; not ok when something else is mounted there.
func (c *copier) subdir(d *dir, name string) (h unix.FileHandle, ok bool, err error) {
	h, mount, err := unix.NameToHandleAt(d.src, name, 0)
	return h, mount == c.mount, err
}

func (c *copier) copySubdir(d *dir, name string) error {
	src, ok, err := c.subdir(d, name)
	if err != nil || !ok {
		return err
	}
	if err := unix.Mkdirat(d.dst, name, 0o700); err != nil {
		return err
	}
	dst, _, err := unix.NameToHandleAt(d.dst, name, 0)
	if err != nil {
		return err
	}
	c.o.Progress.Entries.Add(1)
	c.push(dirHandles{src, dst})
	return nil
}

// copyFile copies what is no directory.
func (c *copier) copyFile(d *dir, name string, st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return c.copyRegular(d, name, st)
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(d.src, name, target)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(target[:n]), d.dst, name); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(d.dst, name, st.Mode&^0o7777|0o600, int(st.Rdev)); err != nil {
			return err
		}
	}
	c.o.Progress.Entries.Add(1)
	return copyAttributesAt(d.src, d.dst, name, st)
}

func (c *copier) copyRegular(d *dir, name string, st *unix.Stat_t) error {
	if c.o.Staged != nil && st.Size >= c.o.StageFrom {
		if took, err := c.o.Staged.take(d, name, st); took || err != nil {
			return err
		}
	}
	src, err := openRegular(d.src, name, st)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	c.noCowAhead(src)
	dst, err := c.copyData(d, name, src, st)
	if err != nil {
		return err
	}
	defer unix.Close(dst)
	c.o.Progress.Entries.Add(1)
	c.o.Progress.Bytes.Add(uint64(st.Size))
	return copyAttributes(src, dst, st)
}

// noCowAhead prepares a file for sharing its blocks, where it is not: volumes of earlier versions hold such. Their
// copies have it from the directory that they are made in.
func (c *copier) noCowAhead(src int) (changed bool) { return c.isXFS && c.o.Rule.NoCowAhead(src) }

// openRegular opens the file that st is of.
func openRegular(dirFD int, name string, st *unix.Stat_t) (int, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOATIME | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := unix.Openat(dirFD, name, flags, 0)
	if err != nil {
		return -1, err
	}
	var now unix.Stat_t
	err = unix.Fstat(fd, &now)
	if err == nil && (now.Ino != st.Ino || now.Dev != st.Dev || now.Mode&unix.S_IFMT != unix.S_IFREG) {
		err = errChanged
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	*st = now
	return fd, nil
}

// links are the inodes of several links that have been copied or are being copied.
type links struct {
	mu    sync.Mutex // guards byIno
	byIno map[uint64]*link
}

type link struct {
	done   chan struct{} // closed when what follows is set
	handle unix.FileHandle
	err    error
}

func (l *links) init() { l.byIno = make(map[uint64]*link) }

// claim returns the inode's link, and whether the caller is the first and must copy it.
func (l *links) claim(ino uint64) (entry *link, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if entry = l.byIno[ino]; entry == nil {
		entry, first = &link{done: make(chan struct{})}, true
		l.byIno[ino] = entry
	}
	return entry, first
}

// copyLinked copies an inode the first time, and links its copy the other times.
func (c *copier) copyLinked(d *dir, name string, st *unix.Stat_t) error {
	l, first := c.links.claim(st.Ino)
	if first {
		defer close(l.done)
		if l.err = c.copyFile(d, name, st); l.err == nil {
			l.handle, _, l.err = unix.NameToHandleAt(d.dst, name, 0)
		}
		return l.err
	}
	<-l.done // its copier waits for nobody
	if l.err != nil {
		return fmt.Errorf("another link of it: %w", l.err)
	}
	fd, err := unix.OpenByHandleAt(c.dstFD, l.handle, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Linkat(fd, "", d.dst, name, unix.AT_EMPTY_PATH)
}
