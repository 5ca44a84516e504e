package snapshot_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestTree makes a snapshot and a clone of a tree that is made to be hard to copy, and restores the snapshot when
// the volume has gone.
func TestTree(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		kit.Need(t, "setfacl", "sync")
		dir := p.Create("v", 512*kit.Mi)
		nameless := makeTree(t, dir)
		defer nameless.Close()
		kit.Must(t, "sync", "-f", p.Backing)
		want := describe(t, p.Tree("v"))
		if len(want) < 60 {
			t.Fatalf("only %d paths", len(want))
		}
		snapshot(t, p, "create", "v", "s")
		compare(t, describe(t, filepath.Join(p.Dir, "snapshots", "s")), want)
		compare(t, describe(t, p.Tree("v")), want) // nothing of the source has changed, no time either
		kit.OK(t, nameless.Close())
		p.Idle()
		p.MustVolume("clone", "v", "c")
		used := p.Used("v")
		if s := snapshots(t, p)["s"]; s.Used != used || s.Held <= 0 {
			t.Errorf("the snapshot is %+v, the volume used %v", s, used)
		}
		kit.OK(t, os.WriteFile(filepath.Join(dir, "later"), []byte("x"), 0o644))
		p.MustVolume("delete", "v")
		snapshot(t, p, "restore", "s", "r")
		for _, name := range []string{"c", "r"} {
			kit.Must(t, "sync", "-f", p.Backing)
			compare(t, describe(t, p.Tree(name)), want)
			if got := p.Used(name); got != used {
				t.Errorf("%s uses %v, the volume used %v", name, got, used)
			}
		}
		// A write to one of them is not seen in the others.
		kit.OK(t, os.WriteFile(p.Path("r", "big"), []byte("other"), 0o600))
		delete(want, "./big")
		got := describe(t, p.Tree("c"))
		delete(got, "./big")
		compare(t, got, want)
		snapshot(t, p, "delete", "s")
		p.Check()

		// On a pool that is not mounted.
		p.Stop()
		snapshot(t, p, "create", "c", "s")
		p.MustVolume("delete", "c")
		snapshot(t, p, "restore", "s", "c")
		p.MustVolume("clone", "c", "d")
		if got := p.Used("d"); got != used || snapshots(t, p)["s"].Used != used {
			t.Errorf("d uses %v, the volume used %v", got, used)
		}
		kit.Must(t, "sync", "-f", p.Backing)
		want = describe(t, p.Tree("c"))
		compare(t, describe(t, p.Tree("d")), want)
		snapshot(t, p, "delete", "s")
	})
}

// makeTree fills a directory, and returns a file in it that has lost its name and is open.
func makeTree(t *testing.T, root string) *os.File {
	t.Helper()
	long := strings.Repeat("\xff", 255)
	at := func(name string) string { return filepath.Join(root, name) }
	write := func(name string, data []byte) { kit.OK(t, os.WriteFile(at(name), data, 0o640)) }

	big := make([]byte, 5*kit.Mi+17)
	for i := range big {
		big[i] = byte(i * i >> 7)
	}
	write("big", big)
	write("small", []byte("small"))
	write("empty", nil)
	write("line\nbreak \x01\xfe", []byte("odd"))
	write(long, []byte("long"))
	for i := range 30 {
		write(fmt.Sprint("many", i), big[:i*1000])
	}

	sparse, err := os.Create(at("sparse"))
	kit.OK(t, err)
	for _, off := range []int64{0, 10 * kit.Mi, kit.Gi} {
		_, err := sparse.WriteAt(big[:8192], off)
		kit.OK(t, err)
	}
	kit.OK(t, sparse.Truncate(3*kit.Gi))
	kit.OK(t, unix.Fallocate(int(sparse.Fd()), 0, 20*kit.Mi, 3*kit.Mi)) // within, without data
	kit.OK(t, sparse.Close())
	ahead, err := os.Create(at("ahead"))
	kit.OK(t, err)
	_, err = ahead.Write(big[:100])
	kit.OK(t, err)
	kit.OK(t, unix.Fallocate(int(ahead.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 2*kit.Mi)) // beyond its end
	kit.OK(t, ahead.Close())

	kit.OK(t, os.Symlink("/etc/passwd", at("absolute")))
	kit.OK(t, os.Symlink(strings.Repeat("../", 300), at("up")))
	kit.OK(t, unix.Mkfifo(at("fifo"), 0o604))
	kit.OK(t, unix.Mknod(at("socket"), unix.S_IFSOCK|0o640, 0))
	kit.OK(t, unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	kit.OK(t, unix.Mknod(at("disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))))

	kit.OK(t, os.MkdirAll(at("sub/below"), 0o2775))
	kit.OK(t, os.Link(at("big"), at("sub/big")))
	kit.OK(t, os.Link(at("big"), at("sub/below/big")))
	kit.OK(t, os.Link(at("fifo"), at("sub/fifo")))
	kit.OK(t, os.Link(at("up"), at("sub/up")))

	kit.OK(t, os.Chown(at("small"), 12345, 54321))
	kit.OK(t, unix.Chmod(at("small"), 0o6755))
	kit.OK(t, unix.Chmod(at("sub"), 0o3771))
	kit.OK(t, os.Lchown(at("absolute"), 7, 8))
	kit.OK(t, unix.Setxattr(at("small"), "user.text", []byte("some \x00 text"), 0))
	kit.OK(t, unix.Setxattr(at("sub"), "user.of.a.directory", []byte(strings.Repeat("x", 1000)), 0))
	// cap_net_raw+ep: struct vfs_cap_data, include/uapi/linux/capability.h.
	raw := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	kit.OK(t, unix.Setxattr(at("many3"), "security.capability", raw, 0))
	kit.Must(t, "setfacl", "-m", "u:1001:rw,g:1002:r", at("many4"))
	kit.Must(t, "setfacl", "-m", "u:1003:rwx,d:u:1004:rx,d:m::rx", at("sub"))

	makeDeep(t, root, long)

	nameless, err := os.Create(at("nameless"))
	kit.OK(t, err)
	_, err = nameless.Write(big)
	kit.OK(t, err)
	kit.OK(t, os.Remove(at("nameless")))

	// Times last, and those of directories after what is in them.
	for i, name := range []string{"big", "small", "absolute", "fifo", "null", "sub/below", "sub", "."} {
		times := []unix.Timespec{{Sec: int64(1000 + i), Nsec: 123456789}, {Sec: int64(2000 + i), Nsec: 987654321}}
		kit.OK(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(name), times, unix.AT_SYMLINK_NOFOLLOW))
	}
	return nameless
}

// makeDeep makes directories to beyond PATH_MAX, with a file in each.
func makeDeep(t *testing.T, root, name string) {
	t.Helper()
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	kit.OK(t, err)
	for range 2 * unix.PathMax / len(name) {
		child := "d" + name[1:]
		kit.OK(t, unix.Mkdirat(fd, child, 0o750))
		next, err := unix.Openat(fd, child, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		kit.OK(t, err)
		kit.OK(t, unix.Close(fd))
		fd = next
		file, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		kit.OK(t, err)
		_, err = unix.Write(file, []byte("deep"))
		kit.OK(t, err)
		kit.OK(t, unix.Close(file))
	}
	kit.OK(t, unix.Close(fd))
}
