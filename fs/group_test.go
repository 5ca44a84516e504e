package fs_test

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

// group is what the volumes are seen as; tenant is a user in it, outsider one who is
// not. ownGroup is another group, of the tenant's own.
const (
	group    = 64_500
	tenant   = 64_501
	outsider = 64_502
	ownGroup = 64_503
)

var room = quota.Usage{Bytes: 1 << 40, Inodes: 1 << 20}

func (m *mounted) setGroup(t *testing.T, gid int) {
	t.Helper()
	if gid < 0 {
		must(t, m.fs.SetGroup("v", nil))
		return
	}
	g := uint32(gid)
	must(t, m.fs.SetGroup("v", &g))
}

// as calls fn as another user, with a directory that is opened before: the way to it
// is root's only. It is a thread of its own that has no more rights than the user.
func as(t *testing.T, dir string, uid, gid int, groups []uint32, fn func(root *os.Root, dirfd int)) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	dirfd := openFile(t, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	defer unix.Close(dirfd)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and it ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			t.Error(err)
			return
		}
		unix.Umask(0)
		// Of this thread only, which syscall.Setgroups is not.
		if _, _, errno := unix.Syscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0); errno != 0 {
			t.Error(errno)
			return
		}
		if err := errors.Join(unix.Setfsgid(gid), unix.Setfsuid(uid)); err != nil {
			t.Error(err)
			return
		}
		fn(root, dirfd)
	}()
	<-done
}

func lstat(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("lstat %s: %v", path, err)
	}
	return st
}

// shows checks the group and the permission bits of a name in the mount, and on the disk.
func (m *mounted) shows(t *testing.T, name string, gid, mode, diskGid, diskMode uint32) {
	t.Helper()
	for where, want := range map[string][2]uint32{m.dir: {gid, mode}, m.tree: {diskGid, diskMode}} {
		st := lstat(t, filepath.Join(where, name))
		if got := [2]uint32{st.Gid, st.Mode & 0o7777}; got != want {
			t.Errorf("%s in %s: group %d mode %o, want %d %o", name, filepath.Base(where), got[0], got[1], want[0], want[1])
		}
	}
}

// makeTree makes root's files, 40 directories of 49: 2,000 inodes.
func (m *mounted) makeTree(t *testing.T) (names []string) {
	t.Helper()
	for d := range 40 {
		dir := fmt.Sprint("d", d)
		must(t, os.Mkdir(filepath.Join(m.dir, dir), 0o700))
		names = append(names, dir)
		for i := range 49 {
			name := filepath.Join(dir, fmt.Sprint("f", i))
			must(t, os.WriteFile(filepath.Join(m.dir, name), []byte("root's"), []iofs.FileMode{0o600, 0o644}[i%2]))
			names = append(names, name)
		}
	}
	return names
}

func (m *mounted) disk(t *testing.T, names []string) map[string]unix.Stat_t {
	t.Helper()
	all := make(map[string]unix.Stat_t)
	for _, name := range names {
		st := lstat(t, filepath.Join(m.tree, name))
		st.Atim = unix.Timespec{}
		all[name] = st
	}
	return all
}

// A volume of root's files is a group's at once, whatever the kernel has cached, and
// nothing of it is written.
func TestGroupView(t *testing.T) {
	for _, tier := range []fs.Tier{fs.TierDaemon, fs.TierRead, fs.TierGate} {
		t.Run(string(tier), func(t *testing.T) {
			m := mountTier(t, room, tier)
			names := m.makeTree(t)
			before := m.disk(t, names)
			check := func(gid uint32, modes map[uint32]uint32) {
				t.Helper()
				for _, name := range names {
					st, disk := lstat(t, filepath.Join(m.dir, name)), before[name]
					if want := modes[disk.Mode&0o777]; st.Gid != gid || st.Mode&0o7777 != want {
						t.Fatalf("%s: group %d mode %o, want %d %o", name, st.Gid, st.Mode&0o7777, gid, want)
					}
				}
			}
			plain := map[uint32]uint32{0o600: 0o600, 0o644: 0o644, 0o700: 0o700}
			check(0, plain)
			as(t, m.dir, tenant, group, nil, func(root *os.Root, _ int) {
				if _, err := root.Open("d0/f1"); !errors.Is(err, unix.EACCES) {
					t.Errorf("without the view: %v", err)
				}
			})
			m.setGroup(t, group)
			check(group, map[uint32]uint32{0o600: 0o660, 0o644: 0o664, 0o700: 0o770})
			as(t, m.dir, tenant, ownGroup, []uint32{group}, func(root *os.Root, _ int) {
				for _, name := range names {
					if data, err := root.ReadFile(name); before[name].Mode&unix.S_IFMT == unix.S_IFREG && (string(data) != "root's" || err != nil) {
						t.Errorf("%s: %q, %v", name, data, err)
						return
					}
				}
			})
			as(t, m.dir, outsider, outsider, nil, func(root *os.Root, _ int) {
				for _, name := range []string{"d0/f0", "d0/f1"} {
					if _, err := root.Open(name); !errors.Is(err, unix.EACCES) {
						t.Errorf("an outsider opens %s: %v", name, err)
					}
				}
				if err := root.Mkdir("mine", 0o700); !errors.Is(err, unix.EACCES) {
					t.Errorf("an outsider makes a directory: %v", err)
				}
			})
			m.setGroup(t, -1)
			check(0, plain)
			m.setGroup(t, group)
			for name, st := range m.disk(t, names) {
				if st != before[name] {
					t.Fatalf("%s has changed on the disk: %+v, was %+v", name, st, before[name])
				}
			}
			as(t, m.dir, tenant, group, nil, func(root *os.Root, _ int) { writeAll(t, root) })
			m.setGroup(t, -1)
			m.shows(t, "d0/f2", 0, 0o600, 0, 0o600)
			m.shows(t, "d0/f3", 0, 0o644, 0, 0o644)
			m.shows(t, "d0/made", group, 0o640, group, 0o640)
		})
	}
}

// TestGroupViewSettles has files opened while the kernel is told a second time to forget what it has known of them.
func TestGroupViewSettles(t *testing.T) {
	m := mountTier(t, room, fs.TierRead)
	names := m.makeTree(t)
	for range 4 {
		m.setGroup(t, -1)
		for _, name := range names {
			lstat(t, filepath.Join(m.dir, name)) // known as the disk has it
		}
		m.setGroup(t, group)
		as(t, m.dir, tenant, group, nil, func(root *os.Root, _ int) {
			time.Sleep(fs.ViewTime - 20*time.Millisecond)
			for _, name := range names {
				if f, err := root.Open(name); err != nil {
					t.Errorf("%s: %v", name, err)
				} else {
					f.Close()
				}
			}
		})
	}
}

// writeAll writes what makeTree has made, and makes, moves and removes names in each directory.
func writeAll(t *testing.T, root *os.Root) {
	for d := range 40 {
		for i := range 49 {
			f, err := root.OpenFile(fmt.Sprintf("d%d/f%d", d, i), os.O_RDWR|os.O_APPEND, 0)
			if err == nil {
				_, err = f.WriteString(" and the tenant's")
				err = errors.Join(err, f.Close())
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
		dir := fmt.Sprintf("d%d/", d)
		if err := errors.Join(
			root.WriteFile(dir+"new", nil, 0o640),
			root.Rename(dir+"new", dir+"made"),
			root.Rename(dir+"f0", dir+"moved"),
			root.Remove(dir+"f1"),
		); err != nil {
			t.Error(err)
			return
		}
	}
}

// Whatever is made in the view is the group's and has the mode that was asked for,
// also in a directory that is root's on the disk and set-gid.
func TestGroupViewMakes(t *testing.T) {
	for _, tier := range []fs.Tier{fs.TierRead, fs.TierGate} {
		t.Run(string(tier), func(t *testing.T) {
			g := uint32(group)
			m := mountGroup(t, room, tier, &g)
			must(t, os.Chown(m.tree, 0, 0)) // a change of the disk that the kernel has not cached
			must(t, os.Mkdir(filepath.Join(m.tree, "setgid"), 0o755))
			must(t, os.Chown(filepath.Join(m.tree, "setgid"), 0, ownGroup))
			must(t, os.Chmod(filepath.Join(m.tree, "setgid"), 0o755|os.ModeSetgid))
			m.ledger.Settle(quota.Usage{}, quota.Delta{Bytes: 4096, Inodes: 1})
			m.shows(t, "", group, 0o775, 0, 0o755)
			m.shows(t, "setgid", group, 0o2775, ownGroup, 0o2755)
			for _, dir := range []string{"", "setgid/"} {
				as(t, m.dir, tenant, ownGroup, []uint32{group}, func(root *os.Root, dirfd int) { makeAll(t, root, dirfd, dir) })
				for _, name := range []string{"file", "node", "fifo", "tmp", "linked"} {
					m.shows(t, dir+name, group, 0o700, group, 0o700)
				}
				m.shows(t, dir+"link", group, 0o777, group, 0o777)
				m.shows(t, dir+"setuid", group, 0o4700, group, 0o4700)
				if want := uint32(0o700); dir == "" {
					m.shows(t, dir+"dir", group, want, group, want)
				} else {
					m.shows(t, dir+"dir", group, 0o2700, group, 0o2700)
				}
			}
		})
	}
}

func makeAll(t *testing.T, root *os.Root, dirfd int, dir string) {
	file := func(name string, mode uint32) error {
		fd, err := unix.Openat(dirfd, dir+name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, mode)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}
	fd, err := unix.Openat(dirfd, dir+".", unix.O_TMPFILE|unix.O_RDWR, 0o700)
	if err != nil {
		t.Errorf("O_TMPFILE in %q: %v", dir, err)
		return
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Gid != group || st.Mode&0o7777 != 0o700 {
		t.Errorf("O_TMPFILE: group %d mode %o, %v", st.Gid, st.Mode, err)
	}
	if err := errors.Join(
		file("file", 0o700),
		file("setuid", 0o4700),
		root.Mkdir(dir+"dir", 0o700),
		root.Symlink("nowhere", dir+"link"),
		unix.Mknodat(dirfd, dir+"node", unix.S_IFREG|0o700, 0),
		unix.Mknodat(dirfd, dir+"fifo", unix.S_IFIFO|0o700, 0),
		unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/thread-self/fd/%d", fd), dirfd, dir+"tmp", unix.AT_SYMLINK_FOLLOW),
		root.Link(dir+"file", dir+"linked"),
	); err != nil {
		t.Errorf("in %q: %v", dir, err)
	}
}

// Attributes are the view's wherever they go out: also by statx, of a listing, of what
// has no name any more.
func TestGroupViewAttributes(t *testing.T) {
	m := mount(t, room)
	must(t, os.Mkdir(filepath.Join(m.dir, "d"), 0o755))
	m.create(t, "d/f", nil)
	m.create(t, "open", nil)
	m.create(t, "old", nil)
	m.create(t, "new", nil)
	must(t, os.Mkdir(filepath.Join(m.dir, "gone"), 0o700))
	must(t, os.Symlink("f", filepath.Join(m.dir, "d", "link")))
	open := openFile(t, filepath.Join(m.dir, "open"), unix.O_RDONLY)
	defer unix.Close(open)
	replaced := openFile(t, filepath.Join(m.dir, "old"), unix.O_RDONLY)
	defer unix.Close(replaced)
	gone := openFile(t, filepath.Join(m.dir, "gone"), unix.O_RDONLY)
	defer unix.Close(gone)
	must(t, os.Remove(filepath.Join(m.dir, "open")))
	must(t, os.Remove(filepath.Join(m.dir, "gone")))
	must(t, os.Rename(filepath.Join(m.dir, "new"), filepath.Join(m.dir, "old")))
	m.setGroup(t, group)
	for fd, want := range map[int]uint32{open: 0o664, replaced: 0o664, gone: 0o770} {
		var st unix.Stat_t
		must(t, unix.Fstat(fd, &st))
		if st.Gid != group || st.Mode&0o7777 != want || fd != gone && st.Nlink != 0 {
			t.Errorf("%d: group %d mode %o links %d", fd, st.Gid, st.Mode, st.Nlink)
		}
	}
	for name, want := range map[string]uint16{"": 0o775, "d": 0o775, "d/f": 0o664, "d/link": 0o777, "old": 0o664} {
		var stx unix.Statx_t
		must(t, unix.Statx(unix.AT_FDCWD, filepath.Join(m.dir, name), unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &stx))
		if stx.Gid != group || stx.Mode&0o7777 != want || stx.Mask&unix.STATX_BTIME == 0 {
			t.Errorf("statx of %q: group %d mode %o, want %o", name, stx.Gid, stx.Mode&0o7777, want)
		}
	}
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0))
	before := m.conn.Counts()
	entries, err := os.ReadDir(filepath.Join(m.dir, "d"))
	must(t, err)
	for _, e := range entries {
		info, err := e.Info()
		must(t, err)
		if gid := info.Sys().(*syscall.Stat_t).Gid; gid != group {
			t.Errorf("%s in the listing: group %d", e.Name(), gid)
		}
	}
	if after := m.conn.Counts(); after["READDIRPLUS"] == before["READDIRPLUS"] {
		t.Errorf("no READDIRPLUS: %v", after)
	}
}

// What is changed of a foreign file makes it the group's on the disk.
func TestGroupViewChanges(t *testing.T) {
	m := mount(t, room)
	path := func(name string) string { return filepath.Join(m.dir, name) }
	for _, name := range []string{"mode", "owner", "both", "group", "acl", "times", "size"} {
		m.create(t, name, []byte("x"))
		must(t, os.Chmod(path(name), 0o600))
	}
	must(t, os.Mkdir(path("dir"), 0o700))
	must(t, os.Symlink("x", path("link")))
	m.setGroup(t, group)
	must(t, os.Chmod(path("mode"), 0o600))
	m.shows(t, "mode", group, 0o600, group, 0o600)
	must(t, os.Chmod(path("dir"), 0o700))
	m.shows(t, "dir", group, 0o700, group, 0o700)
	must(t, os.Chown(path("owner"), tenant, -1))
	m.shows(t, "owner", group, 0o660, group, 0o660)
	must(t, os.Lchown(path("link"), tenant, -1))
	m.shows(t, "link", group, 0o777, group, 0o777)
	must(t, os.Chown(path("both"), tenant, group))
	m.shows(t, "both", group, 0o660, group, 0o660)
	must(t, os.Chmod(path("mode"), 0o400))
	must(t, os.Chown(path("mode"), -1, ownGroup))
	m.shows(t, "mode", group, 0o660, ownGroup, 0o400)
	must(t, os.Chown(path("group"), -1, ownGroup))
	m.shows(t, "group", group, 0o660, ownGroup, 0o660)
	must(t, os.Truncate(path("size"), 0))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path("times"), []unix.Timespec{{}, {}}, 0))
	m.shows(t, "size", group, 0o660, 0, 0o600)
	m.shows(t, "times", group, 0o660, 0, 0o600)
	// An ACL that is no more than a mode: user::rw-, group::---, other::---
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 0, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255}
	must(t, unix.Setxattr(path("acl"), "system.posix_acl_access", acl, 0))
	m.shows(t, "acl", group, 0o600, group, 0o600)
	if err := m.fs.SetGroup("v", new(^uint32(0))); !errors.Is(err, unix.EINVAL) {
		t.Errorf("no group: %v", err)
	}
	if err := m.fs.SetGroup("w", nil); !errors.Is(err, fs.ErrNoVolume) {
		t.Errorf("no volume: %v", err)
	}
}

// Nobody gets a set-gid program of the group who is not in it.
func TestGroupViewGivesNoSetgid(t *testing.T) {
	m := mount(t, room)
	m.create(t, "before", nil)
	must(t, os.Chown(filepath.Join(m.dir, "before"), outsider, outsider))
	must(t, os.Chmod(filepath.Join(m.dir, "before"), 0o755|os.ModeSetgid))
	m.create(t, "lock", nil)
	must(t, os.Chown(filepath.Join(m.dir, "lock"), outsider, outsider))
	must(t, os.Chmod(filepath.Join(m.dir, "lock"), 0o744|os.ModeSetgid))
	must(t, os.Chmod(m.dir, 0o777))
	m.setGroup(t, group)
	must(t, os.Chmod(m.dir, 0o777))
	m.shows(t, "before", group, 0o775, outsider, 0o2755)
	m.shows(t, "lock", group, 0o774, outsider, 0o2744)
	as(t, m.dir, outsider, outsider, nil, func(root *os.Root, dirfd int) {
		for name, mode := range map[string]uint32{"a": 0o2755, "b": 0o2744} {
			fd, err := unix.Openat(dirfd, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, mode)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(fd)
			if name == "b" { // it is foreign again, and widened by the view
				if err := unix.Fchown(fd, -1, outsider); err != nil {
					t.Error(err)
				}
			} else if err := unix.Fchmod(fd, 0o2755); err != nil { // it may, and the bit is lost
				t.Error(err)
			}
		}
		if err := unix.Mknodat(dirfd, "c", unix.S_IFREG|0o2755, 0); err != nil {
			t.Error(err)
		}
		for _, name := range []string{"before", "lock"} {
			if err := root.Chmod(name, 0o755|os.ModeSetgid); err != nil {
				t.Error(err)
			}
		}
	})
	as(t, m.dir, tenant, group, nil, func(_ *os.Root, dirfd int) {
		fd, err := unix.Openat(dirfd, "members", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o2755)
		if err != nil {
			t.Error(err)
			return
		}
		unix.Close(fd)
	})
	m.shows(t, "a", group, 0o755, group, 0o755)
	m.shows(t, "b", group, 0o774, outsider, 0o744)
	m.shows(t, "c", group, 0o755, group, 0o755)
	m.shows(t, "before", group, 0o755, group, 0o755)
	m.shows(t, "lock", group, 0o755, group, 0o755)
	m.shows(t, "members", group, 0o2755, group, 0o2755)
}

// Whoever asks after SetGroup has returned is told of the new view, whatever was
// being asked meanwhile.
func TestGroupViewWhileUsed(t *testing.T) {
	m := mount(t, room)
	names := m.makeTree(t)
	var stop atomic.Bool
	var users sync.WaitGroup
	for user := range 3 {
		users.Go(func() {
			for i := 0; !stop.Load(); i++ {
				path := filepath.Join(m.dir, names[i*7%len(names)])
				var st unix.Stat_t
				if err := errors.Join(unix.Lstat(path, &st), unix.Lchown(path, -1, -1)); err != nil {
					t.Error(err)
					return
				}
				made := filepath.Join(m.dir, fmt.Sprint("made", user, i))
				if err := errors.Join(os.WriteFile(made, nil, 0o600), unix.Lstat(made, &st), os.Remove(made)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wrong := 0
	for round := range 30 {
		want := uint32(group + round%2)
		m.setGroup(t, int(want))
		for _, name := range names {
			if st := lstat(t, filepath.Join(m.dir, name)); st.Gid != want {
				wrong++
			}
		}
	}
	stop.Store(true)
	users.Wait()
	// Answers that nobody had taken yet are the exception, and are corrected.
	if wrong > 30 {
		t.Errorf("%d times the view before", wrong)
	}
	t.Logf("%d of %d were told of the view before", wrong, 30*len(names))
	eventually(t, "the last view of all", func() bool {
		for _, name := range names {
			if lstat(t, filepath.Join(m.dir, name)).Gid != group+1 {
				return false
			}
		}
		return true
	})
}

// The next daemon is given the view, and finds out when it is another one.
func TestGroupViewIsKept(t *testing.T) {
	region, err := state.New("", "", 0)
	must(t, err)
	defer region.Close()
	pool, tree := t.TempDir(), t.TempDir()
	open := func(path string) *os.File {
		f, err := os.Open(path)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	const on, stale = 1 << 32, 1 << 33
	g := uint32(group)
	for i, step := range []struct {
		group *uint32
		want  uint64
	}{{nil, 0}, {nil, 0}, {&g, on | stale | group}, {&g, on | stale | group}, {nil, stale}} {
		f, err := fs.New(fs.Options{PoolDir: open(pool), Rule: quota.Rule{Block: 4096}, State: region})
		must(t, err)
		ledger := quota.NewLedger(room, quota.Usage{})
		must(t, f.AddVolume(fs.VolumeConfig{ID: "v", Root: fs.Dir{At: open(tree)}, Orphans: fs.Dir{At: open(pool)}, Ledger: ledger, Group: step.group}))
		region.Volumes(func(_ uint32, v *state.Volume) {
			if got := v.View.Load(); got != step.want {
				t.Errorf("daemon %d: view %x, want %x", i, got, step.want)
			}
		})
	}
}
