// Package gate holds writes that the kernel does by itself, so that they can be
// refused.
//
// A file that FUSE passes through is written without a word to the daemon.
// fanotify's pre-content events (Linux 6.14; fs/notify/fanotify, include/linux/fsnotify.h)
// are raised on the backing inode before each read(2) and write(2) of it, and
// hold the caller until they are answered: with FAN_ALLOW, or with FAN_DENY and
// an errno. Two things make them usable here:
//   - Whether an open file raises them at all is settled when it is opened
//     (file_set_fsnotify_mode_from_watchers), by whether its inode is marked then.
//     A file that was opened before the mark stays silent.
//   - A mark can be ignored, and the ignoring taken back, at any time. While it
//     is ignored a write costs some tenths of a microsecond more.
//
// So an inode is marked and ignored (native) before its open is answered, and
// while its volume has little room the ignoring is taken away (held).
//
// What raises no event: splice(2) and sendfile(2) into a passed file (the
// kernel verifies the range on the FUSE file only), and stores by mappings. See
// Brake and Mappers.
//
// # A daemon that dies
//
// A group lives as long as somebody has a descriptor of it, and its marks and what it holds
// with it. So a keeper has one, and what was read and not answered is in a region
// (fs/state) that the keeper has as well: first where the kernel has put it, then in a
// record of its own, until it is answered. The next daemon opens the gate with both, and
// decides what is left. That may be a second time; the kernel finds no such event then.
//
// An answer names its event by the number of a descriptor in the daemon that has read it.
// As long as it is not answered no other event may have that number: see numbers.
package gate
