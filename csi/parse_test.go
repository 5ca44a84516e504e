package csi

import (
	"errors"
	"math"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/croftfs/croft/fs/pool"
)

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		least, most int64
		want        uint64
		err         error
	}{
		{0, 0, defaultBytes, nil},
		{1, 0, pool.MinBytes, nil},
		{pool.MinBytes + 1, 0, pool.MinBytes + blockBytes, nil},
		{0, pool.MinBytes + 1, pool.MinBytes, nil},
		{pool.MinBytes + 1, pool.MinBytes + 2, 0, ErrRange},
		{pool.MaxBytes, math.MaxInt64, pool.MaxBytes, nil},
		{pool.MaxBytes + 1, 0, 0, ErrRange},
		{math.MaxInt64, math.MaxInt64, 0, ErrRange},
		{0, pool.MinBytes - 1, 0, ErrRange},
		{2, 1, 0, ErrArgument},
		{-1, 0, 0, ErrArgument},
		{0, math.MinInt64, 0, ErrArgument},
	} {
		s, err := parseSizes(&csipb.CapacityRange{RequiredBytes: c.least, LimitBytes: c.most})
		var got uint64
		if err == nil {
			got, err = s.choose(defaultBytes)
		}
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%d to %d: %d, %v, and not %d, %v", c.least, c.most, got, err, c.want, c.err)
		}
	}
}

func TestNames(t *testing.T) {
	for name, kept := range map[string]bool{"a": true, strings.Repeat("n", maxOwnName): true, strings.Repeat("n", maxOwnName+1): false,
		"../..": false, "csi-x": false, "": false, "a/b": false, "a\x00": false} {
		own := ownName(name)
		if (own == name) != kept {
			t.Errorf("%q becomes %q", name, own)
		}
		id := strings.Repeat("0", poolIDLength)
		if p, n, ok := splitID(idOf(id, own)); !ok || p != id || n != own {
			t.Errorf("the id of %q has the parts %q, %q, %v", name, p, n, ok)
		}
	}
}
