// Package transport mounts a FUSE filesystem and carries its requests between
// the kernel and a fuse.RawFileSystem.
//
// # Terms
//
// A connection (Conn) is one mount: the descriptor on /dev/fuse, the superblock
// that mount(2) made for it, and the threads that serve it. A serving thread is
// an operating system thread that reads a request, runs its handler and writes
// the reply, all by itself: handing a request to another thread costs more than
// most requests do.
//
// # Life cycle
//
// Mount opens /dev/fuse, mounts, and answers the kernel's INIT request. From
// then on requests queue up in the kernel until Serve is called. Serve must be
// called exactly once for each successful Mount, even if the mount was taken
// away before: it is Serve that closes the descriptor and calls OnUnmount.
// Serve ends when the kernel has ended the connection, that is after a clean
// unmount, or, after a lazy one, when the last user of the mount has gone.
//
// The kernel drops RELEASE and FORGET requests that are still queued when the
// connection ends. OnUnmount is the file system's cue to let go of everything
// that it still holds. It is called after the last handler has returned.
// RawFileSystem.Init is never called: its argument is go-fuse's own server,
// which is not used.
//
// # What a handler may rely on
//
//   - It runs on a thread of its own whose umask is 0, whose working directory
//     and umask are not shared with the process (CLONE_FS), and whose
//     capabilities survive a change of the file system user id
//     (SECBIT_NO_SETUID_FIXUP). It may call setfsuid(2), setfsgid(2), umask(2)
//     and the raw setgroups system call for that thread alone, and must undo
//     them before it returns, with a defer.
//   - Data of a WRITE request, and the buffer that a READ request is to fill,
//     begin on a page boundary, as O_DIRECT on the backing file wants it.
//   - Neither may be kept after the handler has returned: each thread reuses
//     its two buffers.
//   - A panic answers EIO, is logged with its stack, and retires the thread,
//     since the panic may have left it with a wrong identity.
//   - The process must not use its own mount through os.File: opening a file
//     registers it with the runtime's poller, which asks for a POLL while the
//     runtime is not able to schedule the thread that would answer it. Plain
//     system calls are safe. Conn.DisablePoll lifts the restriction.
//   - A process that is to end, by a signal or by itself, while one of its threads
//     waits for an answer of its own handler does not end: the kernel waits
//     for a request that was read whatever signals come, and the waiting thread keeps
//     the descriptor open. Only an abort through fusectl frees it. A daemon
//     does not use its own mount; the tests do, and have a guard (guard_test.go).
//
// # Threads
//
// All threads read from one descriptor; FUSE_DEV_IOC_CLONE is not used because
// closing a clone aborts the requests that were read from it. Another thread is
// started when the last idle one takes a request, up to Options.MaxThreads.
// A thread that has replied ends if Options.MinThreads others are idle and no
// shortage was seen for a while. The kernel hands requests to idle threads in
// turn, so a surplus thread gets to that point soon even under light load.
// While MaxThreads handlers are blocked nothing is read, not even an INTERRUPT,
// so a handler must not wait for another request to come in. One that waits for
// something slow says so (Conn.Waits) and does not count meanwhile.
//
// The counters that decide this are atomics. Nothing in this package takes a
// lock between the read of a request and the write of its reply.
//
// # Which requests come
//
// POSIX and BSD locks stay in the kernel. The file system controls cached data
// itself (EXPLICIT_INVAL_DATA): a change of size or modification time that it
// reports does not drop cached pages. POLL is answered ENOSYS, so every file is
// always ready, like a file on a disk. SYNCFS has no handler in go-fuse and
// would be answered ENOSYS, which the kernel remembers for the life of the
// mount; it is sent to fuseblk and virtiofs mounts only, never to this one, so
// syncfs(2) on the mount writes back dirty pages and asks the daemon nothing.
// The name ".go-fuse-epoll-hack" in the root directory and the node id of all
// ones belong to go-fuse; a FORGET for that node id does reach the file system
// and must be ignored by it.
package transport
