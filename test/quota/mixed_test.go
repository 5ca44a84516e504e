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
	rounds, steps := 5, 400
	if testing.Short() {
		rounds = 2
	}
	limit := quota.Usage{Bytes: 3 * kit.Mi, Inodes: 40}
	kit.EachFS(t, func(t *testing.T, fstype string) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		p := kit.NewPool(t, fstype)
		p.Mount()
		dir := p.Create("v", limit.Bytes, "--inodes", fmt.Sprint(limit.Inodes))
		for round := range rounds {
			sampler := p.Sample("v")
			together(t, 8, func(i int) error {
				m := &kit.Mixer{Dir: dir, Random: rand.New(rand.NewPCG(seed, uint64(round*8+i)))}
				defer m.Close()
				for range steps {
					if err := m.Step(); err != nil {
						return err
					}
				}
				return nil
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
