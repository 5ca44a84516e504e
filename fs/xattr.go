package fs

import (
	"bytes"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// ownPrefix marks the attributes that are the daemon's, unseen from within.
	ownPrefix = "trusted.croft."

	aclPrefix = "system.posix_acl_"
	accessACL = aclPrefix + "access"
)

func (f *FS) xattrNode(id uint64) (*node, error) {
	if id == rootIno {
		return nil, unix.ENODATA
	}
	n := f.nodes.get(id)
	if n == nil {
		return nil, unix.ESTALE
	}
	return n, nil
}

// GetXAttr answers getxattr(2); the ACLs come this way too.
func (f *FS) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, attr string, dest []byte) (uint32, fuse.Status) {
	n, err := f.xattrNode(in.NodeId)
	if err != nil {
		return 0, toStatus(err)
	}
	if strings.HasPrefix(attr, ownPrefix) {
		return 0, fuse.ENOATTR
	}
	if attr == capsLabel && n.has(refused) {
		return noCaps(dest)
	}
	if attr == capsLabel && n.has(nocaps) {
		return 0, fuse.ENOATTR
	}
	var size int
	err = f.withFD(n, func(fd int) (err error) {
		size, err = unix.Getxattr(procPath(fd), attr, dest)
		return err
	})
	if err == unix.ENODATA && attr == selinuxLabel {
		err = unix.EOPNOTSUPP
	}
	if isGone(err) && n.isDir() && n.has(nameless) {
		err = unix.ENODATA // whoever has it open may be asked for its ACL
	}
	if err != nil {
		return 0, toStatus(err)
	}
	return uint32(size), fuse.OK
}

// capsLabel is asked for before the first write after attributes came, of each inode
// (file_remove_privs_flags in fs/inode.c; fuse_change_attributes_common).
const capsLabel = "security.capability"

// noCaps answers with capabilities that give nothing: struct vfs_cap_data of
// include/uapi/linux/capability.h, VFS_CAP_REVISION_2.
func noCaps(dest []byte) (uint32, fuse.Status) {
	caps := [20]byte{3: 2}
	if len(dest) > 0 && len(dest) < len(caps) {
		return uint32(len(caps)), fuse.ERANGE
	}
	copy(dest, caps[:])
	return uint32(len(caps)), fuse.OK
}

// selinuxLabel is asked of every file by ls -l, until it is told that there is no
// such thing here. Where SELinux is in force the kernel answers it by itself.
const selinuxLabel = "security.selinux"

// listXattr returns the attribute names of the inode behind fd, each ended by
// NUL, without the daemon's.
func listXattr(fd int) ([]byte, error) {
	path := procPath(fd)
	for {
		size, err := unix.Listxattr(path, nil)
		if err != nil || size == 0 {
			return nil, err
		}
		buf := make([]byte, size)
		if size, err = unix.Listxattr(path, buf); err == unix.ERANGE {
			continue // it grew in between
		} else if err != nil {
			return nil, err
		}
		names := make([]byte, 0, size)
		for name := range bytes.SplitAfterSeq(buf[:size], []byte{0}) {
			if !bytes.HasPrefix(name, []byte(ownPrefix)) {
				names = append(names, name...)
			}
		}
		return names, nil
	}
}

// ListXAttr answers listxattr(2).
func (f *FS) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	if in.NodeId == rootIno {
		return 0, fuse.OK
	}
	n, err := f.xattrNode(in.NodeId)
	if err != nil {
		return 0, toStatus(err)
	}
	var names []byte
	err = f.withFD(n, func(fd int) (err error) {
		names, err = listXattr(fd)
		return err
	})
	switch {
	case err != nil:
		return 0, toStatus(err)
	case len(names) > len(dest):
		return uint32(len(names)), fuse.ERANGE
	}
	copy(dest, names)
	return uint32(len(names)), fuse.OK
}

// xattrRoom refuses an attribute that would take the inode's attributes beyond
// one block: names, values and 16 bytes each, as ext4 holds them (fs/ext4/xattr.h).
// They are not in the charge, so they are bounded.
func (f *FS) xattrRoom(fd int, attr string, size int) error {
	names, err := listXattr(fd)
	if err != nil {
		return err
	}
	used := len(attr) + size + 16
	for name := range bytes.SplitSeq(names, []byte{0}) {
		if len(name) == 0 || string(name) == attr {
			continue
		}
		n, err := unix.Getxattr(procPath(fd), string(name), nil)
		if err == unix.ENODATA {
			continue
		} else if err != nil {
			return err
		}
		used += len(name) + n + 16
	}
	if uint64(used) > f.rule.Block {
		return unix.ENOSPC
	}
	return nil
}

// SetXAttr serves setxattr(2) and the setting of ACLs. ENOSPC when an inode's
// attributes would exceed one block.
func (f *FS) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	t := f.try(&in.InHeader)
	return f.changeXattr(in.NodeId, attr, func(fd int) error {
		if err := f.xattrRoom(fd, attr, len(data)); err != nil {
			return err
		}
		flags := int(in.Flags)
		switch {
		case flags&unix.XATTR_CREATE == 0:
		case t.again: // it was not there
			flags &^= unix.XATTR_CREATE
		case hasXattr(fd, attr):
			return unix.EEXIST
		}
		t.trying()
		if err := unix.Setxattr(procPath(fd), attr, data, flags); err != nil {
			return err
		}
		t.step("made")
		if in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID == 0 {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_ISGID == 0 {
			return err
		}
		return unix.Chmod(procPath(fd), st.Mode&^unix.S_ISGID&0o7777)
	})
}

func hasXattr(fd int, attr string) bool {
	_, err := unix.Getxattr(procPath(fd), attr, nil)
	return err == nil
}

// RemoveXAttr serves removexattr(2).
func (f *FS) RemoveXAttr(_ <-chan struct{}, in *fuse.InHeader, attr string) fuse.Status {
	n := f.nodes.get(in.NodeId)
	braked := n != nil && attr == capsLabel && n.has(refused)
	if braked && !f.gating.callers.Resizes(int(in.Pid)) {
		return fuse.Status(unix.ENOSPC)
	}
	t := f.try(in)
	return f.changeXattr(in.NodeId, attr, func(fd int) error {
		if t.again || hasXattr(fd, attr) { // else whoever asks again is to be told so again
			t.trying()
		}
		err := unix.Removexattr(procPath(fd), attr)
		t.step("made")
		if err == unix.ENODATA && (braked || t.again) {
			return nil
		}
		if err == unix.ENODATA && strings.HasPrefix(attr, aclPrefix) {
			return nil // removing an ACL that is not there succeeds (fs/posix_acl.c)
		}
		return err
	})
}

// changeXattr changes an attribute; a block of attributes counts in st_blocks.
func (f *FS) changeXattr(id uint64, attr string, do func(fd int) error) fuse.Status {
	if id == rootIno {
		return fuse.EPERM
	}
	n, err := f.xattrNode(id)
	if err != nil {
		return toStatus(err)
	}
	if strings.HasPrefix(attr, ownPrefix) {
		return fuse.EPERM
	}
	if attr == capsLabel {
		n.set(nocaps, false)
	}
	if err := n.vol.begin(); err != nil {
		return toStatus(err)
	}
	defer n.vol.end()
	return toStatus(f.withFD(n, func(fd int) error {
		n.lock()
		defer n.unlock()
		defer f.liftLocked(n)()
		return f.changeHiddenLocked(n, fd, func() error {
			if attr == accessACL { // its entry of the group is part of the mode
				if err := n.vol.view().claim(fd); err != nil {
					return err
				}
			}
			return do(fd)
		})
	}))
}
