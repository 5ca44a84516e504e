package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// asCaller runs fn under the caller's fsuid, fsgid and umask, so that what it
// makes belongs to the caller and set-gid directories, default ACLs and the
// umask act as on the backing filesystem (FUSE_DONT_MASK leaves the umask to
// us). It changes only the calling OS thread, which the transport has prepared
// for that: locked, its own fs_struct, SECBIT_NO_SETUID_FIXUP so that the
// thread keeps its capabilities, umask 0. Permission itself was checked by the
// kernel, with the caller's groups.
func asCaller(c *fuse.Caller, umask uint32, fn func() error) error {
	if umask != 0 {
		unix.Umask(int(umask))
		defer unix.Umask(0)
	}
	if c.Gid != 0 {
		if err := unix.Setfsgid(int(c.Gid)); err != nil {
			return err
		}
		defer func() { _ = unix.Setfsgid(0) }()
	}
	if c.Uid != 0 {
		if err := unix.Setfsuid(int(c.Uid)); err != nil {
			return err
		}
		defer func() { _ = unix.Setfsuid(0) }()
	}
	return fn()
}
