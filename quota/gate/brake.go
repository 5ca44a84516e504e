package gate

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Brake makes an inode immutable (FS_IMMUTABLE_FL), or no longer so. ext4 refuses
// by it what no event is raised for, on files that are open as well: splice(2)
// with EPERM, a store into a hole of a mapping with SIGBUS (ext4_page_mkwrite). xfs and btrfs
// look at the flag at open only. fd is open on the inode, and not O_PATH.
func Brake(fd int, on bool) error {
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return fmt.Errorf("read inode flags: %w", err)
	}
	const immutable = 0x10 // FS_IMMUTABLE_FL of include/uapi/linux/fs.h
	was := flags
	if flags &^= immutable; on {
		flags |= immutable
	}
	if flags == was {
		return nil
	}
	if err := unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags)); err != nil {
		return fmt.Errorf("set inode flags: %w", err)
	}
	return nil
}
