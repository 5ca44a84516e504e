// Package posix_test holds a volume to what POSIX and Linux say of a filesystem.
package posix_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) {
	kit.Main(m, map[string]kit.Helper{"append": appendLines, "lock": lock, "acl": aclAccess, "umask": makeWithUmask, "writeonce": writeOnce, "opener": opener})
}

// TestSuite runs go-fuse's posixtest through the daemon.
func TestSuite(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) { suite(t, kit.NewPool(t, fstype)) })
	t.Run("one processor", func(t *testing.T) { suite(t, kit.NewPool(t, "ext4"), "GOMAXPROCS=1") })
	t.Run("tier daemon", func(t *testing.T) {
		p := kit.NewPool(t, "ext4")
		p.MountArgs = []string{"--tier", "daemon"}
		suite(t, p)
	})
}

func suite(t *testing.T, p *kit.Pool, env ...string) {
	p.Mount(env...)
	for name, test := range posixtest.All {
		t.Run(name, func(t *testing.T) {
			if name == "FcntlFlockLocksFile" {
				t.Skip("it wants two POSIX locks of one process to conflict, which POSIX says they do not; go-fuse's own run leaves it out as well")
			}
			volume := strings.ToLower(name)
			// FileLarge and others make sparse files of any size: the limit is theirs too.
			dir := p.Create(volume, 1<<40)
			test(t, dir)
			p.MustVolume("delete", "--force", volume)
		})
	}
}

// each runs a test in a volume of its own on each backing filesystem, in each tier.
func each(t *testing.T, test func(t *testing.T, dir string)) {
	t.Helper()
	eachTier(t, func(t *testing.T, _ *kit.Pool, dir string) { test(t, dir) })
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	kit.OK(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func write(t *testing.T, path, content string) {
	t.Helper()
	kit.OK(t, os.WriteFile(path, []byte(content), 0o644))
}

func expect(t *testing.T, path, content string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != content {
		t.Errorf("%s: %q, %v, want %q", filepath.Base(path), got, err, content)
	}
}

// appendLines appends args[1] lines, named args[2], to the file args[0], each
// with one write.
func appendLines(args []string) int {
	f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer f.Close()
	n, _ := strconv.Atoi(args[1])
	for i := range n {
		if _, err := fmt.Fprintf(f, "%s %d %s\n", args[2], i, strings.Repeat("x", i%300)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 0
}

// lock takes a lock on the file args[1] of the kind args[0], says so, and keeps
// it until its standard input ends. With args[2] it only tries.
func lock(args []string) int {
	f, err := os.OpenFile(args[1], os.O_RDWR, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer f.Close()
	switch args[0] {
	case "flock":
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	case "posix":
		err = unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10})
	case "ofd":
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10})
	}
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		fmt.Println("refused")
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("locked")
	if len(args) > 2 {
		return 0
	}
	bufio.NewScanner(os.Stdin).Scan()
	return 0
}
