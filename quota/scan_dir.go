package quota

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// scanDir is a directory of the tree that is scanned. It is open from when it is read
// until its subdirectories are open, for they are opened through it.
type scanDir struct {
	parent *scanDir // nil at the root
	name   string

	// mu guards what follows. It is held for reading while the descriptor is
	// in use, backing I/O included, and for writing to close it.
	mu     sync.RWMutex
	fd     int              // -1 when it is not open
	handle *unix.FileHandle // finds it again after it was parked
	claims int              // subdirectories not opened yet, and 1 until it has been read
}

// openDir opens the directory name of the directory fd, unless something is
// mounted on it (EXDEV).
func openDir(fd int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	}
	var child int
	err := retry(func() (err error) {
		child, err = unix.Openat2(fd, name, &how)
		return err
	})
	return child, err
}

// gone tells whether an error says that an entry is no longer what it was when
// its name was read.
func gone(err error) bool {
	return err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP || err == unix.ESTALE
}

// enter opens d, whose parent has a claim for it, and gives that claim up.
// It returns false when there is nothing to read at d.
func (s *scanner) enter(d *scanDir) (bool, error) {
	if d.parent == nil {
		return true, nil
	}
	fd, err := s.openChild(d.parent, d.name)
	s.release(d.parent)
	switch {
	case err == nil:
		d.mu.Lock()
		defer d.mu.Unlock()
		d.fd, d.claims = fd, 1
		s.held.Add(1)
		return true, nil
	case gone(err), err == unix.EXDEV:
		return false, nil
	default:
		return false, d.wrap(err)
	}
}

func (s *scanner) openChild(d *scanDir, name string) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.fd >= 0 {
		return openDir(d.fd, name)
	}
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.OpenByHandleAt(s.mountFD, *d.handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME|unix.O_CLOEXEC)
		return err
	})
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	return openDir(fd, name)
}

// claim keeps d within reach for n more subdirectories.
func (d *scanDir) claim(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.claims += n
}

// release gives up a claim on d, and closes it after the last.
func (s *scanner) release(d *scanDir) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.claims--; d.claims == 0 {
		s.closeLocked(d)
	}
}

// park closes d although subdirectories are still to be opened through it, if
// too many directories are open and its filesystem has handles.
func (s *scanner) park(d *scanDir) {
	if s.held.Load() <= openDirs {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd < 0 {
		return
	}
	handle, _, err := unix.NameToHandleAt(d.fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return
	}
	d.handle = &handle
	s.closeLocked(d)
}

func (s *scanner) closeLocked(d *scanDir) {
	if d.fd >= 0 {
		unix.Close(d.fd)
		d.fd = -1
		s.held.Add(-1)
	}
}

// wrap says where in the tree an error arose: the last names of d's path.
func (d *scanDir) wrap(err error) error {
	var names []string
	for at := d; at.parent != nil && len(names) < 8; at = at.parent {
		names = append([]string{at.name}, names...)
	}
	return fmt.Errorf("%q: %w", strings.Join(names, "/"), err)
}

// linkSet is the inodes of several links that have been counted.
type linkSet struct {
	shards [16]struct {
		mu   sync.Mutex // guards seen
		seen map[inodeID]struct{}
	}
}

type inodeID struct{ dev, ino uint64 }

func (l *linkSet) has(id inodeID) bool {
	shard := &l.shards[id.ino%uint64(len(l.shards))]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	_, ok := shard.seen[id]
	return ok
}

// add returns false when id was in the set already.
func (l *linkSet) add(id inodeID) bool {
	shard := &l.shards[id.ino%uint64(len(l.shards))]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if _, ok := shard.seen[id]; ok {
		return false
	}
	if shard.seen == nil {
		shard.seen = make(map[inodeID]struct{})
	}
	shard.seen[id] = struct{}{}
	return true
}

var errNoProgress = errors.New("directory entries are malformed")
