// Package pool gives a pool its life: it makes, opens and mends pools, and
// creates, copies, resizes, checks and deletes the volumes in them, and their snapshots.
//
// # On disk
//
//	pool.json        format and id; written last by Init, so a pool is whole or none
//	lock             flock: one process has the pool
//	volumes/         flock, the claim: that process has it, or a keeper that waits for the next
//	meta/            records (package meta)
//	volumes/<name>   a volume's tree
//	orphans/<name>   its files that have lost their last name while open
//	braked/          file handles of inodes that must not grow for now (package fs)
//	trash/           trees that are being freed, under names of no meaning
//	snapshots/<name> a snapshot: a tree, or the file of a block volume
//	blocks/<name>    the file of a block volume
//
// All of these directories are 0700: users of the host do not walk around the limits.
//
// # Steps, and what a crash leaves
//
// Create:
//
//  1. record "creating", durable     next Open takes back all that is there of it
//  2. directories made, synced       likewise
//  3. record "ready", durable        the volume exists
//  4. served; the caller hears yes
//
// Delete:
//
//  1. no longer served               nothing on disk has changed
//  2. record "deleting", durable     the volume is gone; next Open does the rest
//  3. renamed into trash, synced     likewise; space is freed in the background
//  4. record removed, durable        next Open goes on emptying the trash
//  5. the caller hears yes
//
// Snapshot, with copy.go; a clone is created as above, its tree copied likewise in step 2:
//
//  1. record "creating", durable     next Open takes back all that is there of it
//  2. files copied ahead into        likewise; next Open removes that
//     snapshots/.stage-…
//  3. the volume's changes held;     likewise
//     tree copied; changes go on
//  4. synced, and counted by a scan  likewise
//  5. record "ready", durable        the snapshot exists
//  6. the caller hears yes
//
// It is deleted in the steps of a volume. A snapshot that somebody copies from is not deleted.
//
// Publish, with publish.go:
//
//  1. record, durable                next mount forgets a record without a mount
//  2. device attached, if a block    likewise, and it is detached
//     volume's; target made
//  3. mounted                        next mount finds it alive, or replaces what has died with its daemon
//  4. the caller hears yes
//
// Unpublish:
//
//  1. unmounted                      next mount forgets a record without a mount
//  2. target removed                 likewise
//  3. device detached                likewise
//  4. record removed, durable        it is published no more
//  5. the caller hears yes
//
// A block volume's file is allocated in full before its record is ready, and before its record is larger; a file that
// is longer than its record says is cut at Open. Its loop device is recorded nowhere: the kernel is asked which has
// the file, so that one which an earlier daemon has left is found.
//
// Wipe: a name in trash/ that begins with "wipe-" stands for a tree whose files are overwritten before they are unlinked.
//
// Resize: what is lowered is lowered in the ledger first, then recorded, then
// what is raised is raised: the disk never holds more than the record allows.
//
// Use: before a volume's first change its dirty mark is durable. When it has not
// changed for Options.IdleAfter, the filesystem is synced and, if it still has not
// changed, its use is recorded and the mark taken away. A volume that Open finds
// dirty is recounted in the background: what was open and nameless is freed, then
// the tree is scanned. It is served meanwhile; its changes wait. If it was in use
// in this boot, the scan looks for files that the kernel still writes for who had
// them open (fs.Left): these are kept and held, and the volume stays dirty until
// nobody has them open.
//
// # Locks
//
// A lifecycle call holds its volume's or snapshot's name (nameLocks), then briefly Pool.mu. What it copies from it does not
// lock: fs.Quiesce keeps a volume from going, and snap.users a snapshot.
// Neither is held by anything that a FUSE request waits for, except that
// BeforeChange writes the dirty mark inside the record store.
package pool
