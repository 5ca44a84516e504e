// Package copytree copies a tree within one filesystem: by reflink where it can,
// else by copy_file_range(2), several files at a time.
//
// # What is kept
//
// Names (bytes, not text), owners by number, modes with set-id and sticky bits, access and
// modification times to the nanosecond, of directories too, extended attributes with ACLs and
// capabilities, hard links within the tree, holes, and what is preallocated (quota.PreallocXattr):
// the copy is charged what the tree is. Symlinks are copied as such; FIFOs, sockets and devices are made
// anew. What something else is mounted on is left out. Access times of the source do not change, but for those of symlinks, which
// readlink(2) sets.
//
// # Hostile trees
//
// Every entry is reached by directory descriptor and name; no symlink is followed, and nothing but
// directories and regular files is opened. Directories that wait are known by file handles, so that the depth and
// the width of a tree cost memory and no descriptors, and no path is ever put together. The destination is
// the caller's alone until Copy returns.
//
// # Consistency
//
// Copy is of one moment if nothing in the source begins to change while it runs. A write(2) that had begun
// before may still be under way. A reflink shuts it out by itself, since it takes the inode's lock
// (remap_file_range). copy_file_range does not: there Copy waits for the lock first, and copies the
// file again when its ctime says that a write has begun meanwhile.
//
// Stage copies files before the caller stops the changes; Copy then moves those to their places that are as they were,
// which is quicker than a reflink, and copies the rest. Stores into mappings are seen as far as they change the ctime:
// the first one to each page since it was written back does.
//
// Nothing is synced: that is the caller's.
package copytree
