// Package snapshot_test makes snapshots and clones of volumes that are in use, block volumes, and wiped ones, over
// real mounts on each backing filesystem.
package snapshot_test

import (
	"encoding/json"
	"testing"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m, map[string]kit.Helper{"pairs": pairs}) }

// snapshots lists the snapshots by name.
func snapshots(t *testing.T, p *kit.Pool) map[string]pool.Snapshot {
	t.Helper()
	var list []pool.Snapshot
	kit.OK(t, json.Unmarshal([]byte(p.MustCroft("snapshot", "list", "--pool", p.Dir, "-o", "json")), &list))
	byName := make(map[string]pool.Snapshot)
	for _, s := range list {
		byName[s.Name] = s
	}
	return byName
}

// snapshot runs `croft snapshot VERB --pool … args`, which has to succeed.
func snapshot(t *testing.T, p *kit.Pool, verb string, args ...string) {
	t.Helper()
	p.MustCroft(append([]string{"snapshot", verb, "--pool", p.Dir}, args...)...)
}
