package crash_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// mixers work in the mixed volume at once.
const mixers = 2

// mix works until the mount is dead or stop is closed.
func mix(m *kit.Mixer, stop <-chan struct{}) error {
	defer m.Close()
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := m.Step(); dead(err) || cutOff(err, m.Dir) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// cutOff tells whether an error other than dead's came when the daemon was gone:
// symlink(2) was seen to answer ENOMEM around a kill, and why is not known. With
// the daemon alive it is a failure. statfs(2) is never answered from a cache.
func cutOff(err error, dir string) bool {
	var st unix.Statfs_t
	return errors.Is(err, unix.ENOMEM) && dead(unix.Statfs(dir, &st))
}

// TestKill kills the daemon under load, 50 times over all.
func TestKill(t *testing.T) {
	rounds := map[string]int{"ext4": 20, "xfs": 15, "btrfs": 15}
	if testing.Short() {
		rounds = map[string]int{"ext4": 3, "xfs": 3, "btrfs": 3}
	}
	tiers := map[string]string{"ext4": "read", "xfs": "daemon", "btrfs": "read"}
	kit.EachFS(t, func(t *testing.T, fstype string) {
		random := seeded(t)
		p := kit.NewPool(t, fstype)
		p.MountArgs = []string{"--tier", tiers[fstype]}
		p.Mount()
		// The small one is full most of the time.
		roomy, small := p.Create("roomy", 256*kit.Mi), p.Create("small", kit.Mi)
		var workers []*worker
		for i, spec := range []struct {
			volume string
			most   int64
		}{{roomy, 400_000}, {roomy, 4_000}, {small, 300_000}, {small, 20_000}} {
			w := newWorker(fmt.Sprint(spec.volume, "/w", i), random.Uint64N(1<<30), spec.most)
			kit.OK(t, os.Mkdir(w.dir, 0o755))
			workers = append(workers, w)
		}
		// Whatever a crash leaves of the mixed one, it is counted right and within
		// the limit: Check says so.
		mixed := p.Create("mixed", 3*kit.Mi, "--inodes", "40")
		var slowest time.Duration
		for round := range rounds[fstype] {
			stop, ended := make(chan struct{}), make(chan error, len(workers)+mixers)
			for _, w := range workers {
				go func() { ended <- w.run(stop) }()
			}
			for range mixers {
				m := &kit.Mixer{Dir: mixed, Random: rand.New(rand.NewPCG(random.Uint64(), 2))}
				go func() { ended <- mix(m, stop) }()
			}
			moment(random, 600*time.Millisecond)
			p.Daemon().Kill()
			close(stop)
			for range len(workers) + mixers {
				if err := <-ended; err != nil {
					t.Errorf("round %d: under load: %v", round, err)
				}
			}
			for _, w := range workers {
				w.closeAll() // the dead mount's
			}
			start := time.Now()
			p.Mount()
			slowest = max(slowest, time.Since(start))
			for _, w := range workers {
				if err := w.verify(); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			}
			p.Check()
			if t.Failed() {
				t.Fatalf("round %d", round)
			}
		}
		var ops, refused int
		for _, w := range workers {
			ops, refused = ops+w.ops, refused+w.refused
		}
		t.Logf("%d operations, %d refused at the limit, the slowest start took %v", ops, refused, slowest)
		if ops == 0 || refused == 0 {
			t.Errorf("%d operations, %d refused at the limit: that was no load", ops, refused)
		}
	})
}

// TestKillIdle kills a daemon that has nothing to do: nothing is to be mended.
func TestKillIdle(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	dir := p.Create("v", 16*kit.Mi)
	kit.OK(t, os.WriteFile(dir+"/f", pattern(1, 0, 100_000), 0o644))
	used := p.Used("v")
	for range 3 {
		p.Daemon().Kill()
		p.Check() // while the mount is dead, straight from the disk
		p.Mount()
		kit.Poll(t, "the recount", func() bool { return p.Show("v").State == "ready" })
		if now := p.Used("v"); now != used {
			t.Errorf("used %v, before %v", now, used)
		}
	}
}
