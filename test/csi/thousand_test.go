package csi_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/test/kit"
)

// latencies are those of calls, by method.
type latencies struct {
	mu  sync.Mutex
	all map[string][]time.Duration
	// again is how often a call had to be repeated, for a daemon was killed.
	again map[string]int
}

func (l *latencies) add(method string, took time.Duration, again int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all[method] = append(l.all[method], took)
	l.again[method] += again
}

// call makes a call until it succeeds, as the sidecars and kubelet do. Reasons to repeat it are a daemon that is killed
// under it, the call that goes on in one that was not, and a file that the tenant has closed and the kernel has not released yet.
func (l *latencies) call(t *testing.T, method string, fn func(ctx context.Context) error) bool {
	begun := time.Now()
	for again := 0; !t.Failed(); again++ {
		err := fn(t.Context())
		switch code := status.Code(err); {
		case code == codes.OK:
			l.add(method, time.Since(begun), again)
			return true
		case code == codes.Unavailable, code == codes.Aborted, code == codes.FailedPrecondition && method != "NodePublishVolume":
		default:
			t.Errorf("%s: %v", method, err)
		}
	}
	return false
}

// TestThousand has 1,000 volumes live their lives, 20 at a time, while the daemon is killed ten times: every call succeeds
// in the end, and nothing is left.
func TestThousand(t *testing.T) {
	const volumes, parallel, kills = 1000, 20, 10
	n := start(t, "ext4", "auto")
	l := &latencies{all: map[string][]time.Duration{}, again: map[string]int{}}
	var steps sync.WaitGroup
	work := make(chan int)
	done := make(chan struct{}, volumes)
	for range parallel {
		steps.Go(func() {
			for i := range work {
				n.live(t, l, i)
				done <- struct{}{}
			}
		})
	}
	begun := time.Now()
	go func() {
		defer close(work)
		for i := range volumes {
			work <- i
		}
	}()
	// A kill after each part of the work, so that there is work under way at each.
	for i := range volumes {
		<-done
		if (i+1)%(volumes/(kills+1)) == 0 && (i+1)/(volumes/(kills+1)) <= kills {
			n.KillServing()
		}
	}
	steps.Wait()
	took := time.Since(begun)
	var killed int
	for method, all := range l.all {
		slices.Sort(all)
		t.Logf("%-22s %4d calls: p50 %8s, p99 %8s, longest %8s; %d repeated", method, len(all), all[len(all)/2].Round(10*time.Microsecond),
			all[len(all)*99/100].Round(10*time.Microsecond), all[len(all)-1].Round(time.Millisecond), l.again[method])
		killed += l.again[method]
		if len(all) != volumes {
			t.Errorf("%s: %d calls", method, len(all))
		}
	}
	t.Logf("%d volumes with %d at a time and %d kills in %s", volumes, parallel, kills, took.Round(time.Millisecond))
	if killed == 0 {
		t.Error("no kill has met a call")
	}
	n.wantNothing(t)
}

// live creates, publishes, expands, unpublishes and deletes a volume. Every twentieth is a block volume.
func (n *node) live(t *testing.T, l *latencies, i int) {
	name := fmt.Sprint("pvc-", i)
	r, c := creation(name, kit.Mi), capability(rwo)
	block := i%20 == 0
	if block {
		r, c = blockCreation(name, kit.Mi), blockCapability(rwo)
	}
	target := filepath.Join(n.targets, name, "mount")
	if err := os.Mkdir(filepath.Dir(target), 0o755); err != nil {
		t.Error(err)
		return
	}
	var id string
	call := func(method string, fn func(ctx context.Context) error) bool { return l.call(t, method, fn) }
	done := call("CreateVolume", func(ctx context.Context) error {
		v, err := n.CreateVolume(ctx, r)
		id = v.GetVolume().GetVolumeId()
		return err
	}) && call("NodePublishVolume", func(ctx context.Context) error {
		_, err := n.NodePublishVolume(ctx, publication(id, target, c))
		return err
	})
	if !done {
		return
	}
	if !block {
		if err := os.WriteFile(filepath.Join(target, "f"), []byte(name), 0o600); err != nil {
			t.Errorf("a tenant's write: %v", err)
		}
	}
	done = call("NodeExpandVolume", func(ctx context.Context) error {
		_, err := n.NodeExpandVolume(ctx, &csipb.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
			CapacityRange: &csipb.CapacityRange{RequiredBytes: 2 * kit.Mi}, VolumeCapability: c})
		return err
	})
	if !block {
		if body, err := os.ReadFile(filepath.Join(target, "f")); err != nil || string(body) != name {
			t.Errorf("a tenant's read: %q, %v", body, err)
		}
	}
	done = done && call("NodeUnpublishVolume", func(ctx context.Context) error {
		_, err := n.NodeUnpublishVolume(ctx, &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		return err
	}) && call("DeleteVolume", func(ctx context.Context) error {
		_, err := n.DeleteVolume(ctx, &csipb.DeleteVolumeRequest{VolumeId: id})
		return err
	})
	if !done {
		return
	}
	if err := os.Remove(filepath.Dir(target)); err != nil { // the target is gone from it
		t.Error(err)
	}
}

// wantNothing wants no record, directory, mount or loop device of any volume to be left.
func (n *node) wantNothing(t *testing.T) {
	t.Helper()
	list, err := n.ListVolumes(t.Context(), &csipb.ListVolumesRequest{})
	if err != nil || len(list.Entries) > 0 {
		t.Errorf("volumes: %v, %v", list, err)
	}
	for _, dir := range []string{"volumes", "orphans", "blocks", "snapshots", "trash"} {
		kit.Poll(t, dir+" being empty", func() bool { // what was deleted is freed in the background
			names, err := os.ReadDir(filepath.Join(n.Dir, dir))
			kit.OK(t, err)
			return len(names) == 0
		})
	}
	mounts, err := transport.Mounts(transport.MountFilter{Source: pool.MountSource(n.ID)})
	kit.OK(t, err)
	for _, m := range mounts {
		if m.Mountpoint != n.Mnt {
			t.Errorf("a mount is left: %s on %s", m.Root, m.Mountpoint)
		}
	}
	if !slices.ContainsFunc(mounts, func(m transport.MountEntry) bool { return m.Mountpoint == n.Mnt }) {
		t.Errorf("the pool's own mount is not among %v: who looks so, finds none", mounts)
	}
	if left := n.loops(); len(left) > 0 {
		t.Errorf("loop devices are left: %s", strings.Join(left, ", "))
	}
	if names, err := os.ReadDir(n.targets); err != nil || len(names) > 0 {
		t.Errorf("targets are left: %v, %v", names, err)
	}
}
