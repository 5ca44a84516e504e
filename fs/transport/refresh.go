package transport

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Refresh has the kernel take new attributes of a node that it knows, by a SETATTR
// that sets nothing. From then on it does not take for granted any more that the
// inode has no security.capability (fuse_change_attributes_common clears S_NOSEC).
// Not by a GETATTR, whose answer is dropped when somebody has written meanwhile.
// It waits for the inode's lock, and must not be called from a handler. ESTALE when
// the kernel does not know the node.
//
// What it opens meanwhile waits for nothing when the process is killed: a directory has
// no FLUSH, and the node is O_PATH.
func (c *Conn) Refresh(nodeID uint64) error {
	root, err := unix.Open(c.mountpoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", c.mountpoint, err)
	}
	defer unix.Close(root)
	const ino64Gen = 0x81 // FILEID_INO64_GEN; fuse_encode_fh has the halves of the id and the generation
	handle := make([]byte, 0, 12)
	for _, word := range []uint32{uint32(nodeID >> 32), uint32(nodeID), 0} {
		handle = binary.NativeEndian.AppendUint32(handle, word)
	}
	fd, err := unix.OpenByHandleAt(root, unix.NewFileHandle(ino64Gen, handle), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open node %d: %w", nodeID, err)
	}
	defer unix.Close(fd)
	if err := unix.Fchownat(fd, "", -1, -1, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("set nothing of node %d: %w", nodeID, err)
	}
	return nil
}

// Device returns the mount's device number, as in Stat_t.Dev.
func (c *Conn) Device() (uint64, error) {
	mounts, err := Mounts(MountFilter{Mountpoint: c.mountpoint})
	if err != nil {
		return 0, err
	}
	if len(mounts) == 0 {
		return 0, fmt.Errorf("%s: %w", c.mountpoint, unix.ENOENT)
	}
	return mounts[0].Device, nil
}
