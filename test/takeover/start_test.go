package takeover_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

var (
	inodes  = flag.Int("inodes", 20_000, "how many inodes the kernel knows when the daemon is killed")
	volumes = flag.Int("volumes", 100, "how many volumes there are then")
)

// TestStart measures how long the first answer takes after a kill, with many inodes known and
// many volumes.
func TestStart(t *testing.T) {
	p := kit.NewPoolIn(t, kit.Backing(t, "ext4", 8*kit.Gi))
	p.Keeper = "auto"
	p.Mount()
	var made sync.WaitGroup
	names := make(chan string)
	for range 4 {
		made.Go(func() {
			for name := range names {
				if err := p.Command("volume", "create", "--pool", p.Dir, "--size", "1Gi", "--inodes", strconv.Itoa(*inodes+100), name).Run(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range *volumes {
		names <- fmt.Sprint("v", i)
	}
	close(names)
	made.Wait()
	// Each in use, so that there is something to know of it.
	var held []*os.File
	for i := range *volumes {
		f, err := os.OpenFile(p.Path(fmt.Sprint("v", i), "open"), os.O_CREATE|os.O_RDWR, 0o600)
		kit.OK(t, err)
		t.Cleanup(func() { f.Close() })
		_, err = f.WriteString("x")
		kit.OK(t, err)
		held = append(held, f)
	}
	dir := p.Path("v0", "d")
	kit.OK(t, os.Mkdir(dir, 0o755))
	for i := range *inodes {
		kit.OK(t, unix.Mknod(filepath.Join(dir, strconv.Itoa(i)), unix.S_IFREG|0o600, 0))
	}
	var took []time.Duration
	for i := range 7 {
		kit.OK(t, syscall.Kill(p.Serving(), syscall.SIGKILL))
		began := time.Now()
		kit.OK(t, os.Mkdir(filepath.Join(dir, fmt.Sprint("answer", i)), 0o700))
		took = append(took, time.Since(began).Round(time.Millisecond))
		time.Sleep(4 * healthy)
	}
	slices.Sort(took)
	t.Logf("%d volumes, %d inodes: from the kill to the first answer %v, median %s", *volumes, *inodes, took, took[len(took)/2])
	for line := range strings.Lines(p.Log()) {
		if strings.Contains(line, "taken over") {
			t.Log(line[strings.LastIndex(line, "took"):])
		}
	}
	for _, f := range held {
		kit.OK(t, f.Close())
	}
	p.Check()
}
