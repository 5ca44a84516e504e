package gate

import (
	"bytes"
	"strconv"

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
	fd     int
}

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

// CallOf tells what a held thread does. It reads /proc, so it costs some
// microseconds.
func CallOf(tid int) Call {
	if tid <= 0 {
		return Call{}
	}
	nr, args, ok := systemCall(tid)
	if !ok || len(args) == 0 {
		return Call{}
	}
	c := Call{Access: access(nr, args), fd: int(int32(args[0]))}
	if c.Access != Unknown && isWorker(tid) {
		// It shows the system call in which its maker was when it was made.
		return Call{}
	}
	return c
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

func (c Call) stillIn(tid int) bool {
	nr, args, ok := systemCall(tid)
	return ok && len(args) > 0 && int(int32(args[0])) == c.fd && access(nr, args) == c.Access
}

// Over tells whether the call of the thread has ended for sure.
func (c Call) Over(tid int) bool { return c.Access != Unknown && !c.stillIn(tid) }

// systemCall reads /proc/<tid>/syscall (proc(5)): the number and six arguments of
// the system call that the thread is blocked in.
func systemCall(tid int) (nr int, args []uint64, ok bool) {
	var buf [256]byte
	fields := bytes.Fields(readProc(tid, "syscall", buf[:]))
	if len(fields) < 7 {
		return 0, nil, false
	}
	nr, err := strconv.Atoi(string(fields[0]))
	if err != nil || nr < 0 {
		return 0, nil, false
	}
	args = make([]uint64, 0, 6)
	for _, f := range fields[1:7] {
		n, err := strconv.ParseUint(string(bytes.TrimPrefix(f, []byte("0x"))), 16, 64)
		if err != nil {
			return 0, nil, false
		}
		args = append(args, n)
	}
	return nr, args, true
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
