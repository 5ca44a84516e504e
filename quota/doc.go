// Package quota knows what a volume may use, what it uses, and how the one is
// found out from the other. It knows neither FUSE nor where records are kept.
//
// # Terms
//
//   - limit: what a volume may use, in bytes and inodes (Usage).
//   - charge: what one inode counts against its volume's limit, in bytes. It
//     counts one inode besides.
//   - reserve: to take the worst that an operation can cost, before it.
//   - settle: to give that back after it, and count what it did cost.
//   - claimed: what is used and what is reserved. The rest of the limit is room.
//   - ledger: a volume's limit, use and reservations (Ledger).
//   - block: the unit of charge, max(4096, f_bsize of the backing filesystem) bytes (Rule).
//   - mapped: a block of a file for which FIEMAP shows an extent, in any part of
//     it: written, unwritten, or still waiting for its place on the disk.
//   - preallocated: what somebody asked for with fallocate(2), beyond the end of
//     the file. PreallocXattr on the backing inode records where it ends.
//
// # Charge
//
// With S the size rounded up to a block, B what st_blocks gives in bytes, and P
// the end of what is preallocated:
//
//	directory                            one block
//	symlink, FIFO, socket, device        min(B, S)
//	regular, size = 0 and B = 0          0
//	regular, size <= 4 blocks and B = S  S
//	any other regular file               its mapped blocks in [0, max(S, P))
//
// To that comes LinkCharge for each link of a non-directory beyond its first.
// The data of an inode is charged once, however many links it has, until its last
// link and its last open file are gone.
//
// st_blocks is not the charge, because it moves by itself: xfs allocates ahead
// of a writer and takes it back later, ext4 adds blocks of extents when it writes
// back, and while it does so st_blocks is too low for a moment, even 0
// (ext4_da_update_reserve_space). The size is not either: a sparse file would be
// charged for its holes. What is mapped inside the file changes only when
// somebody changes the file. The two rules before the last give what the last would, without its ioctl, but where
// a block that is not data hides a hole in a small file. FIEMAP is
// called without FIEMAP_FLAG_SYNC: nothing is written back to learn a charge.
//
// # Ledger
//
// Room is one number, and every step changes it by one atomic operation:
//
//   - Reserve compares and takes. Two that would fit alone and not together are
//     never both granted, so what is claimed is above the limit only if the disk
//     was found to hold more than was reserved (Overruns), or if it was so from
//     the start.
//   - Settle adds the difference between what was reserved and what was used.
//     There is no moment at which the one is given back and the other not taken.
//   - SetLimit moves room by the difference of the limits, and lowers only what fits.
//
// Reserve does not allocate and takes no lock, unless it is about to refuse. Then
// it asks again under the lock that changes of the limit hold, so a lowering that
// is refused for one resource refuses nobody the other meanwhile.
//
// A ledger lives in memory. After a crash it is made anew, from a checkpoint if
// the volume had not changed since, else from a Scan.
//
// # Scan
//
// Scan counts a tree: the sum of the charges of what is in it, each inode once. It
// is made for trees whose owner is hostile: it reaches every entry by directory
// descriptor and name, follows no symlink, opens nothing but directories
// and regular files, needs no more descriptors however the tree is shaped, and
// goes as deep as the tree does. It holds no lock while it reads the disk. In a tree
// that changes meanwhile it tolerates that, and its figure is that of no one moment.
package quota
