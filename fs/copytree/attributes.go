package copytree

import (
	"bytes"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// maxXattr bounds the list of attributes of an inode and the value of each: XATTR_LIST_MAX,
// XATTR_SIZE_MAX (include/uapi/linux/limits.h), in bytes.
const maxXattr = 64 << 10

var xattrBuffers = sync.Pool{New: func() any { return new([maxXattr]byte) }}

// copyAttributes gives the regular file or directory dst what src has besides data. The owner comes first, since a change
// of it clears set-id bits and capabilities; the times come last.
func copyAttributes(src, dst int, st *unix.Stat_t) error {
	if st.Uid != 0 || st.Gid != 0 { // whoever makes the copy is root
		if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
			return fmt.Errorf("owner: %w", err)
		}
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return fmt.Errorf("mode: %w", err)
	}
	err := copyXattrs(
		func(buf []byte) (int, error) { return unix.Flistxattr(src, buf) },
		func(name string, buf []byte) (int, error) { return unix.Fgetxattr(src, name, buf) },
		func(name string, value []byte) error { return unix.Fsetxattr(dst, name, value, 0) },
	)
	if err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(dst, "", times, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

// copyAttributesAt is copyAttributes for what cannot be opened.
func copyAttributesAt(srcDir, dstDir int, name string, st *unix.Stat_t) error {
	if err := unix.Fchownat(dstDir, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		// It was just made, in a directory that nobody else reaches: no symlink.
		if err := unix.Fchmodat(dstDir, name, st.Mode&0o7777, 0); err != nil {
			return fmt.Errorf("mode: %w", err)
		}
	}
	src, dst := procPath(srcDir, name), procPath(dstDir, name)
	err := copyXattrs(
		func(buf []byte) (int, error) { return unix.Llistxattr(src, buf) },
		func(name string, buf []byte) (int, error) { return unix.Lgetxattr(src, name, buf) },
		func(name string, value []byte) error { return unix.Lsetxattr(dst, name, value, 0) },
	)
	if err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(dstDir, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

// procPath names an entry of a directory for calls that take no directory descriptor.
func procPath(dirFD int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(dirFD) + "/" + name
}

func copyXattrs(list func([]byte) (int, error), get func(string, []byte) (int, error), set func(string, []byte) error) error {
	buf := xattrBuffers.Get().(*[maxXattr]byte)
	defer xattrBuffers.Put(buf)
	n, err := list(buf[:])
	if err == unix.EOPNOTSUPP || err == nil && n == 0 {
		return nil
	} else if err != nil {
		return fmt.Errorf("list attributes: %w", err)
	}
	names := bytes.Split(bytes.TrimSuffix(bytes.Clone(buf[:n]), []byte{0}), []byte{0})
	for _, b := range names {
		name := string(b)
		if name == quota.PreallocXattr { // goes with the data
			continue
		}
		n, err := get(name, buf[:])
		if err == unix.ENODATA || err == unix.EOPNOTSUPP {
			continue
		} else if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
		// EOPNOTSUPP: a security module's that is not there any more.
		if err := set(name, buf[:n]); err != nil && err != unix.EOPNOTSUPP {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
	}
	return nil
}
