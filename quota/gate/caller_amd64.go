package gate

import "golang.org/x/sys/unix"

// resizing are the system calls that Callers.Resizes is about.
var resizing = []int{
	unix.SYS_TRUNCATE, unix.SYS_FTRUNCATE, unix.SYS_OPEN, unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_CREAT,
	unix.SYS_CHOWN, unix.SYS_FCHOWN, unix.SYS_LCHOWN, unix.SYS_FCHOWNAT,
}
