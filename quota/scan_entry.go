package quota

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// scanWorker reads one directory at a time.
type scanWorker struct {
	*scanner
	buf   []byte
	subs  []*scanDir
	stat  unix.Statx_t
	found ScanResult
}

// visit counts d and what is in it, and puts its subdirectories on the stack.
func (w *scanWorker) visit(d *scanDir) {
	ok, err := w.enter(d)
	if ok {
		if d.parent != nil {
			w.found.Directories++
			w.found.Inodes++
			w.found.Bytes += w.rule.block()
		}
		err = w.readDir(d)
		w.park(d)
		w.release(d)
	}
	if err != nil {
		w.fail(err)
	}
}

func (w *scanWorker) readDir(d *scanDir) error {
	for !w.stopped.Load() {
		n, err := unix.Getdents(d.fd, w.buf)
		switch {
		case err == unix.EINTR:
			continue
		case n == 0 && err == nil, gone(err):
			return nil
		case err != nil:
			return d.wrap(err)
		}
		if err := w.readEntries(d, w.buf[:n]); err != nil {
			return err
		}
		if len(w.subs) > 0 {
			d.claim(len(w.subs))
			w.push(w.subs...)
			w.subs = w.subs[:0]
		}
	}
	return nil
}

// direntName is the offset of d_name in struct linux_dirent64 (include/linux/dirent.h).
const direntName = 19

// readEntries counts the entries of d that buf holds. Names are used where
// they are: the kernel ends each with a NUL.
func (w *scanWorker) readEntries(d *scanDir, buf []byte) error {
	for len(buf) > 0 {
		if len(buf) <= direntName {
			return d.wrap(errNoProgress)
		}
		size := int(binary.NativeEndian.Uint16(buf[16:]))
		if size <= direntName || size > len(buf) {
			return d.wrap(errNoProgress)
		}
		entry := buf[:size]
		buf = buf[size:]
		name, _, ok := bytes.Cut(entry[direntName:], []byte{0})
		switch {
		case !ok || len(name) == 0:
			return d.wrap(errNoProgress)
		case string(name) == ".", string(name) == "..":
			continue
		case entry[18] == unix.DT_DIR:
			w.later(d, name)
			continue
		}
		if err := w.countEntry(d, entry[direntName:], name); err != nil && !gone(err) {
			return d.wrap(fmt.Errorf("%q: %w", name, err))
		}
	}
	return nil
}

// later has the subdirectory name of d read when this buffer is done with.
func (w *scanWorker) later(d *scanDir, name []byte) {
	w.subs = append(w.subs, &scanDir{parent: d, name: string(name), fd: -1})
}

// countEntry counts what is not known to be a directory. terminated is the name with its NUL.
func (w *scanWorker) countEntry(d *scanDir, terminated, name []byte) error {
	i, skip, err := w.statEntry(d.fd, &terminated[0], unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || skip {
		return err
	}
	if i.mode&unix.S_IFMT == unix.S_IFDIR {
		w.later(d, name)
		return nil
	}
	id := w.id()
	if i.nlink > 1 && w.links.has(id) {
		w.found.Links++
		return nil
	}
	var counted func(charge uint64)
	if w.watch != nil && i.mode&unix.S_IFMT == unix.S_IFREG {
		counted = w.watch(d.fd, string(name))
		if w.onlyWatch {
			return nil
		}
		// It may have changed until it was watched.
		if i, skip, err = w.statEntry(d.fd, &terminated[0], unix.AT_SYMLINK_NOFOLLOW); err != nil || skip {
			return err
		}
		id = w.id()
	}
	charge, ok := w.rule.plain(i)
	if !ok {
		if i, charge, err = w.chargeFile(d.fd, string(name)); err != nil {
			return err
		}
		if id = w.id(); i.nlink == 0 {
			return unix.ENOENT
		}
	}
	if i.nlink > 1 && !w.links.add(id) {
		w.found.Links++
		return nil
	}
	if counted != nil {
		counted(charge)
	}
	w.found.Inodes++
	w.found.Bytes += charge
	if i.mode&unix.S_IFMT == unix.S_IFREG {
		w.found.Files++
	} else {
		w.found.Others++
	}
	return nil
}

// chargeFile charges a file whose mapping has to be looked at. What is opened to read
// is the inode that was found to be a regular file, whatever has the name by then.
func (w *scanWorker) chargeFile(dirFD int, name string) (i inode, charge uint64, err error) {
	var path int
	err = retry(func() (err error) {
		path, err = unix.Openat(dirFD, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return i, 0, err
	}
	defer unix.Close(path)
	i, skip, err := w.statEntry(path, &emptyName[0], unix.AT_EMPTY_PATH)
	if err != nil {
		return i, 0, err
	}
	if skip || i.mode&unix.S_IFMT == unix.S_IFDIR {
		return i, 0, unix.ENOENT // another thing than the name was for
	}
	if charge, ok := w.rule.plain(i); ok {
		return i, charge, nil
	}
	var fd int
	err = retry(func() (err error) {
		// It waits for who has a lease for a moment: package fs does.
		fd, err = unix.Open(procPath(path), unix.O_RDONLY|unix.O_NOATIME|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return i, 0, fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	prealloc, err := ReadPrealloc(fd)
	if err != nil {
		return i, 0, err
	}
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return i, 0, err
	}
	charge, err = w.rule.mappedCharge(&st, fd, prealloc)
	return inodeOf(&st), charge, err
}

var emptyName = [1]byte{}

const statxMask = unix.STATX_TYPE | unix.STATX_MODE | unix.STATX_NLINK | unix.STATX_INO | unix.STATX_SIZE | unix.STATX_BLOCKS

// statEntry reads the inode that name, ended by a NUL, is in dirFD, into w.stat.
// skip is true when it is something mounted there.
func (w *scanWorker) statEntry(dirFD int, name *byte, flags int) (i inode, skip bool, err error) {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dirFD), uintptr(unsafe.Pointer(name)),
			uintptr(flags|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC), statxMask, uintptr(unsafe.Pointer(&w.stat)), 0)
		switch errno {
		case 0:
			return inode{
				mode:   uint32(w.stat.Mode),
				nlink:  uint64(w.stat.Nlink),
				size:   w.stat.Size,
				blocks: w.stat.Blocks * 512,
			}, w.stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
		case unix.EINTR:
		default:
			return i, false, errno
		}
	}
}

// id identifies the inode that statEntry has read last.
func (w *scanWorker) id() inodeID {
	return inodeID{dev: unix.Mkdev(w.stat.Dev_major, w.stat.Dev_minor), ino: w.stat.Ino}
}
