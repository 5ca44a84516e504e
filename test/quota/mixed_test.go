package quota_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/test/kit"
)

// TestMixed has 8 goroutines do everything at random to the same few files of a
// small volume: the use is never above the limit, and right to the byte whenever
// all of them pause.
func TestMixed(t *testing.T) {
	mix(t, 5, nil, func(_ int, dir string, random *rand.Rand) error { return mixerSteps(dir, random) })
}

const mixSteps = 400

func mixerSteps(dir string, random *rand.Rand) error {
	m := &kit.Mixer{Dir: dir, Random: random}
	defer m.Close()
	for range mixSteps {
		if err := m.Step(); err != nil {
			return err
		}
	}
	return nil
}

// mix has work done to a small volume by 8 goroutines at a time, on each backing
// filesystem, and checks the limit meanwhile and the use after each round.
func mix(t *testing.T, rounds int, mountArgs []string, work func(i int, dir string, random *rand.Rand) error) {
	if testing.Short() {
		rounds = (rounds + 2) / 3
	}
	limit := quota.Usage{Bytes: 3 * kit.Mi, Inodes: 40}
	kit.EachFS(t, func(t *testing.T, fstype string) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		p := kit.NewPool(t, fstype)
		p.MountArgs = mountArgs
		p.Mount()
		dir := p.Create("v", limit.Bytes, "--inodes", fmt.Sprint(limit.Inodes))
		for round := range rounds {
			sampler := p.Sample("v")
			together(t, 8, func(i int) error {
				return work(i, dir, rand.New(rand.NewPCG(seed, uint64(round*8+i))))
			})
			sampler.Stop(t, limit)
			p.Idle()
			exact(t, p, "v")
			if t.Failed() {
				t.Fatalf("round %d", round)
			}
			t.Logf("round %d: peak %v in %d samples", round, sampler.Peak, sampler.Samples)
		}
		empty(t, p, "v")
	})
}
