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
// is followed by Sync before the call returns. A checkpoint may be written
// without: its loss means a recount.
//
// # A full disk
//
// Badger maps sparse files; a store into one on a full disk is a SIGBUS. A
// ballast file keeps space beside them, and is given up when the disk runs full;
// Room tells the pool when to refuse new volumes.
package meta
