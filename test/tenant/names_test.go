package tenant_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestNames uses every byte that a name may hold, and names of every kind that
// something might take for its own.
func TestNames(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		eachUser(t, func(t *testing.T, uid uint32) {
			name := fmt.Sprint("v", uid)
			dir := volume(t, p, name)
			try(t, uid, "names", dir)
			p.Check()
			p.MustVolume("delete", name)
			freed(t, p)
		})
	})
}

// oddNames are names of 1 to 255 bytes with every byte but '/' and NUL in them.
func oddNames() []string {
	var all []byte
	for b := 1; b < 256; b++ {
		if b != '/' {
			all = append(all, byte(b))
		}
	}
	list := []string{
		string(all[:127]), string(all[127:]), string(all), // 254 bytes
		strings.Repeat("n", 255), strings.Repeat("\xff", 255), strings.Repeat("ü", 127),
		"...", ". ", " ", "-rf", "--", "*", "~", "$(reboot)", "`", "%2e%2e", "%00", "\\", "..\\..", "\n", "a\nb", "con", "NUL",
		"pool.json", "lock", "meta", "volumes", "orphans", "trash", "snapshots", ".fuse_hidden0000000100000001", ".wh.x", "lost+found",
		"0", "deadbeef",
	}
	for _, b := range all {
		if b != '.' {
			list = append(list, string([]byte{b, '#', b}))
		}
	}
	return list
}

func names(args []string) error {
	dir := args[0]
	var errs []error
	want := oddNames()
	for i, name := range want {
		path := filepath.Join(dir, "x") // Join would clean the name
		path = path[:len(path)-1] + name
		content := []byte(fmt.Sprint("content of ", i))
		if err := os.WriteFile(path, content, 0o644); err != nil {
			errs = append(errs, fmt.Errorf("create %q: %w", name, err))
			continue
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			errs = append(errs, fmt.Errorf("read %q: %q, %w", name, got, err))
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := f.Readdirnames(-1)
	errs = append(errs, err)
	sort.Strings(got)
	sort.Strings(want)
	if strings.Join(got, "/") != strings.Join(want, "/") {
		errs = append(errs, fmt.Errorf("readdir gives %d names, %d were made", len(got), len(want)))
	}
	long := filepath.Join(dir, strings.Repeat("n", 256))
	file := dir + "/" + want[0]
	errs = append(errs,
		wantErr("create of 256 bytes", os.WriteFile(long, nil, 0o644), unix.ENAMETOOLONG),
		wantErr("mkdir of 256 bytes", os.Mkdir(long, 0o755), unix.ENAMETOOLONG),
		wantErr("symlink of 256 bytes", os.Symlink("x", long), unix.ENAMETOOLONG),
		wantErr("link of 256 bytes", os.Link(file, long), unix.ENAMETOOLONG),
		wantErr("mknod of 256 bytes", unix.Mkfifo(long, 0o644), unix.ENAMETOOLONG),
		wantErr("rename to 256 bytes", os.Rename(file, long), unix.ENAMETOOLONG),
		wantErr("unlink of 256 bytes", unix.Unlink(long), unix.ENAMETOOLONG),
		wantErr("lookup of 256 bytes", unix.Access(long, unix.F_OK), unix.ENAMETOOLONG),
	)
	return errors.Join(errs...)
}

// TestSpecials has FIFOs, sockets and devices in a volume: nothing that the
// daemon does with them may block or open them.
func TestSpecials(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		if options := kit.Must(t, "findmnt", "-no", "OPTIONS", p.Mnt); !strings.Contains(options, "nodev") {
			t.Errorf("the mount is not nodev: %s", options)
		}
		eachUser(t, func(t *testing.T, uid uint32) {
			name := fmt.Sprint("v", uid)
			dir := volume(t, p, name)
			try(t, uid, "specials", dir)
			kit.Within(t, "check of a volume with FIFOs", func() { p.Check() })
			// A kill makes the next mount recount it.
			p.Daemon().Kill()
			kit.Within(t, "recount of a volume with FIFOs", func() {
				p.Mount()
				p.Check()
			})
			kit.Within(t, "delete of a volume with FIFOs", func() {
				p.MustVolume("delete", name)
				freed(t, p)
			})
			dir = volume(t, p, name)
			try(t, uid, "specials", dir)
			p.Stop()
			kit.Within(t, "delete of a volume with FIFOs that is not mounted", func() { p.MustVolume("delete", name) })
			p.Mount()
			freed(t, p)
		})
	})
}

func specials(args []string) error {
	dir := args[0]
	var errs []error
	root := os.Geteuid() == 0
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"fifo", "second"} {
		errs = append(errs, unix.Mkfifo(at(name), 0o666))
	}
	errs = append(errs,
		unix.Mknod(at("socket"), unix.S_IFSOCK|0o666, 0),
		unix.Chmod(at("fifo"), 0o644),
		os.Rename(at("second"), at("renamed")),
		os.Link(at("fifo"), at("link")),
	)
	devices := map[string]uint32{"null": unix.S_IFCHR, "disk": unix.S_IFBLK}
	for name, kind := range devices {
		err := unix.Mknod(at(name), kind|0o666, int(unix.Mkdev(1, 3)))
		if !root {
			errs = append(errs, wantErr("mknod of a device", err, unix.EPERM))
			continue
		}
		var st unix.Stat_t
		errs = append(errs, err, unix.Lstat(at(name), &st))
		if st.Mode&unix.S_IFMT != kind || st.Rdev != unix.Mkdev(1, 3) {
			errs = append(errs, fmt.Errorf("%s: mode %o, device %x", name, st.Mode, st.Rdev))
		}
		errs = append(errs, wantErr("open of a device", closeAfter(unix.Open(at(name), unix.O_RDWR, 0)), unix.EACCES))
	}
	// The kernel serves FIFOs itself: a reader and a writer meet.
	fd, err := unix.Open(at("fifo"), unix.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte("hello"))
	errs = append(errs, err)
	buf := make([]byte, 16)
	if n, err := unix.Read(fd, buf); err != nil || string(buf[:n]) != "hello" {
		errs = append(errs, fmt.Errorf("FIFO: %q, %v", buf[:max(n, 0)], err))
	}
	errs = append(errs, wantErr("open of a socket", closeAfter(unix.Open(at("socket"), unix.O_RDWR, 0)), unix.ENXIO))
	errs = append(errs, wantErr("truncate of a FIFO", unix.Truncate(at("fifo"), 0), unix.EINVAL))
	return errors.Join(errs...)
}

// TestOwnAttributes looks for the daemon's own attributes from within.
func TestOwnAttributes(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		dir := volume(t, p, "v")
		eachUser(t, func(t *testing.T, uid uint32) { try(t, uid, "attributes", dir) })
		p.Check()
	})
}

func attributes(args []string) error {
	f, err := os.CreateTemp(args[0], "attributes")
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	// It makes the daemon keep an attribute of its own on the backing inode.
	if err := unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, err := unix.Flistxattr(fd, buf)
	if err != nil {
		return err
	}
	var errs []error
	if bytes.Contains(buf[:n], []byte("croft")) {
		errs = append(errs, fmt.Errorf("listxattr shows %q", buf[:n]))
	}
	for _, name := range []string{"trusted.croft.prealloc", "trusted.croft.x", "trusted.croft."} {
		_, err := unix.Fgetxattr(fd, name, buf)
		errs = append(errs,
			wantErr("getxattr "+name, err, unix.ENODATA),
			wantErr("setxattr "+name, unix.Fsetxattr(fd, name, []byte("0"), 0), unix.EPERM),
			wantErr("removexattr "+name, unix.Fremovexattr(fd, name), unix.EPERM, unix.ENODATA),
		)
	}
	// An attribute of one's own does work, and no more than a block of them.
	errs = append(errs,
		unix.Fsetxattr(fd, "user.mine", []byte("yes"), 0),
		wantErr("an attribute of 8 KiB", unix.Fsetxattr(fd, "user.big", make([]byte, 8192), 0), unix.ENOSPC, unix.E2BIG),
	)
	return errors.Join(errs...)
}

// TestSetIDClears expects set-id bits to go when another than root writes.
func TestSetIDClears(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	dir := volume(t, p, "v")
	try(t, tenantID, "setid", dir)
}

func setID(args []string) error {
	var errs []error
	for name, change := range map[string]func(f *os.File) error{
		"write":    func(f *os.File) error { _, err := f.WriteAt([]byte("x"), 0); return err },
		"truncate": func(f *os.File) error { return f.Truncate(1) },
		"fallocate": func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), 0, 0, 8192)
		},
		"chown": func(f *os.File) error { return f.Chown(-1, os.Getgid()) },
		"truncate by path": func(f *os.File) error {
			return os.Truncate(f.Name(), 2)
		},
		"open with O_TRUNC": func(f *os.File) error {
			return closeAfter(unix.Open(f.Name(), unix.O_WRONLY|unix.O_TRUNC, 0))
		},
	} {
		path := filepath.Join(args[0], strings.ReplaceAll(name, " ", "-"))
		err := func() error {
			if err := os.WriteFile(path, []byte("#!"), 0o700); err != nil {
				return err
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := unix.Chmod(path, 0o6755); err != nil {
				return err
			}
			if err := change(f); err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				return err
			}
			if st.Mode&0o7777 != 0o755 {
				return fmt.Errorf("mode %o is left", st.Mode&0o7777)
			}
			return nil
		}()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
