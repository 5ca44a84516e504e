package fs_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/quota"
)

// mounted is one volume served from a temporary directory.
type mounted struct {
	fs     *fs.FS
	dir    string // the volume in the mount
	tree   string // the same on the backing filesystem
	ledger *quota.Ledger
	conn   *transport.Conn

	rule    quota.Rule
	orphans string
}

// mount serves one volume and checks at the end of the test that the ledger
// agrees with the disk.
func mount(t *testing.T, limit quota.Usage) *mounted { return mountTier(t, limit, fs.TierRead) }

func mountTier(t *testing.T, limit quota.Usage, tier fs.Tier) *mounted {
	t.Helper()
	return mountGroup(t, limit, tier, nil)
}

// mountGroup serves the volume as the group's from the start, unless that is nil.
func mountGroup(t *testing.T, limit quota.Usage, tier fs.Tier, group *uint32) *mounted {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root, with /dev/fuse")
	}
	pool := t.TempDir()
	m := &mounted{tree: filepath.Join(pool, "volumes", "v"), ledger: quota.NewLedger(limit, quota.Usage{})}
	orphans := filepath.Join(pool, "orphans", "v")
	mnt := filepath.Join(t.TempDir(), "mnt")
	for _, dir := range []string{m.tree, orphans, mnt} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	open := func(path string) *os.File {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	rule, err := quota.RuleFor(int(open(pool).Fd()))
	if err != nil {
		t.Fatal(err)
	}
	m.rule, m.orphans = rule, orphans
	if m.fs, err = fs.New(fs.Options{PoolDir: open(pool), Rule: rule}); err != nil {
		t.Fatal(err)
	}
	if err := m.fs.AddVolume(fs.VolumeConfig{ID: "v", Root: fs.Dir{At: open(m.tree)}, Orphans: fs.Dir{At: open(orphans)}, Ledger: m.ledger, Group: group}); err != nil {
		t.Fatal(err)
	}
	conn, err := transport.Mount(m.fs, transport.Options{Mountpoint: mnt})
	if err != nil {
		t.Fatal(err)
	}
	m.conn = conn
	if err := m.fs.Attach(conn, tier, 0); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- conn.Serve() }()
	if err := conn.DisablePoll(); err != nil { // this process uses its own mount
		t.Error(err)
	}
	t.Cleanup(func() {
		m.check(t)
		if err := conn.Unmount(false); err != nil {
			t.Errorf("unmount: %v", err)
			_ = conn.Unmount(true)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if err := m.fs.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	m.dir = filepath.Join(mnt, "v")
	return m
}

// check recounts the disk against the ledger.
func (m *mounted) check(t *testing.T) {
	t.Helper()
	err := m.fs.Quiesce("v", func(disk quota.Usage) error {
		for _, path := range []string{m.tree, m.orphans} {
			dir, err := os.Open(path)
			if err != nil {
				return err
			}
			defer dir.Close()
			found, err := quota.Scan(context.Background(), dir, quota.ScanOptions{Rule: m.rule})
			if err != nil {
				return err
			}
			disk.Bytes += found.Usage.Bytes
			disk.Inodes += found.Usage.Inodes
		}
		if used := m.ledger.Used(); used != disk {
			t.Errorf("ledger %+v, disk %+v", used, disk)
		}
		if reserved := m.ledger.Reserved(); reserved != (quota.Usage{}) {
			t.Errorf("reserved %+v while nothing is under way", reserved)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestPosix(t *testing.T) {
	for name, test := range posixtest.All {
		if name == "FcntlFlockLocksFile" {
			// It wants two POSIX locks of one process to conflict, which POSIX
			// says they do not; go-fuse's own run leaves it out as well.
			continue
		}
		t.Run(name, func(t *testing.T) {
			test(t, mount(t, quota.Usage{Bytes: 1 << 40, Inodes: 1 << 20}).dir)
		})
	}
}

// TestSmallFileWithHiddenBlock covers the case in which st_blocks of a sparse
// file equals its size because of a block of attributes.
func TestSmallFileWithHiddenBlock(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 64 << 10, Inodes: 64})
	path := filepath.Join(m.dir, "f")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(path, "user.big", make([]byte, 3000), 0); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{4096, 8192, 100, 16384, 20 << 10, 4096, 0, 8192} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		if used := m.ledger.Used(); used.Bytes > 64<<10 {
			t.Fatalf("used %d at size %d", used.Bytes, size)
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 12<<10); err != nil {
		t.Fatal(err)
	}
}
