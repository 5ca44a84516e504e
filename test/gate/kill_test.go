package gate_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// hammer appends to the file args[0] from args[1] threads, by a descriptor each, until its
// standard input ends. ENOSPC does not end it, and other errors end the thread.
func hammer(args []string) int {
	threads, err := strconv.Atoi(args[1])
	if err != nil {
		return 2
	}
	var over atomic.Bool
	var wg sync.WaitGroup
	for range threads {
		f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		wg.Go(func() {
			buf := make([]byte, 64*kit.Ki)
			for !over.Load() {
				if _, err := unix.Write(int(f.Fd()), buf); err != nil && err != unix.ENOSPC {
					fmt.Fprintln(os.Stderr, err)
					return
				}
			}
		})
	}
	fmt.Println("hammers")
	_, _ = io.Copy(io.Discard, os.Stdin)
	over.Store(true)
	wg.Wait()
	return 0
}

// TestKill kills the daemon while system calls are held.
func TestKill(t *testing.T) {
	const limit = 256 * kit.Mi
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, 3*kit.Gi)
		dir := p.Create("v", limit)
		for round := range 3 {
			before := heldTotal(t, p)
			// They fill it: what is opened in a full volume is not passed through.
			var hammers []*kit.Running
			for i := range 4 {
				h := kit.Process{Helper: "hammer", Args: []string{fmt.Sprint(dir, "/h", i), "4"}}.Start(t)
				h.Line()
				hammers = append(hammers, h)
			}
			kit.Poll(t, "held system calls", func() bool { return heldTotal(t, p) > before+100 })
			p.Daemon().Kill()
			// What is open stays passed through, so that they go on, unless the kernel ends it.
			for i, h := range hammers {
				kit.Within(t, fmt.Sprint("the end of writer ", i), func() {
					if code := h.Wait(); code != 0 {
						t.Errorf("writer %d ended with %d", i, code)
					}
				})
			}
			t.Logf("round %d: %d bytes above the limit after the kill", round, int64(onDisk(t, p, "v"))-limit)
			p.Mount()
			kit.Poll(t, "the recount", func() bool { return p.Show("v").State != "recounting" })
			p.Check()
			if t.Failed() {
				return
			}
			for _, name := range []string{"h0", "h1", "h2", "h3"} {
				if err := os.Remove(p.Path("v", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Error(err)
				}
			}
		}
	})
}
