// Package pool gives a pool its life: it makes, opens and mends pools, and
// creates, resizes, checks and deletes the volumes in them.
//
// # On disk
//
//	pool.json        format and id; written last by Init, so a pool is whole or none
//	lock             flock: one process has the pool
//	meta/            records (package meta)
//	volumes/<name>   a volume's tree
//	orphans/<name>   its files that have lost their last name while open
//	braked/          file handles of inodes that must not grow for now (package fs)
//	trash/           trees that are being freed, under names of no meaning
//	snapshots/       reserved
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
// A lifecycle call holds its volume's name (nameLocks), then briefly Pool.mu.
// Neither is held by anything that a FUSE request waits for, except that
// BeforeChange writes the dirty mark inside the record store.
package pool
