// Package state is a daemon's memory that outlives it: what the kernel holds it to.
// The kernel knows nodes by ids, open files by handles and backing files by ids of
// its own, and none of these can be asked for again. So they are in a region of shared
// memory (memfd_create(2)), which a keeper has a descriptor of; see fs/keeper.
//
// The region is written as things happen, by plain stores, and is right at whatever
// instant its writer is killed. Where two stores would have to be one, their order
// errs to the side on which nothing is lost and no limit is passed: a
// count of lookups is too high rather than too low, a volume's use as well, and
// what is too high is found by a recount.
//
// # Layout
//
// Fixed records in sections of fixed places, each with room for far more than
// will be needed: a page that was never written to takes no memory. A section does not
// move, so that pointers into it stay good.
//
//	header    what the region is of, the INIT request
//	volumes   what each volume uses
//	events    system calls that the gate holds
//	handles   open files
//	requests  one for each serving thread: the request that it works on, as the kernel
//	          has written it there, and how far it has come
//	nodes     inodes that the kernel knows, 64 bytes each
//
// A record is written before what names it: it is there when its ID is not 0.
package state
