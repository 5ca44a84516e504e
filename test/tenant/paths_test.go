package tenant_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestBoundaries tries links and renames into another volume, and `..`.
func TestBoundaries(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	c := newCanary(t, p)
	mine, other := volume(t, p, "mine"), volume(t, p, "other")
	kit.OK(t, os.WriteFile(filepath.Join(other, "file"), []byte("other"), 0o666))
	eachUser(t, func(t *testing.T, uid uint32) { try(t, uid, "boundaries", mine, other, c.dir) })
	c.intact(t)
	body, err := os.ReadFile(filepath.Join(other, "file"))
	if err != nil || string(body) != "other" {
		t.Errorf("the other volume's file: %q, %v", body, err)
	}
	entries, err := os.ReadDir(other)
	if err != nil || len(entries) != 1 {
		t.Errorf("the other volume holds %v, %v", entries, err)
	}
}

func boundaries(args []string) error {
	mine, other, canary := args[0], args[1], args[2]
	dir, err := os.MkdirTemp(mine, "boundaries")
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		return err
	}
	mount := filepath.Dir(mine)
	errs := []error{
		wantErr("link into another volume", os.Link(file, filepath.Join(other, "link")), unix.EXDEV),
		wantErr("rename into another volume", os.Rename(file, filepath.Join(other, "renamed")), unix.EXDEV),
		wantErr("rename of a directory into another volume", os.Rename(dir, filepath.Join(other, "dir")), unix.EXDEV),
		wantErr("exchange with another volume", unix.Renameat2(unix.AT_FDCWD, file, unix.AT_FDCWD, filepath.Join(other, "file"), unix.RENAME_EXCHANGE), unix.EXDEV),
		wantErr("link out of the mount", os.Link(file, filepath.Join(canary, "link")), unix.EXDEV),
		wantErr("link of the canary", os.Link(filepath.Join(canary, "file"), filepath.Join(dir, "canary")), unix.EXDEV),
		wantErr("rename out of the mount", os.Rename(file, filepath.Join(canary, "renamed")), unix.EXDEV),
		// A volume is no entry that a tenant could move, remove or make.
		wantErr("rename of the volume", os.Rename(mine, filepath.Join(mount, "elsewhere")), unix.EPERM, unix.EACCES),
		wantErr("rename of the volume into itself", os.Rename(mine, filepath.Join(dir, "x")), unix.EINVAL, unix.EXDEV, unix.EPERM, unix.EACCES),
		wantErr("removal of the volume", unix.Rmdir(mine), unix.EPERM, unix.EACCES),
		wantErr("a directory beside the volume", os.Mkdir(filepath.Join(mount, "new"), 0o777), unix.EPERM, unix.EACCES),
		wantErr("a file beside the volume", os.WriteFile(filepath.Join(mount, "new"), nil, 0o666), unix.EPERM, unix.EACCES),
		wantErr("a link beside the volume", os.Symlink(canary, filepath.Join(mount, "new")), unix.EPERM, unix.EACCES),
		wantErr("chmod of the mount", os.Chmod(mount, 0o777), unix.EPERM, unix.EACCES),
		wantErr("chown of the mount", os.Chown(mount, tenantID, tenantID), unix.EPERM, unix.EACCES),
	}
	// `..` of the volume is the directory of volumes, and nothing else is.
	var up, root unix.Stat_t
	fd, err := unix.Open(mine, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	errs = append(errs, unix.Fstatat(fd, "..", &up, 0), unix.Stat(mount, &root))
	if up.Ino != root.Ino || up.Dev != root.Dev {
		errs = append(errs, fmt.Errorf("`..` of the volume is inode %d of %x, the mount's is %d of %x", up.Ino, up.Dev, root.Ino, root.Dev))
	}
	for _, name := range []string{"../pool.json", "../../pool/pool.json", "../volumes", "../orphans", "../meta", "../trash", "../lock"} {
		errs = append(errs, wantErr(name, unix.Fstatat(fd, name, &up, 0), unix.ENOENT))
	}
	// Symbolic links lead where the caller may go, by the caller's kernel.
	for i, target := range []string{canary, filepath.Join(canary, "file"), "../../../../../../../../" + canary, other, "../other", "..", "/", "loop"} {
		link := filepath.Join(dir, fmt.Sprint("link", i))
		if err := os.Symlink(target, link); err != nil {
			errs = append(errs, err)
			continue
		}
		got, err := os.Readlink(link)
		if err != nil || got != target {
			errs = append(errs, fmt.Errorf("readlink: %q, want %q, %v", got, target, err))
		}
		errs = append(errs, wantErr("O_NOFOLLOW", closeAfter(unix.Open(link, unix.O_RDONLY|unix.O_NOFOLLOW, 0)), unix.ELOOP))
		errs = append(errs, wantErr("create over a link", closeAfter(unix.Open(link, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)), unix.EEXIST))
		errs = append(errs, unix.Lchown(link, os.Getuid(), os.Getgid()), os.Rename(link, link+"x"), os.Remove(link+"x"))
	}
	return errors.Join(errs...)
}

// TestDeleteLinksOut deletes volumes that are full of ways out.
func TestDeleteLinksOut(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := kit.NewPool(t, fstype)
		c := newCanary(t, p)
		p.Mount()
		plant := func(name string) {
			dir := volume(t, p, name)
			for i, target := range []string{
				c.dir, filepath.Join(c.dir, "dir"), filepath.Join(c.dir, "file"), "/", "..", "../../canary", "../canary",
				"../../../canary", "../../../canary/dir", "../../volumes", "../other", p.Dir, ".",
			} {
				kit.OK(t, os.Symlink(target, filepath.Join(dir, fmt.Sprint("link", i))))
				sub := filepath.Join(dir, fmt.Sprint("dir", i))
				kit.OK(t, os.Mkdir(sub, 0o755))
				kit.OK(t, os.Symlink(target, filepath.Join(sub, "dir")))
				kit.OK(t, os.Symlink("../"+target, filepath.Join(sub, "up")))
			}
		}
		other := volume(t, p, "other")
		kit.OK(t, os.WriteFile(filepath.Join(other, "file"), []byte("other"), 0o666))
		plant("mounted")
		p.MustVolume("delete", "mounted")
		freed(t, p)
		plant("unmounted")
		p.Stop()
		p.MustVolume("delete", "unmounted")
		p.Mount()
		freed(t, p)
		c.intact(t)
		if body, err := os.ReadFile(filepath.Join(other, "file")); err != nil || string(body) != "other" {
			t.Errorf("the other volume's file: %q, %v", body, err)
		}
	})
}

// freed waits until the trash is empty.
func freed(t *testing.T, p *kit.Pool) {
	t.Helper()
	kit.Poll(t, "the freeing of what was deleted", func() bool {
		entries, err := os.ReadDir(filepath.Join(p.Dir, "trash"))
		return err == nil && len(entries) == 0
	})
}

// TestRacingRenames swaps directories for symbolic links to the canary while
// others create, remove and rename below them, and while the volume is deleted.
func TestRacingRenames(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		c := newCanary(t, p)
		rounds := "3000"
		if testing.Short() {
			rounds = "500"
		}
		eachUser(t, func(t *testing.T, uid uint32) {
			name := fmt.Sprint("v", uid)
			dir := volume(t, p, name)
			// The racers go by descriptors with O_NOFOLLOW, as a careful daemon
			// would: what leads them out is a fault of the filesystem.
			try(t, uid, "race", dir, c.dir, rounds)
			c.intact(t)
			// Once more, with the volume deleted from under them.
			racing := kit.Process{Helper: "race", Args: []string{dir, c.dir, "until-gone"}, UID: uid, GID: uid}.Start(t)
			if got := racing.Line(); got != "racing" {
				t.Fatalf("the racers say %q", got)
			}
			p.MustVolume("delete", "--force", name)
			if code := racing.Wait(); code != 0 {
				t.Errorf("the racers ended with %d", code)
			}
			freed(t, p)
			c.intact(t)
		})
	})
}

// TestDeepAndDelete makes paths much deeper than PATH_MAX and deletes the volume.
func TestDeepAndDelete(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		eachUser(t, func(t *testing.T, uid uint32) {
			name := fmt.Sprint("v", uid)
			dir := volume(t, p, name)
			try(t, uid, "deep", dir)
			p.Check()
			p.MustVolume("delete", name)
			freed(t, p)
		})
		// And by a pool that is not mounted.
		dir := volume(t, p, "unmounted")
		try(t, tenantID, "deep", dir)
		p.Stop()
		p.Check()
		p.MustVolume("delete", "unmounted")
		p.Mount()
		freed(t, p)
	})
}

// deep makes 400 directories with names of 200 bytes in each other, and works
// at the bottom: 80,000 bytes of path, PATH_MAX is 4,096.
func deep(args []string) error {
	fd, err := unix.Open(args[0], unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	name := strings.Repeat("d", 200)
	for range 400 {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			return fmt.Errorf("mkdir: %w", err)
		}
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		unix.Close(fd)
		fd = next
	}
	defer unix.Close(fd)
	file, err := unix.Openat(fd, "file", unix.O_CREAT|unix.O_RDWR, 0o644)
	if err != nil {
		return fmt.Errorf("create at the bottom: %w", err)
	}
	defer unix.Close(file)
	if _, err := unix.Write(file, make([]byte, 10000)); err != nil {
		return fmt.Errorf("write at the bottom: %w", err)
	}
	var st unix.Stat_t
	return errors.Join(
		unix.Linkat(fd, "file", fd, "link", 0),
		unix.Renameat(fd, "link", fd, "renamed"),
		unix.Symlinkat("file", fd, "symlink"),
		unix.Fstatat(fd, "symlink", &st, 0),
		unix.Unlinkat(fd, "renamed", 0),
		unix.Mkdirat(fd, "dir", 0o700),
		unix.Fsetxattr(file, "user.x", []byte("y"), 0),
		unix.Fchmod(file, 0o600),
		unix.Fsync(file),
	)
}
