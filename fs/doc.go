// Package fs is Croft's FUSE filesystem: it serves the volumes of one pool from
// their plain directories and charges every change against the volume's ledger,
// before it happens or, what the kernel writes by itself into a volume with ample
// room, soon after.
//
// # Terms
//
// A node is what the kernel knows by a node id: one backing inode, found again
// by its file handle (name_to_handle_at(2)), never by a path. A handle is one
// open file or directory. Node 1 is a directory that exists only here: it lists
// the volumes. An orphan is a file that has lost its last name while it is open;
// it lives on under its node id in the volume's orphans directory. A grave is the
// descriptor that keeps a replaced file for those who are about to open it. A file
// is passed when the kernel does its I/O on the backing file by itself. A writing
// is an inode that is passed and open for writing: native while its system calls
// go on unasked, held while each waits for the daemon; a volume is gated while all
// of its writings are held. A permit is what a held call may still make an inode
// grow by. A brake has an inode refuse what grows it and raises no event.
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
// and default ACLs come out as the backing filesystem does them. A volume can be
// seen as a group's, whatever the disk says: see group.go.
//
// # Charging
//
// A changing operation runs between volume.begin and volume.end. It reserves
// the most that it can cost, does its work, and settles what it did cost. The
// charge of an inode (see package quota) is loaded when it is first needed and
// then kept under node.mu together with the size, so the common write needs no
// look at the extent map.
//
// What the kernel writes by itself (TierGate) is no operation. The sampler adds
// to the charge of a native inode what it may have grown by, often enough that
// the volume is gated before its room is used up. Each call on a held inode
// reserves its permit first, or is refused; the charge is exact then. See
// open_mode.go for who is passed, gate.go for volumes, writing.go for inodes, permit.go and begun.go for calls,
// sampler.go for the sampler's thread, and quota/gate for what holds a call.
//
// # Locks
//
// In this order: volume.changing (shared by changes, exclusive in Quiesce and
// RemoveVolume), file.mu (shared by operations, exclusive in Release), node.mu
// (at most one node's at a time), writers.mu, then the leaf locks nodeTable.mu,
// dirCache.mu, volume.dirtyMu, floatMu, graveMu, leftFiles.mu, gating.mu and sampler.mu.
// volume.emptying comes after node.mu; who holds it, and who samples or squeezes a
// volume, only tries further node.mu. FORGET only tries changing; opens that
// allocate nothing and RELEASE of what does not write take node.mu without it, and a
// last close of a nameless inode takes it first. node.mu is held across backing
// I/O on purpose: an inode's data and its charge change as one.
//
// The thread that answers held calls only tries changing and node.mu; what must
// wait for them is answered by a goroutine. The daemon's own calls raise events
// too, and are allowed before any lock is taken.
//
// # After a crash
//
// Space is reserved before the disk changes and credited after, or the volume had
// room for what was not charged yet, and a volume's dirty mark is durable before its
// first change; opening a file that is passed for writing is one. So a recount
// finds no more on disk than the limit allows, but for what files that were passed
// have been given since the daemon died: nothing holds them until the recount finds
// them (left.go). Where a keeper has the mount (fs/keeper) the next daemon goes on
// instead, and they stay held: see attempt.go, restore.go and fs/state. Orphans that nobody writes are reaped by package pool before the
// recount, and brakes let go before the volumes are served.
package fs
