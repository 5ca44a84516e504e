// Package meta keeps a pool's records in Badger. It is the only importer of Badger.
//
// # Records
//
//	f            the store's format version, one byte
//	v/<name>     a volume: limit, state, when it was made
//	c/<name>     the checkpoint of a volume's use, and its dirty mark
//
// A record is one byte of format version, then JSON. A version that is newer
// than this program is refused, never guessed at.
//
// # Durability
//
// Badger runs with SyncWrites off, which survives the process but not a power
// cut. What promises something to a caller (a volume exists, is gone, is dirty)
// is synced before the call returns. A checkpoint may be written
// without: its loss means a recount.
//
// Badger's own Sync is not enough for it (v4.9.6). It covers the log of the memtable that
// is in use, and the value log. A record whose memtable was replaced between
// the write and the Sync is in a log that nobody syncs; and the directory is
// not synced when a log is made. So the store syncs older logs and the
// directory itself. DB.Close syncs what it leaves: tables, manifest, directory.
//
// # A full disk
//
// Badger maps sparse files: a store into one on a full disk is a SIGBUS, of which the
// process dies. So:
//
//   - The log that takes the writes is allocated before the first of them.
//     Records can be changed and deleted with no room at all.
//   - Opening, closing and the change to the next log write tables. A ballast
//     file keeps space for them, and is given up only when one of them is
//     due and there is no room beside it; it comes back when there is.
//   - If others were quicker to take what the ballast gave, the call returns ErrNoRoom.
//
// Room tells the pool when to refuse new volumes.
package meta
