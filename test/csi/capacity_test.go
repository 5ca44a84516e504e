package csi_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/croftfs/croft/test/kit"
)

// TestPromise creates as many volumes as the pool can hold, and fills every one: with small files first, which cost
// the disk more than the volume, and then with a large one. What ends it is each volume's limit, and not the disk's.
func TestPromise(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		n := startIn(t, kit.NewPoolIn(t, kit.Backing(t, fstype, kit.Gi)), "node-a", "none")
		capacity := func() *csipb.GetCapacityResponse {
			t.Helper()
			c, err := n.GetCapacity(t.Context(), &csipb.GetCapacityRequest{})
			kit.OK(t, err)
			return c
		}
		empty := capacity()
		if most := empty.GetMaximumVolumeSize().GetValue(); most != empty.AvailableCapacity || most <= kit.Gi/2 || most >= kit.Gi {
			t.Fatalf("empty: %v", empty)
		}
		const volumes = 3
		for i := range volumes {
			left := capacity().AvailableCapacity
			size := left / int64(volumes-i)
			if i == volumes-1 {
				size -= kit.Mi // its own directories are not made yet
			}
			n.create(fmt.Sprint("v", i), size)
		}
		if c := capacity(); c.AvailableCapacity > 2*kit.Mi {
			t.Errorf("all is promised, and yet: %v", c)
		}
		_, err := n.CreateVolume(t.Context(), creation("more", 16*kit.Mi))
		wantCode(t, "one more", err, codes.ResourceExhausted)

		for name, v := range n.List() {
			fillUp(t, n.Path(name), v.Limit.Bytes)
		}
		for name, v := range n.List() {
			if v.Used.Bytes+64*kit.Ki < v.Limit.Bytes {
				t.Errorf("volume %s has %d bytes of %d: the disk was full before", name, v.Used.Bytes, v.Limit.Bytes)
			}
		}
		_, err = n.CreateVolume(t.Context(), creation("more", 16*kit.Mi))
		wantCode(t, "one more when all are full", err, codes.ResourceExhausted)
	})
}

// fillUp writes small files to a quarter of a volume, and one large file until there is no space.
func fillUp(t *testing.T, dir string, limit uint64) {
	t.Helper()
	for i := range limit / 4 / (16 * kit.Ki) {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("small", i)), make([]byte, 16*kit.Ki), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(dir, "large"))
	kit.OK(t, err)
	defer f.Close()
	data := make([]byte, kit.Mi)
	for size := len(data); size > 0; {
		_, err := f.Write(data[:size])
		switch {
		case errors.Is(err, unix.ENOSPC):
			size /= 2
		case err != nil:
			t.Fatal(err)
		}
	}
	kit.OK(t, f.Sync())
}
