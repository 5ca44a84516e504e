package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// StatFs answers for the volume that the node is in: its limit, use and
// inodes, and never more available than the disk has.
func (f *FS) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	var disk unix.Statfs_t
	if err := unix.Fstatfs(int(f.pool.Fd()), &disk); err != nil {
		return toStatus(err)
	}
	out.NameLen = unix.NAME_MAX
	if in.NodeId == rootIno {
		out.Bsize, out.Frsize = uint32(disk.Bsize), uint32(disk.Frsize)
		out.Blocks, out.Bfree, out.Bavail = disk.Blocks, disk.Bfree, disk.Bavail
		out.Files, out.Ffree = disk.Files, disk.Ffree
		return fuse.OK
	}
	n := f.nodes.get(in.NodeId)
	if n == nil || n.vol.removed.Load() {
		return fuse.Status(unix.ESTALE)
	}
	f.refresh(n.vol)
	f.freeGraves(n.vol) // what was replaced counts as free at once
	limit, free := n.vol.ledger.Limit(), n.vol.ledger.Free()
	block := f.rule.Block
	out.Bsize, out.Frsize = uint32(block), uint32(block)
	out.Blocks, out.Bfree = limit.Bytes/block, free.Bytes/block
	out.Bavail = min(out.Bfree, disk.Bavail*uint64(disk.Bsize)/block)
	out.Files, out.Ffree = limit.Inodes, free.Inodes
	if disk.Files > 0 && disk.Ffree < out.Ffree { // btrfs has no inode limit and says 0
		// There is one figure for what is free: the total gives way, so that
		// what is used stays right.
		out.Files -= out.Ffree - disk.Ffree
		out.Ffree = disk.Ffree
	}
	return fuse.OK
}
