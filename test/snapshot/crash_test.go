package snapshot_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/croftfs/croft/test/kit"
)

// TestKill kills the daemon in the middle of snapshots and clones: afterwards each of them is there in whole, or
// nothing of it is.
func TestKill(t *testing.T) {
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	kit.EachFS(t, func(t *testing.T, fstype string) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		p := kit.NewPool(t, fstype)
		p.Mount()
		const files = 2000
		dir := p.Create("v", 256*kit.Mi)
		for i := range files {
			kit.OK(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), make([]byte, 10_000), 0o644))
		}
		kit.OK(t, os.WriteFile(filepath.Join(dir, "large"), make([]byte, 100*kit.Mi), 0o644))
		p.Idle()
		used := p.Used("v")
		begun := time.Now()
		snapshot(t, p, "create", "v", "whole")
		took := time.Since(begun)
		wanted := map[string]bool{"whole": true}
		made := 0
		for round := range rounds {
			name := fmt.Sprint("s", round)
			args := []string{"snapshot", "create", "--pool", p.Dir, "v", name}
			if round%2 == 1 {
				args = []string{"volume", "clone", "--pool", p.Dir, "v", name}
			}
			cmd := p.Command(args...)
			kit.OK(t, cmd.Start())
			time.Sleep(time.Duration(random.Int64N(int64(took)))) // when to strike, not what is waited for
			p.Daemon().Kill()
			told := cmd.Wait() == nil
			p.Mount()
			kit.Poll(t, "the recount", func() bool { return p.Show("v").State == "ready" })
			_, isSnapshot := snapshots(t, p)[name]
			v, isVolume := p.List()[name]
			switch {
			case told && !isSnapshot && !isVolume:
				t.Errorf("round %d: it was said to be there", round)
			case isSnapshot && snapshots(t, p)[name].Used != used, isVolume && v.Used != used:
				t.Errorf("round %d: it is there in part", round)
			}
			wanted[name] = isSnapshot
			if isSnapshot || isVolume {
				made++
			}
			p.Check()
			left, err := os.ReadDir(filepath.Join(p.Dir, "snapshots"))
			kit.OK(t, err)
			for _, e := range left {
				if !wanted[e.Name()] {
					t.Errorf("round %d: left: %s", round, e.Name())
				}
			}
			if isVolume {
				p.MustVolume("delete", name)
			}
		}
		t.Logf("%d of %d were made before the kill; one takes %v", made, rounds, took)
		snapshot(t, p, "restore", "whole", "r")
		if got := p.Used("r"); got != used {
			t.Errorf("the one from before all uses %v, not %v", got, used)
		}
		kit.Poll(t, "an empty trash", func() bool {
			left, err := os.ReadDir(filepath.Join(p.Dir, "trash"))
			return err == nil && len(left) == 0
		})
	})
}
