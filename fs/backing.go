package fs

import (
	"container/list"
	"errors"
	"math"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// describe returns what identifies the inode behind fd, and its attributes.
func describe(fd int) (handleKey, unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return handleKey{}, st, err
	}
	key, err := handleAt(fd, new(byte), unix.AT_EMPTY_PATH)
	return key, st, err
}

// describeAt is describe for a name in a directory. Nothing may change what the
// name leads to meanwhile; the kernel's lock of the directory, which it holds
// during LOOKUP, READDIRPLUS and whatever changes names, sees to that.
func describeAt(dirfd int, name string) (handleKey, unix.Stat_t, error) {
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return handleKey{}, unix.Stat_t{}, err
	}
	return describePath(dirfd, path)
}

// describePath is describeAt for a name that ends with a zero.
func describePath(dirfd int, path *byte) (handleKey, unix.Stat_t, error) {
	var st unix.Stat_t
	key, err := handleAt(dirfd, path, 0)
	if err != nil {
		return key, st, err
	}
	// unix.Fstatat would copy the name.
	_, _, errno := unix.Syscall6(unix.SYS_NEWFSTATAT, uintptr(dirfd), uintptr(unsafe.Pointer(path)),
		uintptr(unsafe.Pointer(&st)), unix.AT_SYMLINK_NOFOLLOW, 0, 0)
	if errno != 0 {
		return key, st, errno
	}
	return key, st, nil
}

// handleAt is name_to_handle_at(2); path ends with a zero. EOVERFLOW for a handle
// that handleKey does not hold.
func handleAt(dirfd int, path *byte, flags int) (handleKey, error) {
	var mount int32
	h := struct { // struct file_handle
		bytes uint32
		typ   int32
		data  [maxHandle]byte
	}{bytes: maxHandle}
	_, _, errno := unix.Syscall6(unix.SYS_NAME_TO_HANDLE_AT, uintptr(dirfd), uintptr(unsafe.Pointer(path)),
		uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&mount)), uintptr(flags), 0)
	if errno != 0 {
		return handleKey{}, errno
	}
	if h.typ < 0 || h.typ > math.MaxUint8 {
		return handleKey{}, unix.EOVERFLOW
	}
	return handleKey{typ: uint8(h.typ), len: uint8(h.bytes), data: h.data}, nil
}

// openNode opens a node's inode. flags other than O_PATH are only given for
// regular files and directories, so nothing can block or have side effects.
// ESTALE when the inode is gone or its volume was removed.
func (f *FS) openNode(n *node, flags int) (int, error) {
	if n.vol.removed.Load() {
		return -1, unix.ESTALE
	}
	for {
		fd, err := unix.OpenByHandleAt(int(f.pool.Fd()), n.key.fileHandle(), flags|unix.O_CLOEXEC|unix.O_NOFOLLOW)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// openChild opens the inode under a name as O_PATH.
func openChild(dirfd int, name string) (int, error) {
	return openat(dirfd, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
}

func openat(dirfd int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dirfd, name, flags|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// procPath is a path that leads to the inode of fd itself, for the system
// calls that take no descriptor (setxattr, chmod of an O_PATH descriptor).
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// checkName refuses what must never reach an *at call as one name.
func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return unix.EINVAL
	case len(name) > unix.NAME_MAX:
		return unix.ENAMETOOLONG
	}
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return unix.EINVAL
		}
	}
	return nil
}

// dirCache keeps descriptors of directories that were used lately.
type dirCache struct {
	mu   sync.Mutex
	max  int
	lru  list.List // of *dirFD, most recent first
	open map[*node]*list.Element
}

// dirFD is a cached descriptor; it is closed when nobody uses it any more and
// it has left the cache.
type dirFD struct {
	node   *node
	fd     int // for reading
	refs   int // guarded by dirCache.mu; the cache itself holds one
	stream dirStream
}

func (c *dirCache) init(limit int) {
	c.max = limit
	c.open = make(map[*node]*list.Element)
}

// dir returns a directory's descriptor; release it after use. ENOTDIR when the
// node is something else.
func (f *FS) dir(n *node) (*dirFD, error) {
	if !n.isDir() {
		return nil, unix.ENOTDIR
	}
	if n.vol.removed.Load() {
		return nil, unix.ESTALE
	}
	c := &f.dirs
	c.mu.Lock()
	if e := c.open[n]; e != nil {
		c.lru.MoveToFront(e)
		d := e.Value.(*dirFD)
		d.refs++
		c.mu.Unlock()
		return d, nil
	}
	c.mu.Unlock()
	fd, err := f.openNode(n, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.open[n]; e != nil { // another was quicker
		syscall.Close(fd)
		d := e.Value.(*dirFD)
		d.refs++
		return d, nil
	}
	d := &dirFD{node: n, fd: fd, refs: 2}
	c.open[n] = c.lru.PushFront(d)
	for c.lru.Len() > c.max {
		c.evictLocked(c.lru.Back())
	}
	return d, nil
}

func (f *FS) putDir(d *dirFD) {
	f.dirs.mu.Lock()
	defer f.dirs.mu.Unlock()
	f.dirs.unrefLocked(d)
}

func (c *dirCache) unrefLocked(d *dirFD) {
	if d.refs--; d.refs == 0 {
		syscall.Close(d.fd)
	}
}

func (c *dirCache) evictLocked(e *list.Element) {
	d := c.lru.Remove(e).(*dirFD)
	delete(c.open, d.node)
	c.unrefLocked(d)
}

// drop forgets one directory: it was removed.
func (c *dirCache) drop(n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.open[n]; e != nil {
		c.evictLocked(e)
	}
}

// purge forgets a volume's directories, all when v is nil.
func (c *dirCache) purge(v *volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for e := c.lru.Front(); e != nil; {
		next := e.Next()
		if v == nil || e.Value.(*dirFD).node.vol == v {
			c.evictLocked(e)
		}
		e = next
	}
}

// withFD calls fn with some descriptor of the node: the cached one of a
// directory, else a fresh O_PATH one.
func (f *FS) withFD(n *node, fn func(fd int) error) error {
	if n.isDir() {
		d, err := f.dir(n)
		if err != nil {
			return err
		}
		defer f.putDir(d)
		return fn(d.fd)
	}
	fd, err := f.openNode(n, unix.O_PATH)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return fn(fd)
}

// withFile calls fn with a descriptor of a regular file opened with flags.
func (f *FS) withFile(n *node, flags int, fn func(fd int) error) error {
	if !n.isRegular() {
		if n.isDir() {
			return unix.EISDIR
		}
		return unix.EINVAL
	}
	fd, err := f.openNode(n, flags)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return fn(fd)
}

func isGone(err error) bool { return errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) }
