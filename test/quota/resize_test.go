package quota_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/test/kit"
)

// TestGrowUnderWriter resizes a volume up while a writer has just been refused.
func TestGrowUnderWriter(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		dir := p.Create("v", 16*kit.Mi)
		f, err := os.Create(filepath.Join(dir, "f"))
		kit.OK(t, err)
		defer f.Close()
		const target = 48 * kit.Mi
		refused, ended := make(chan int64), make(chan error, 1)
		go func() {
			var size, told int64
			for size < target {
				n, err := unix.Write(int(f.Fd()), make([]byte, 100_000))
				size += int64(max(n, 0))
				switch {
				case err == nil:
				case !errors.Is(err, unix.ENOSPC):
					ended <- err
					return
				case size > told:
					told = size
					refused <- size
				default:
					runtime.Gosched() // keeps knocking until there is room
				}
			}
			ended <- nil
		}()
		for _, next := range []uint64{24 * kit.Mi, 32*kit.Mi + block, target + kit.Mi} {
			before := p.Show("v").Limit.Bytes
			size := <-refused
			short := before - uint64(size)
			if short > 0 && (p.Tier != "hold" || short > 100_000+block) { // a write is allowed whole or not at all
				t.Errorf("refused at %d, the limit is %d", size, before)
			}
			if r := p.Resize("v", next); r.Code != 0 {
				t.Fatalf("resize: %s", r)
			}
		}
		kit.OK(t, <-ended)
		exact(t, p, "v")
	})
}

// TestShrink lowers a limit to what is in use, and not below.
func TestShrink(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := kit.NewPool(t, fstype)
		for _, mounted := range []bool{true, false} {
			t.Run(fmt.Sprintf("mounted %v", mounted), func(t *testing.T) {
				if p.Daemon() == nil {
					p.Mount()
					dir := p.Create("v", limit)
					kit.OK(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 5*kit.Mi+1), 0o644))
				} else {
					if r := p.Resize("v", limit); r.Code != 0 {
						t.Fatalf("resize: %s", r)
					}
					p.Stop()
				}
				used := p.Used("v").Bytes
				if used != 5*kit.Mi+block {
					t.Fatalf("used %d", used)
				}
				r := p.Resize("v", used-block)
				if r.Code == 0 {
					t.Fatal("it was shrunk below what is in use")
				}
				if !hasFigure(r.Stderr, used) {
					t.Errorf("the refusal does not say that %d bytes are in use: %s", used, r.Stderr)
				}
				if v := p.Show("v"); v.Limit.Bytes != limit {
					t.Errorf("the refused resize has changed the limit to %d", v.Limit.Bytes)
				}
				if r := p.Resize("v", used); r.Code != 0 {
					t.Fatalf("shrinking to what is in use: %s", r)
				}
				if v := p.Show("v"); v.Limit.Bytes != used {
					t.Errorf("limit %d", v.Limit.Bytes)
				}
				if mounted {
					kit.IsErr(t, "a write after that", os.WriteFile(p.Path("v", "g"), make([]byte, 1), 0o644), unix.ENOSPC)
					kit.OK(t, os.Remove(p.Path("v", "g")))
				}
				exact(t, p, "v")
			})
		}
	})
}

// hasFigure tells whether a message names a number of bytes, plain or as
// Kubernetes writes it.
func hasFigure(message string, bytes uint64) bool {
	for _, figure := range []string{fmt.Sprint(bytes), fmt.Sprintf("%dKi", bytes/kit.Ki), fmt.Sprintf("%.1f", float64(bytes)/kit.Mi)} {
		if strings.Contains(message, figure) {
			return true
		}
	}
	return false
}

// TestShrinkRace lowers and raises the limit while writers fill and empty the
// volume: the use is never above the limit that was acknowledged.
func TestShrinkRace(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	dir := p.Create("v", 32*kit.Mi)
	stop, done := make(chan struct{}), make(chan error, 4)
	for i := range 4 {
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				path := filepath.Join(dir, fmt.Sprint("f", i))
				err := os.WriteFile(path, make([]byte, 6*kit.Mi), 0o644)
				if err != nil && !errors.Is(err, unix.ENOSPC) {
					done <- err
					return
				}
				if err := os.Remove(path); err != nil {
					done <- err
					return
				}
			}
		}()
	}
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	var lowered int
	for i := range rounds {
		size := uint64(kit.Mi * (1 + (i*7)%32))
		r := p.Resize("v", size)
		v := p.Show("v")
		if v.Used.Bytes > v.Limit.Bytes {
			t.Errorf("used %d of %d", v.Used.Bytes, v.Limit.Bytes)
		}
		if r.Code == 0 {
			lowered++
			if v.Limit.Bytes != size {
				t.Errorf("limit %d after it was set to %d", v.Limit.Bytes, size)
			}
		}
	}
	close(stop)
	for range 4 {
		kit.OK(t, <-done)
	}
	t.Logf("%d of %d resizes were possible", lowered, rounds)
	exact(t, p, "v")
}

// TestStatfs compares what df shows with the volume's own figures.
func TestStatfs(t *testing.T) {
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		dir := p.Create("v", limit, "--inodes", "1234")
		figures := func(path string) (size, used, avail, files, free uint64) {
			st := kit.Statfs(t, path)
			b := uint64(st.Bsize)
			return st.Blocks * b, (st.Blocks - st.Bfree) * b, st.Bavail * b, st.Files, st.Ffree
		}
		expect := func(path string, want quota.Usage, usedBytes, usedInodes uint64) {
			t.Helper()
			size, used, avail, files, free := figures(path)
			if size != want.Bytes || used != usedBytes || avail != want.Bytes-usedBytes || files != want.Inodes || free != want.Inodes-usedInodes {
				t.Errorf("df of %s: size %d, used %d, available %d, inodes %d, free %d", path, size, used, avail, files, free)
			}
		}
		whole := quota.Usage{Bytes: limit, Inodes: 1234}
		expect(dir, whole, 0, 0)
		kit.OK(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 10*kit.Mi+5), 0o644))
		kit.OK(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		for _, path := range []string{dir, filepath.Join(dir, "f"), filepath.Join(dir, "d")} {
			expect(path, whole, 10*kit.Mi+2*block, 2)
		}
		if r := p.Resize("v", 2*limit); r.Code != 0 {
			t.Fatalf("resize: %s", r)
		}
		expect(dir, quota.Usage{Bytes: 2 * limit, Inodes: 1234}, 10*kit.Mi+2*block, 2)
		v := p.Show("v")
		if v.Used != (quota.Usage{Bytes: 10*kit.Mi + 2*block, Inodes: 2}) {
			t.Errorf("show: used %v", v.Used)
		}
		// Never more than the disk has.
		p.Create("huge", 1<<40)
		disk := kit.Statfs(t, p.Backing)
		if _, _, avail, _, _ := figures(p.Path("huge")); avail > disk.Bavail*uint64(disk.Bsize)+16*kit.Mi {
			t.Errorf("df shows %d available, the disk has %d", avail, disk.Bavail*uint64(disk.Bsize))
		}
	})
}
