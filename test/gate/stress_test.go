package gate_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/croftfs/croft/test/kit"
)

var stress = flag.Duration("stress", 20*time.Second, "how long stress-ng runs")

// TestStress runs stress-ng's filesystem class in a nearly full volume: it ends, and the
// volume is within its limit.
func TestStress(t *testing.T) {
	kit.Need(t, "stress-ng")
	const limit = 256 * kit.Mi
	p := mount(t, "ext4", 3*kit.Gi)
	dir := p.Create("v", limit)
	rest := open(t, os.O_CREATE|os.O_WRONLY, dir, "rest")
	_, err := rest.Write(make([]byte, limit-80*kit.Mi))
	kit.OK(t, err)
	kit.OK(t, os.Mkdir(dir+"/s", 0o777))
	// Those that are left out are about other filesystems than the one they are in, or
	// keep this mount in use from namespaces of their own.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		out, err := exec.Command("stress-ng", "--class", "filesystem", "--all", "1", "--timeout", fmt.Sprint(int(stress.Seconds())),
			"--temp-path", dir+"/s", "--exclude", "binderfs,bind-mount,procfs,sysfs,fanotify,umount", "--hdd-bytes", "64m", "--iomix-bytes", "32m",
			"--no-rand-seed", "--quiet").CombinedOutput()
		t.Logf("stress-ng: %v: %s", err, out) // some find themselves refused
	}()
	select {
	case <-ended:
	case <-time.After(*stress + kit.Backstop):
		t.Fatal("stress-ng is stuck")
	}
	if p.Show("v").Gatings == 0 {
		t.Error("the volume was never gated")
	}
	rest.Close()
	removeAll(t, dir)
	p.Idle()
	p.Check()
	noneImmutable(t, p)
}
