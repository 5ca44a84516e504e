// Package fs is Croft's FUSE filesystem: it serves the volumes of one pool from
// their plain directories and charges every change against the volume's ledger
// before it happens.
//
// # Terms
//
// A node is what the kernel knows by a node id: one backing inode, found again
// by its file handle (name_to_handle_at(2)), never by a path. A handle is one
// open file or directory. Node 1 is a directory that exists only here: it lists
// the volumes. An orphan is a file that has lost its last name while it is open;
// it lives on under its node id in the volume's orphans directory. A grave is the
// descriptor that keeps a replaced file for those who are about to open it.
//
// # How an operation reaches the disk
//
// Always by (descriptor, name) with an *at call and O_NOFOLLOW. A directory's
// descriptor comes from a bounded cache or from open_by_handle_at(2); no path
// is ever made of names that a tenant chose, so depth is unlimited and a racing
// rename cannot lead outside. Only regular files and directories are ever
// opened for reading or writing; FIFOs, sockets and devices get O_PATH.
//
// Permission is the kernel's business (default_permissions), with the caller's
// real groups and capabilities. What the daemon adds is ownership: an inode is
// made under the caller's fsuid, fsgid and umask, so that set-gid directories
// and default ACLs come out as the backing filesystem does them.
//
// # Charging
//
// A changing operation runs between volume.begin and volume.end. It reserves
// the most that it can cost, does its work, and settles what it did cost. The
// charge of an inode (see package quota) is loaded when it is first needed and
// then kept under node.mu together with the size, so the common write needs no
// look at the extent map.
//
// # Locks
//
// In this order: volume.gate (shared by changes, exclusive in Quiesce and
// RemoveVolume), file.mu (shared by operations, exclusive in Release), node.mu
// (at most one node's at a time), then the leaf locks nodeTable.mu,
// dirCache.mu, volume.dirtyMu, floatMu and graveMu. volume.emptying comes after
// node.mu; who holds it only tries further node.mu. FORGET only tries the gate,
// opens and RELEASE take node.mu without it, and a last close of a nameless inode
// takes the gate first. node.mu is held across backing I/O on
// purpose: an inode's data and its charge change as one.
//
// # After a crash
//
// Space is reserved before the disk changes and credited after, and a volume's
// dirty mark is durable before its first change, so a recount never finds more
// on disk than the limit allows. Orphans are reaped by package pool before the
// recount.
package fs
