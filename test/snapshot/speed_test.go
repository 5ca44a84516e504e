package snapshot_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestSpeed prints how long a clone of a volume of many files takes beside `cp -a --reflink=auto` of its tree: 20,000,
// or $CROFT_SPEED_FILES.
func TestSpeed(t *testing.T) {
	files := 20_000
	if n, err := strconv.Atoi(os.Getenv("CROFT_SPEED_FILES")); err == nil {
		files = n
	} else if testing.Short() {
		files = 2_000
	}
	const perDir = 500
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := kit.NewPoolIn(t, kit.Backing(t, fstype, 12*kit.Gi))
		p.Mount()
		dir := p.Create("v", 2*kit.Gi, "--inodes", "200000")
		for i := range files {
			if i%perDir == 0 {
				kit.OK(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(i/perDir)), 0o755))
			}
			kit.OK(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i/perDir), fmt.Sprint(i)), []byte("some of the file's data"), 0o644))
		}
		p.Idle()
		backing, err := os.Open(p.Backing)
		kit.OK(t, err)
		defer backing.Close()
		measure := func(work func()) time.Duration {
			kit.OK(t, unix.Syncfs(int(backing.Fd())))
			begun := time.Now()
			work()
			kit.OK(t, unix.Syncfs(int(backing.Fd())))
			return time.Since(begun)
		}
		var cp, clone time.Duration
		for round := range 2 { // the second time, everything is in caches for both
			cp = measure(func() {
				kit.Must(t, "cp", "-a", "--reflink=auto", p.Tree("v"), filepath.Join(p.Backing, fmt.Sprint("copy", round)))
			})
			clone = measure(func() { p.MustVolume("clone", "v", fmt.Sprint("clone", round)) })
			if used, want := p.Used(fmt.Sprint("clone", round)), p.Used("v"); used != want {
				t.Errorf("the clone uses %v, the volume %v", used, want)
			}
		}
		t.Logf("%s, %d files: cp -a --reflink=auto %.2f s, croft volume clone %.2f s: %.2f times as fast; writers held for %v",
			fstype, files, cp.Seconds(), clone.Seconds(), cp.Seconds()/clone.Seconds(), p.Show("clone1").Source.Held)
	})
}
