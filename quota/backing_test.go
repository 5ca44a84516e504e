package quota

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// backings are the filesystems that a pool may be on: the one of the temporary
// directory, and one image of each kind.
var backings = []struct{ name, mkfs string }{
	{"tempdir", ""},
	{"ext4", "mkfs.ext4 -q -F -E nodiscard"},
	{"xfs", "mkfs.xfs -q -f -K"},
	{"btrfs", "mkfs.btrfs -q -f -K"},
}

// onBackings runs a test in an empty directory of each.
func onBackings(t *testing.T, test func(t *testing.T, dir string)) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts filesystems and reads trusted attributes: run it as root")
	}
	for _, b := range backings {
		t.Run(b.name, func(t *testing.T) {
			dir := t.TempDir()
			if b.mkfs != "" {
				mountImage(t, 512<<20, b.mkfs, dir)
			}
			test(t, dir)
		})
	}
}

// mountImage mounts a sparse image of that many bytes on dir, without discard: with it the
// disk below stalls.
func mountImage(t testing.TB, size int64, mkfs, dir string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, command := range []string{mkfs + " " + image, fmt.Sprintf("mount -o loop,nodiscard %s %s", image, dir)} {
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v: has the test left a descriptor open?", dir, err)
		}
	})
}
