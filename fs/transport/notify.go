package transport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Notification codes: enum fuse_notify_code in include/uapi/linux/fuse.h.
const (
	notifyInvalInode = 2
	notifyInvalEntry = 3
	notifyDelete     = 6
	notifyResend     = 7
)

// withFD runs fn with the descriptor, which stays open meanwhile. Once Serve has
// ended it returns os.ErrClosed.
func (c *Conn) withFD(fn func(fd int) error) error {
	c.fdMu.RLock()
	defer c.fdMu.RUnlock()
	if c.fd < 0 {
		return os.ErrClosed
	}
	return fn(c.fd)
}

// Notify writes a notification to an open /dev/fuse. It is no error when the kernel holds nothing to drop.
func Notify(dev int, message []byte) error {
	if _, err := unix.Write(dev, message); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// notify sends the code and the fixed fields.
func (c *Conn) notify(code int32, fixed ...uint64) error {
	return c.withFD(func(fd int) error { return Notify(fd, notification(code, fixed, "")) })
}

// notifyName sends the code, the fixed fields, and a name, for which the kernel takes the lock of its directory.
func (c *Conn) notifyName(code int32, name string, fixed ...uint64) error {
	return c.withFD(func(fd int) error { return c.opts.Notify(fd, notification(code, fixed, name)) })
}

// notification makes a message of the code, the fixed fields, and a name with its NUL if there is one.
func notification(code int32, fixed []uint64, name string) []byte {
	msg := make([]byte, outHeaderSize, outHeaderSize+8*len(fixed)+len(name)+1)
	for _, v := range fixed {
		msg = binary.NativeEndian.AppendUint64(msg, v)
	}
	if name != "" {
		msg = append(msg, name...)
		msg = append(msg, 0)
	}
	putOutHeader(msg, len(msg), code, 0)
	return msg
}

// nameLength is the field pair { u32 namelen; u32 zero } as one word.
func nameLength(name string) uint64 {
	var b [8]byte
	binary.NativeEndian.PutUint32(b[:], uint32(len(name)))
	return binary.NativeEndian.Uint64(b[:])
}

func notifyError(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("notify %s: %w", what, err)
}

// NotifyInvalEntry drops what the kernel caches under a name, whether it is an entry or the
// knowledge that there is none. It is not an error if nothing is cached.
//
// The kernel takes the lock of the parent directory. So this must not be called by
// a handler of a request that works in that directory, nor while holding
// anything such a handler waits for. It fails with os.ErrClosed once Serve has ended.
func (c *Conn) NotifyInvalEntry(parent uint64, name string) error {
	// struct fuse_notify_inval_entry_out { u64 parent; u32 namelen; u32 flags; }
	return notifyError("inval entry", c.notifyName(notifyInvalEntry, name, parent, nameLength(name)))
}

// NotifyInvalInode drops the attributes that the kernel caches for a node, and its cached data
// from off on for length bytes; a length of 0 or less means to the end, a
// negative off no data at all. Dirty pages in the range are written back first, through WRITE
// requests, so a handler that holds what Write waits for must not call this.
// known tells whether the kernel knows the node; it is no error if it does not. It fails with
// os.ErrClosed once Serve has ended.
func (c *Conn) NotifyInvalInode(node uint64, off, length int64) (known bool, err error) {
	// struct fuse_notify_inval_inode_out { u64 ino; s64 off; s64 len; }
	message := notification(notifyInvalInode, []uint64{node, uint64(off), uint64(length)}, "")
	err = c.withFD(func(fd int) error {
		_, err := unix.Write(fd, message)
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, notifyError("inval inode", err)
}

// NotifyDelete tells the kernel that the entry is gone, so that those who watch it
// by inotify learn of it; if the entry no longer names child, it is only
// dropped. It fails with ENOTEMPTY for a directory with cached entries, EBUSY
// for a mount point. For locks and other errors see NotifyInvalEntry.
func (c *Conn) NotifyDelete(parent, child uint64, name string) error {
	// struct fuse_notify_delete_out { u64 parent; u64 child; u32 namelen; u32 padding; }
	return notifyError("delete", c.notifyName(notifyDelete, name, parent, child, nameLength(name)))
}

// NotifyResend makes the kernel send again every request that was read but not
// answered, with the top bit of its unique id set. It is for a process that took
// the connection over; here, where handlers may be running, it repeats
// their requests. It fails with EINVAL on a kernel before 6.9.
func (c *Conn) NotifyResend() error {
	return notifyError("resend", c.notify(notifyResend))
}

// Requests of FUSE_DEV_IOC_MAGIC, 229: _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, __u32).
const (
	iocBackingOpen  = 1<<30 | 16<<16 | 229<<8 | 1
	iocBackingClose = 1<<30 | 4<<16 | 229<<8 | 2
)

// backingMap is struct fuse_backing_map.
type backingMap struct {
	fd      int32
	flags   uint32
	padding uint64
}

// OpenBacking registers an open file for passthrough and returns its id, which is
// positive and goes into OpenOut.BackingID. The kernel keeps its own reference to the file, so fd
// may be closed. The id lasts until CloseBacking or the end of the connection.
// It fails with EPERM without passthrough or CAP_SYS_ADMIN, with EOPNOTSUPP for
// a file that is not regular, with ELOOP for one on too deep a stack of filesystems.
//
// What the kernel does for whoever writes, it does with the credentials that this
// thread has now (fuse_backing_open): without CAP_FSETID, for the write itself is
// to clear the set-id bits, and nobody else is asked to.
func (c *Conn) OpenBacking(fd int) (id int32, err error) {
	m := backingMap{fd: int32(fd)}
	err = c.withFD(func(dev int) error {
		return withoutFSETID(func() error {
			r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), iocBackingOpen, uintptr(unsafe.Pointer(&m)))
			runtime.KeepAlive(&m)
			if errno != 0 {
				return errno
			}
			id = int32(r)
			return nil
		})
	})
	if err != nil {
		return 0, fmt.Errorf("open backing: %w", err)
	}
	return id, nil
}

// CloseBacking gives up a backing id. Files that were opened with it keep working. It fails with
// ENOENT for an id that is not open, with os.ErrClosed once Serve has ended.
func (c *Conn) CloseBacking(id int32) error {
	v := uint32(id)
	err := c.withFD(func(dev int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), iocBackingClose, uintptr(unsafe.Pointer(&v)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("close backing %d: %w", id, err)
	}
	return nil
}

// withoutFSETID calls fn on a thread that lacks CAP_FSETID meanwhile.
func withoutFSETID(fn func() error) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets, without [2]unix.CapUserData // capabilities 0 to 31, and the rest
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	without = sets
	if without[0].Effective &^= 1 << unix.CAP_FSETID; without == sets {
		return fn()
	}
	if err := unix.Capset(&header, &without[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	defer func() {
		if serr := unix.Capset(&header, &sets[0]); serr != nil {
			err = errors.Join(err, fmt.Errorf("capset: %w", serr))
		}
	}()
	return fn()
}
