package gate

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Access is what a held thread is about to do, as far as can be told.
type Access uint8

// The kinds of access.
const (
	// Unknown is io_uring, aio, another architecture's system call, a thread in
	// a process namespace that we do not see.
	Unknown Access = iota
	// Reads is any system call that does not write into the file.
	Reads
	// Writes is a write at the event's offset, or where the file ends when the
	// descriptor is O_APPEND; it is over when the thread's system call is.
	Writes
	// Appends is a write where the file ends.
	Appends
)

// Call is what a thread does.
type Call struct {
	Access Access
	// Len is how many bytes it is about to write, 0 when that is not known.
	Len uint64
	fd  int
}

// HasLock tells that it has the lock of the mount's inode (fuse_passthrough_write_iter in fs/fuse/passthrough.c): no other
// write(2) of the file is under way, and none that was begun before has anything left to do.
func (c Call) HasLock() bool { return c.Access == Writes || c.Access == Appends }

// Numbers of this architecture. A process of another one (i386 on x86-64) has
// others: there 1, 18, 20, 296 and 328 write nothing, and 0, 17, 19, 40, 275, 295, 326
// and 327 write nothing either (arch/x86/entry/syscalls), so that no write is
// taken for a read.
func access(nr int, args []uint64) Access {
	const rwfAppend = 0x10 // RWF_APPEND of include/uapi/linux/fs.h
	switch nr {
	case unix.SYS_READ, unix.SYS_PREAD64, unix.SYS_READV, unix.SYS_PREADV, unix.SYS_PREADV2,
		unix.SYS_SENDFILE, unix.SYS_SPLICE, unix.SYS_COPY_FILE_RANGE:
		return Reads
	case unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_WRITEV, unix.SYS_PWRITEV:
		return Writes
	case unix.SYS_PWRITEV2:
		if len(args) > 5 && args[5]&rwfAppend != 0 {
			return Appends
		}
		return Writes
	}
	return Unknown
}

// Resizes tells whether a sleeping thread truncates a file or changes its owner, so
// that it does not grow by that.
func (c *Callers) Resizes(tid int) bool {
	if tid <= 0 || isWorker(tid) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	nr, _, err := systemCall(c.openLocked(tid))
	return err == nil && slices.Contains(resizing, nr)
}

// Callers finds out what held threads do. It keeps what it has opened of theirs in
// /proc, which costs most: such a descriptor is of that thread alone, whoever
// gets its number later.
type Callers struct {
	mu    sync.Mutex
	known map[int]*os.File // /proc/<tid>/syscall; nil for a worker of the kernel
}

const (
	// maxCallers bounds the descriptors.
	maxCallers = 256
	// maxLooks bounds how often a thread is looked at that does not sleep yet.
	maxLooks = 1000
)

// Of tells what a held thread does.
func (c *Callers) Of(tid int) Call {
	if tid <= 0 {
		return Call{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f, ok := c.known[tid]
	nr, args, err := -1, []uint64(nil), error(unix.ESRCH)
	if ok {
		nr, args, err = systemCall(f)
	}
	if errors.Is(err, unix.ESRCH) { // it is not that thread any more
		f = c.openLocked(tid)
		nr, args, err = systemCall(f)
	}
	// Its event is there before it sleeps.
	for range maxLooks {
		if !errors.Is(err, unix.EAGAIN) {
			break
		}
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		nr, args, err = systemCall(f)
	}
	if err != nil || nr < 0 {
		return Call{}
	}
	call := Call{Access: access(nr, args), fd: int(int32(args[0]))}
	if nr == unix.SYS_WRITE || nr == unix.SYS_PWRITE64 {
		call.Len = args[2]
	}
	return call
}

// CallOf is Of the thread of an event that is not answered yet, which is asked once. Not for concurrent use with one event.
func (c *Callers) CallOf(ev *Event) Call {
	if ev.call.Access == Unknown {
		ev.call = c.Of(ev.TID)
	}
	return ev.call
}

func (c *Callers) openLocked(tid int) *os.File {
	if len(c.known) >= maxCallers || c.known == nil {
		c.closeLocked()
	} else if f := c.known[tid]; f != nil {
		f.Close()
	}
	var f *os.File
	if !isWorker(tid) { // one shows the system call in which its maker was when it was made
		f, _ = os.Open("/proc/" + strconv.Itoa(tid) + "/syscall")
	}
	c.known[tid] = f
	return f
}

// Close closes what is kept.
func (c *Callers) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked()
}

func (c *Callers) closeLocked() {
	for _, f := range c.known {
		f.Close()
	}
	c.known = make(map[int]*os.File)
}

// Appending tells whether the descriptor by which a held thread writes is
// O_APPEND now; true when that cannot be found out.
func (c Call) Appending(tid int) bool {
	var buf [512]byte
	b := readProc(tid, "fdinfo/"+strconv.Itoa(c.fd), buf[:])
	_, flags, ok := bytes.Cut(b, []byte("flags:\t"))
	if !ok {
		return true
	}
	flags, _, _ = bytes.Cut(flags, []byte("\n"))
	n, err := strconv.ParseUint(string(flags), 8, 64)
	return err != nil || n&unix.O_APPEND != 0
}

// Over tells whether a call of the thread has ended for sure: the thread is gone,
// or sleeps in another one. One that runs may be about to do what it was allowed.
func (c *Callers) Over(tid int, call Call) bool {
	if call.Access == Unknown {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f, ok := c.known[tid]
	if !ok {
		f = c.openLocked(tid)
	}
	nr, args, err := systemCall(f)
	switch {
	case err == nil:
		return nr < 0 || access(nr, args) != call.Access || int(int32(args[0])) != call.fd
	case f == nil:
		return !isThread(tid)
	}
	return errors.Is(err, unix.ESRCH)
}

func isThread(tid int) bool {
	_, err := os.Lstat("/proc/" + strconv.Itoa(tid))
	return err == nil
}

// systemCall reads /proc/<tid>/syscall (proc(5)): the number and six arguments of
// the system call in which the thread sleeps, -1 when it sleeps in none. EAGAIN
// when it runs, ESRCH when it is gone.
func systemCall(f *os.File) (nr int, args []uint64, err error) {
	if f == nil {
		return 0, nil, unix.EINVAL
	}
	var buf [256]byte
	n, err := unix.Pread(int(f.Fd()), buf[:], 0)
	if err != nil {
		return 0, nil, err
	}
	fields := bytes.Fields(buf[:n])
	if len(fields) == 0 || string(fields[0]) == "running" {
		return 0, nil, unix.EAGAIN
	}
	if nr, err = strconv.Atoi(string(fields[0])); err != nil || nr < 0 {
		return nr, nil, err
	}
	if len(fields) < 7 {
		return 0, nil, unix.EINVAL
	}
	args = make([]uint64, 0, 6)
	for _, f := range fields[1:7] {
		n, err := strconv.ParseUint(string(bytes.TrimPrefix(f, []byte("0x"))), 16, 64)
		if err != nil {
			return 0, nil, err
		}
		args = append(args, n)
	}
	return nr, args, nil
}

// isWorker tells whether a thread is the kernel's own, for io_uring: PF_IO_WORKER
// or PF_USER_WORKER of include/linux/sched.h, in /proc/<tid>/stat. True when that
// cannot be found out.
func isWorker(tid int) bool {
	const worker = 0x10 | 0x4000
	var buf [1024]byte
	b := readProc(tid, "stat", buf[:])
	i := bytes.LastIndexByte(b, ')') // the name before it may hold anything
	fields := bytes.Fields(b[i+1:])
	if i < 0 || len(fields) < 7 {
		return true
	}
	flags, err := strconv.ParseUint(string(fields[6]), 10, 64)
	return err != nil || flags&worker != 0
}

func readProc(tid int, name string, buf []byte) []byte {
	fd, err := unix.Open("/proc/"+strconv.Itoa(tid)+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	n, _ := unix.Read(fd, buf)
	return buf[:max(n, 0)]
}
