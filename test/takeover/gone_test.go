package takeover_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestKeeperGone kills both, the keeper and the daemon: the mount is dead, and the next command mounts
// anew in its place.
func TestKeeperGone(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Keeper = "auto"
	p.Mount()
	dir := p.Create("v", kit.Gi)
	f, err := os.Create(filepath.Join(dir, "f"))
	kit.OK(t, err)
	defer f.Close()
	daemon := p.Serving()
	p.Daemon().Kill()
	// The daemon alone goes on.
	kit.OK(t, os.Mkdir(filepath.Join(dir, "alone"), 0o700))
	kit.OK(t, syscall.Kill(daemon, syscall.SIGKILL))
	kit.Poll(t, "the mount's death", func() bool {
		err := os.Mkdir(filepath.Join(dir, "dead"), 0o700)
		return errors.Is(err, unix.ENOTCONN)
	})
	p.Mount()
	kit.OK(t, os.Mkdir(filepath.Join(dir, "anew"), 0o700))
	if _, err := os.Stat(filepath.Join(dir, "alone")); err != nil {
		t.Error(err)
	}
	kit.OK(t, f.Close())
	p.Check()
}
