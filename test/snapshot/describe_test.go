package snapshot_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// describer describes all that a copy of a tree must have.
type describer struct {
	t     testing.TB
	found map[string]string
	first map[uint64]string // the first path of each inode of several links
}

// describe returns what is in a tree, by path. It needs a descriptor for each level.
func describe(t testing.TB, root string) map[string]string {
	t.Helper()
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	kit.OK(t, err)
	d := &describer{t: t, found: make(map[string]string), first: make(map[uint64]string)}
	d.dir(fd, ".")
	return d.found
}

// dir describes what is below an open directory, and closes it.
func (d *describer) dir(fd int, path string) {
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	var st unix.Stat_t
	kit.OK(d.t, unix.Fstat(fd, &st))
	d.found[path] = common(&st) + d.xattrs(fmt.Sprint("/proc/self/fd/", fd))
	names, err := f.Readdirnames(0)
	kit.OK(d.t, err)
	sort.Strings(names)
	for _, name := range names {
		d.entry(fd, name, path+"/"+name)
	}
}

func (d *describer) entry(fd int, name, path string) {
	var st unix.Stat_t
	kit.OK(d.t, unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW))
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		child, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_CLOEXEC, 0)
		kit.OK(d.t, err)
		d.dir(child, path)
		return
	}
	if st.Nlink > 1 {
		if first := d.first[st.Ino]; first != "" {
			d.found[path] = "a link of " + first
			return
		}
		d.first[st.Ino] = path
	}
	text := fmt.Sprintf("%s size %d rdev %d links %d", common(&st), st.Size, st.Rdev, st.Nlink)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, name, target)
		kit.OK(d.t, err)
		text += fmt.Sprintf(" to %q", target[:n])
	case unix.S_IFREG:
		text += d.data(fd, name, st.Size)
	}
	d.found[path] = text + d.xattrs(fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
}

// common is what all inodes have. The size of a directory is the filesystem's; readlink(2) changes a symlink's atime.
func common(st *unix.Stat_t) string {
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		st.Atim = unix.Timespec{}
	}
	return fmt.Sprintf("%o %d:%d atime %d.%09d mtime %d.%09d", st.Mode, st.Uid, st.Gid, st.Atim.Sec, st.Atim.Nsec, st.Mtim.Sec, st.Mtim.Nsec)
}

// data describes where a file has data, and what.
func (d *describer) data(dir int, name string, size int64) string {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	kit.OK(d.t, err)
	defer unix.Close(fd)
	var text strings.Builder
	for at := int64(0); at < size; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		kit.OK(d.t, err)
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		kit.OK(d.t, err)
		part := make([]byte, hole-data)
		n, err := unix.Pread(fd, part, data)
		kit.OK(d.t, err)
		fmt.Fprintf(&text, " [%d, %d) %x", data, hole, sha256.Sum256(part[:n]))
		at = hole
	}
	return text.String()
}

func (d *describer) xattrs(path string) string {
	buf := make([]byte, 64<<10)
	list, get := unix.Llistxattr, unix.Lgetxattr
	if strings.Count(path, "/") == 4 { // a descriptor's own link is followed
		list, get = unix.Listxattr, unix.Getxattr
	}
	n, err := list(path, buf)
	kit.OK(d.t, err)
	names := strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 })
	sort.Strings(names)
	var text strings.Builder
	for _, name := range names {
		n, err := get(path, name, buf)
		kit.OK(d.t, err)
		fmt.Fprintf(&text, " %s=%x", name, buf[:n])
	}
	return text.String()
}

// compare fails the test for each path of which two trees differ.
func compare(t testing.TB, got, want map[string]string) {
	t.Helper()
	differ := 0
	for path, text := range want {
		if got[path] != text {
			differ++
			if differ <= 10 {
				t.Errorf("%.200q\nis        %.1000s\nshould be %.1000s", path, got[path], text)
			}
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%.200q should not be there", path)
		}
	}
	if differ > 10 {
		t.Errorf("%d paths differ", differ)
	}
}
