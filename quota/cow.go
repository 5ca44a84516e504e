package quota

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The ioctls and the struct of include/uapi/linux/fs.h, "file attributes".
const (
	fsIocFsgetxattr   = 0x801c581f // _IOR('X', 31, struct fsxattr)
	fsIocFssetxattr   = 0x401c5820 // _IOW('X', 32, struct fsxattr)
	fsXflagCowextsize = 0x00010000
)

type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

// NoCowAhead makes xfs copy on write no more of the regular file behind fd than the blocks that are written; of a directory,
// those of what is made in it from then on. By default it takes 32 blocks around each, holes among them, and keeps
// data that is written into such a hole where FIEMAP does not show it until write-back: the
// charge would move by itself. Where no blocks can be shared it fails, which is of no matter.
//
// changed tells that it was not so before; then the ctime of what is behind fd is of now. fd may be open for reading only.
func (r Rule) NoCowAhead(fd int) (changed bool) {
	var x fsxattr
	if !ioctl(fd, fsIocFsgetxattr, unsafe.Pointer(&x)) {
		return false
	}
	hint := uint32(r.block())
	if x.xflags&fsXflagCowextsize != 0 && x.cowextsize <= hint {
		return false
	}
	x.xflags |= fsXflagCowextsize
	x.cowextsize = hint
	return ioctl(fd, fsIocFssetxattr, unsafe.Pointer(&x))
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) bool {
	return retry(func() error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
			return errno
		}
		return nil
	}) == nil
}
