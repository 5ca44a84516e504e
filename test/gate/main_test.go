// Package gate_test shows that a volume's limit is exact though the kernel writes
// its files by itself, and that nobody is left waiting for the gate.
package gate_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/test/kit"
)

const block = quota.MinBlock

func TestMain(m *testing.M) {
	kit.Main(m, map[string]kit.Helper{"spin": spin, "hammer": hammer, "store": store, "insist": insist, "slow": slow})
}

// spin keeps a processor busy until its standard input ends, or for a minute.
func spin([]string) int {
	var over atomic.Bool
	time.AfterFunc(time.Minute, func() { over.Store(true) })
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		over.Store(true)
	}()
	fmt.Println("spins")
	for !over.Load() {
	}
	return 0
}

// mount makes a pool in a backing filesystem of that size, and mounts it.
func mount(t *testing.T, fstype string, size int64) *kit.Pool {
	t.Helper()
	p := kit.NewPoolIn(t, kit.Backing(t, fstype, size))
	p.MountArgs = []string{"--tier", "gate"}
	p.Mount()
	return p
}

// heldTotal is how many system calls the gate has held so far.
func heldTotal(t *testing.T, p *kit.Pool) uint64 {
	t.Helper()
	return uint64(measured(t, p, "croft_held_calls_total{"))
}

// cpuTime is the processor time that the daemon has had so far.
func cpuTime(t *testing.T, p *kit.Pool) time.Duration {
	t.Helper()
	return time.Duration(measured(t, p, "process_cpu_seconds_total ") * float64(time.Second))
}

// measured is the first of the daemon's metrics whose line begins so.
func measured(t *testing.T, p *kit.Pool, prefix string) float64 {
	t.Helper()
	client := p.Control()
	defer client.CloseIdleConnections()
	r, err := client.Get("http://croft/metrics")
	kit.OK(t, err)
	body, err := io.ReadAll(r.Body)
	kit.OK(t, errors.Join(err, r.Body.Close()))
	for line := range strings.Lines(string(body)) {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		fields := strings.Fields(line)
		f, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		kit.OK(t, err)
		return f
	}
	t.Fatalf("no metric %s:\n%s", prefix, body)
	return 0
}

// wasGated fails the test when the volume never was, or nothing was held since before.
func wasGated(t *testing.T, p *kit.Pool, volume string, before uint64) {
	t.Helper()
	if v := p.Show(volume); v.Gatings == 0 {
		t.Errorf("the volume was never gated")
	}
	if heldTotal(t, p) == before {
		t.Errorf("no system call was held")
	}
}

// together runs fn in n goroutines and fails the test when one fails, or hangs.
func together(t *testing.T, n int, fn func(i int) error) {
	t.Helper()
	errs := make([]error, n)
	kit.Within(t, fmt.Sprint(n, " writers"), func() {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { errs[i] = fn(i) })
		}
		wg.Wait()
	})
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// watcher counts what a volume holds, on the backing filesystem, as often as it
// can. It is meant for files that only grow: what it counts then is never more than
// there is when it has ended.
type watcher struct {
	stop, done chan struct{}
	peak       uint64
	counts     int
	err        error
}

func scan(dir string) (uint64, error) {
	d, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	rule, err := quota.RuleFor(int(d.Fd()))
	if err != nil {
		return 0, err
	}
	r, err := quota.Scan(context.Background(), d, quota.ScanOptions{Rule: rule, Workers: 1})
	return r.Bytes, err
}

func watch(dir string) *watcher {
	w := &watcher{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for last := false; ; {
			used, err := scan(dir)
			if err != nil {
				w.err = err
				return
			}
			w.peak = max(w.peak, used)
			w.counts++
			if last {
				return
			}
			select {
			case <-w.stop:
				last = true
			default:
			}
		}
	}()
	return w
}

// end ends the watch after one more count. The test fails when there was more than the limit.
func (w *watcher) end(t *testing.T, limit uint64) {
	t.Helper()
	close(w.stop)
	<-w.done
	if w.err != nil {
		t.Errorf("watcher: %v", w.err)
	}
	if w.peak > limit {
		t.Errorf("the volume held %d bytes, %d above its limit", w.peak, w.peak-limit)
	}
}

// onDisk is what a volume holds on the backing filesystem.
func onDisk(t *testing.T, p *kit.Pool, volume string) uint64 {
	t.Helper()
	used, err := scan(p.Tree(volume))
	kit.OK(t, err)
	return used
}

// buffer returns memory that O_DIRECT takes.
func buffer(t *testing.T, size int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	kit.OK(t, err)
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	return mem
}

func open(t *testing.T, flags int, elem ...string) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(elem...), flags, 0o644)
	kit.OK(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// fillUp appends to a file until not even a block fits.
func fillUp(t *testing.T, elem ...string) {
	t.Helper()
	f := open(t, os.O_CREATE|os.O_WRONLY|os.O_APPEND, elem...)
	defer f.Close()
	buf := buffer(t, kit.Mi)
	kit.Within(t, "filling up", func() {
		for n := len(buf); n >= block; {
			_, err := unix.Write(int(f.Fd()), buf[:n])
			switch {
			case err == unix.ENOSPC:
				n /= 2
			case err != nil:
				t.Errorf("filling up: %v", err)
				return
			}
		}
	})
}

// sizes returns lengths of writes from 4 KiB to 1 MiB, in blocks.
func sizes(seed int) func() int {
	random := rand.New(rand.NewPCG(uint64(seed), 5))
	return func() int { return block << random.IntN(9) }
}

// removeAll empties a volume.
func removeAll(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	kit.OK(t, err)
	for _, e := range entries {
		kit.OK(t, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
}
