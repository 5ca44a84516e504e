// Package snapshot_test makes snapshots and clones of volumes that are in use, block volumes, and wiped ones, over
// real mounts on each backing filesystem.
package snapshot_test

import (
	"testing"

	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m, map[string]kit.Helper{"pairs": pairs, "fill": fill}) }
