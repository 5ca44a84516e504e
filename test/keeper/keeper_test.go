package keeper_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	fskeeper "github.com/croftfs/croft/fs/keeper"
	"github.com/croftfs/croft/test/kit"
)

// most is what a process that only keeps may have of its own, in KiB. What is resident of its program comes on top: clean pages, as
// many as the page cache has in a folio that was touched (filemap_map_pages in mm/filemap.c), 4 to 10 MiB.
const most = 8 << 10

// TestMemory has a keeper keep a thousand pools.
func TestMemory(t *testing.T) {
	k := startKeeper(t, filepath.Join(kit.TempDir(t), "k"))
	show := func(when string) {
		t.Helper()
		own := memory(t, k.cmd.Process.Pid, "Anonymous")
		t.Logf("%s: resident %d KiB, its share %d KiB, own %d KiB", when,
			memory(t, k.cmd.Process.Pid, "Rss"), memory(t, k.cmd.Process.Pid, "Pss"), own)
		if own > most {
			t.Errorf("%s the keeper has %d KiB", when, own)
		}
	}
	show("at first")
	c, err := fskeeper.Dial(k.socket, nil)
	kit.OK(t, err)
	defer c.Close()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	kit.OK(t, err)
	defer unix.Close(fd)
	for i := range 1000 {
		p := c.Pool(fmt.Sprint("pool-", i))
		for _, name := range []string{"state", "fuse", "gate"} {
			kit.OK(t, p.Hold(name, fd))
		}
		if i%100 == 0 {
			files, err := p.Take()
			kit.OK(t, err)
			for _, f := range files {
				f.Close()
			}
		}
	}
	show("with a thousand pools")
	// It keeps what its clients have left, however they go.
	c.Close()
	again, err := fskeeper.Dial(k.socket, nil)
	kit.OK(t, err)
	defer again.Close()
	files, err := again.Pool("pool-999").Take()
	kit.OK(t, err)
	if len(files) != 3 {
		t.Errorf("%v are left", files)
	}
	for _, f := range files {
		f.Close()
	}
	k.end(unix.SIGTERM)
	if said := k.said(); !strings.Contains(said, "is let go") || !strings.Contains(said, "1000") {
		t.Errorf("it says %s", said)
	}
	if _, err := os.Lstat(k.socket); err == nil {
		t.Error("its socket is left")
	}
}

// TestSupervisorsMemory is that of a `croft mount` whose daemon is its child.
func TestSupervisorsMemory(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Keeper = "auto"
	d := p.Mount()
	own := memory(t, d.Pid, "Anonymous")
	t.Logf("resident %d KiB, its share %d KiB, own %d KiB; the daemon %d KiB", memory(t, d.Pid, "Rss"), memory(t, d.Pid, "Pss"), own,
		memory(t, p.Serving(), "Rss"))
	if own > most {
		t.Errorf("the supervisor has %d KiB", own)
	}
}

func TestOneKeeper(t *testing.T) {
	k := startKeeper(t, filepath.Join(kit.TempDir(t), "k"))
	r := kit.Exec(t, kit.Binary(t), "keeper", "--socket", k.socket)
	if r.Code != 1 || !strings.Contains(r.Stderr, "another keeper") || !strings.Contains(r.Stderr, k.socket) {
		t.Errorf("a second: %s", r)
	}
	k.end(unix.SIGKILL)
	startKeeper(t, k.socket).end(unix.SIGTERM)
}

// newPool is a pool whose daemon has a keeper of its own.
func newPool(t *testing.T) (*kit.Pool, *keeper) {
	t.Helper()
	p := kit.NewPool(t, "ext4")
	p.Keeper = filepath.Join(p.RunDir, "keeper.sock")
	return p, startKeeper(t, p.Keeper)
}

// TestKill kills daemons, each of which is started as a service would.
func TestKill(t *testing.T) {
	p, _ := newPool(t)
	p.Mount()
	x := newTenant(t, p)
	wantMetric(t, p, "take_overs_total", "0")
	wantMetric(t, p, "take_over_seconds", "")
	wantMetric(t, p, "keeper_up", "1")
	for i := range 3 {
		x.works()
		p.Daemon().Kill()
		p.Mount()
		x.works()
		wantMetric(t, p, "take_overs_total", fmt.Sprint(i+1))
		if took := metric(p, "take_over_seconds"); took == "" || took == "0" {
			t.Errorf("it took %q", took)
		}
	}
	x.leave()
	p.Check()
}

// TestHandOver ends daemons by SIGTERM, which leaves the mount, and the last by SIGINT, which does not.
func TestHandOver(t *testing.T) {
	p, k := newPool(t)
	p.Mount()
	x := newTenant(t, p)
	for range 3 {
		x.works()
		d := p.Daemon()
		kit.OK(t, d.Signal(unix.SIGTERM))
		kit.Within(t, "the end of who has handed over", func() { <-d.Exited() })
		x.r.Say("") // who asks meanwhile waits
		p.Mount()
		if got := x.r.Line(); got != "done" {
			t.Errorf("%q", got)
		}
	}
	wantMetric(t, p, "take_overs_total", "3")
	x.leave()
	p.Idle()
	end(t, p, k)
}

// end unmounts and wants nothing to be left with the keeper.
func end(t *testing.T, p *kit.Pool, k *keeper) {
	t.Helper()
	d := p.Daemon()
	kit.OK(t, d.Signal(unix.SIGINT))
	kit.Within(t, "the end of the daemon", func() { <-d.Exited() })
	if r := p.Croft("probe", p.Mnt); r.Code != 1 || !strings.Contains(r.Stderr, "no pool is mounted") {
		t.Errorf("after SIGINT: %s", r)
	}
	if k == nil {
		return
	}
	c, err := fskeeper.Dial(k.socket, nil)
	kit.OK(t, err)
	defer c.Close()
	if files, err := c.Pool(p.ID).Take(); err != nil || len(files) > 0 {
		t.Errorf("the keeper holds %v: %v", files, err)
	}
}

// TestKeeperEnds ends the keeper, in order and not, under a daemon: nothing happens, and
// what the next keeper is given is enough for the next daemon.
func TestKeeperEnds(t *testing.T) {
	p, k := newPool(t)
	p.Mount()
	x := newTenant(t, p)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		k.end(sig)
		kit.Poll(t, "the daemon's word about it", func() bool { return metric(p, "keeper_up") == "0" })
		x.works()
		k = startKeeper(t, p.Keeper)
		kit.Poll(t, "the daemon's word about another", func() bool { return metric(p, "keeper_up") == "1" })
		x.works()
		p.Daemon().Kill()
		p.Mount()
		x.works()
	}
	wantMetric(t, p, "take_overs_total", "2")
	for _, line := range []string{"the keeper has gone", "another keeper keeps"} {
		if n := strings.Count(p.Log(), line); n != 2 {
			t.Errorf("%d times %q in the log", n, line)
		}
	}
	x.leave()
	p.Idle()
	end(t, p, k)
}

// TestNoKeeper: SIGTERM unmounts when nobody could take over, and without a keeper nobody begins.
func TestNoKeeper(t *testing.T) {
	p, k := newPool(t)
	p.Mount()
	k.end(unix.SIGKILL)
	kit.Poll(t, "the daemon's word about it", func() bool { return metric(p, "keeper_up") == "0" })
	p.Stop()
	if !strings.Contains(p.Log(), "nobody could take over") {
		t.Error("the log does not say why")
	}
	r := p.Croft("mount", "--keeper", p.Keeper, "--pool", p.Dir, p.Mnt)
	if r.Code != 1 || !strings.Contains(r.Stderr, "croft keeper --socket "+p.Keeper) {
		t.Errorf("without a keeper: %s", r)
	}
}

func TestDoctor(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	none := p.Croft("doctor", p.Dir)
	k := startKeeper(t, filepath.Join(p.RunDir, "keeper.sock"))
	one := p.Croft("doctor", p.Dir)
	if none.Code != 0 || strings.Contains(none.Stdout, "it listens on") || one.Code != 0 || !strings.Contains(one.Stdout, "it listens on "+k.socket) {
		t.Errorf("without: %s\nwith: %s", none, one)
	}
}
