// Package crash_test kills the daemon and the commands, and cuts the power, at
// random moments: what was promised is there afterwards.
package crash_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m, nil) }

// moment returns after a random while of at most most: it is when to strike,
// not what a test waits for.
func moment(random *rand.Rand, most time.Duration) {
	time.Sleep(time.Duration(random.Int64N(int64(most))))
}

// seeded returns a source of random numbers whose seed is in the log.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// dead tells whether an error is what a mount without a daemon answers.
func dead(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, os.ErrDeadlineExceeded)
}

// pattern is the content of the file of that seed from off on.
func pattern(seed uint64, off int64, length int) []byte {
	b := make([]byte, length)
	for i := range b {
		at := uint64(off) + uint64(i)
		x := (seed + at/8) * 0x9E3779B97F4A7C15
		b[i] = byte(x >> (8 * (at % 8)))
	}
	return b
}
