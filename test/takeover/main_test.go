// Package takeover_test kills daemons under load and shows that nobody notices.
package takeover_test

import (
	"flag"
	"testing"
	"time"

	"github.com/croftfs/croft/test/kit"
)

// kills is how often the daemon is killed in each tier; `make soak` wants more.
var kills = flag.Int("kills", 12, "how often the daemon is killed")

// stopped is how long a daemon is stopped.
var stopped = flag.Duration("stopped", 5*time.Second, "how long the daemon is stopped")

func TestMain(m *testing.M) {
	flag.Parse()
	kit.Backstop = max(15*time.Minute, time.Duration(*kills)*10*time.Second) // the load runs as long as daemons are killed
	kit.Main(m, map[string]kit.Helper{
		"names": names, "lines": lines, "unlinked": unlinked, "inside": inside,
		"locks": locks, "stores": stores, "fill": fill, "pace": pace, "step": step,
	})
}
