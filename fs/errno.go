package fs

import (
	"errors"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/croftfs/croft/quota"
)

// Errors of the management calls. Filesystem operations answer errnos.
var (
	// ErrBusy is returned when a volume has open files or directories.
	ErrBusy = errors.New("volume is in use")
	// ErrNoVolume is returned when no volume of that id is served.
	ErrNoVolume = errors.New("no such volume")
	// ErrExists is returned when a volume of that id is served already.
	ErrExists = errors.New("volume exists")
)

// toStatus is the one table that turns an error into the errno that the kernel
// gets. Limits are ENOSPC, an errno stays itself, anything else is EIO.
func toStatus(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	var errno syscall.Errno
	switch {
	case errors.Is(err, quota.ErrNoSpace):
		return fuse.Status(syscall.ENOSPC)
	case errors.As(err, &errno):
		return fuse.Status(errno)
	}
	return fuse.EIO
}
