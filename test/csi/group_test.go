package csi_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/croftfs/croft/test/kit"
)

// TestGroup has a pod's fsGroup own a volume's files at once, however many there are, write them through the kernel's own path, and
// leave them as they were when the pod has gone.
func TestGroup(t *testing.T) {
	for _, tier := range []string{"gate", "daemon"} {
		t.Run(tier, func(t *testing.T) {
			n := start(t, "ext4", "none", "--tier", tier)
			id := n.create("v", 512*kit.Mi)
			target := n.publish(id, "before", capability(rwo))
			const files = 20_000
			for i := range files {
				kit.OK(t, os.WriteFile(filepath.Join(target, fmt.Sprint("f", i)), nil, 0o600))
			}
			n.unpublish(id, target)
			plain, grouped := time.Duration(0), time.Duration(0)
			for i := range 5 { // interleaved
				begun := time.Now()
				target = n.publish(id, fmt.Sprint("plain", i), capability(rwo))
				plain += time.Since(begun)
				n.unpublish(id, target)
				begun = time.Now()
				target = n.publish(id, fmt.Sprint("grouped", i), forGroup("5000"))
				grouped += time.Since(begun)
				n.unpublish(id, target)
			}
			t.Logf("%d files: published in %s, for a group in %s", files, plain/5, grouped/5)

			target = n.publish(id, "pod", forGroup("5000"))
			for i := range files {
				st := kit.Stat(t, filepath.Join(target, fmt.Sprint("f", i)))
				if st.Gid != 5000 || st.Mode&0o777 != 0o660 {
					t.Fatalf("f%d: group %d, mode %o", i, st.Gid, st.Mode)
				}
			}
			// A process of the group, and no other id of the volume's, writes and creates.
			r := kit.Process{Helper: "write", Args: []string{filepath.Join(target, "f0"), filepath.Join(target, "new")}, UID: 4000, GID: 5000}.Run(t)
			if r.Code != 0 {
				t.Errorf("%s", r)
			}
			if st := kit.Stat(t, filepath.Join(target, "new")); st.Uid != 4000 || st.Gid != 5000 {
				t.Errorf("the new file is %d:%d's", st.Uid, st.Gid)
			}
			// One volume is shown to one group at a time.
			_, err := n.NodePublishVolume(t.Context(), publication(id, n.target("other"), forGroup("6000")))
			wantCode(t, "another group", err, codes.FailedPrecondition)
			same := n.publish(id, "same", forGroup("5000"))
			n.unpublish(id, target)
			if st := kit.Stat(t, filepath.Join(same, "f1")); st.Gid != 5000 {
				t.Errorf("the second pod sees group %d", st.Gid)
			}
			n.unpublish(id, same)
			target = n.publish(id, "after", capability(rwo))
			if st := kit.Stat(t, filepath.Join(target, "f1")); st.Gid != 0 || st.Mode&0o777 != 0o600 {
				t.Errorf("afterwards: group %d, mode %o", st.Gid, st.Mode)
			}
			n.unpublish(id, target)
		})
	}
}

// runWrite writes to a file and makes another.
func runWrite(args []string) int {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteString("by the group")
	}
	if err == nil {
		err = os.WriteFile(args[1], []byte("x"), 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestInline has a pod's inline volume made with the pod and deleted with it, whatever becomes of kubelet.
func TestInline(t *testing.T) {
	n := start(t, "ext4", "none")
	inline := func(id, pod string, attributes map[string]string) *csipb.NodePublishVolumeRequest {
		attributes["csi.storage.k8s.io/ephemeral"] = "true"
		attributes["csi.storage.k8s.io/pod.name"] = pod
		r := publication(id, n.target(pod), capability(rwo))
		r.VolumeContext = attributes
		return r
	}
	const id = "csi-0123456789abcdef"
	r := inline(id, "pod", map[string]string{"size": "16Mi", "mode": "0777", "inodes": "100"})
	for range 2 {
		_, err := n.NodePublishVolume(t.Context(), r)
		kit.OK(t, err)
	}
	if st := kit.Statfs(t, r.TargetPath); st.Blocks*uint64(st.Bsize) != 16*kit.Mi || st.Files != 100 {
		t.Errorf("%d blocks, %d inodes", st.Blocks, st.Files)
	}
	kit.IsErr(t, "beyond its size", os.WriteFile(filepath.Join(r.TargetPath, "f"), make([]byte, 17*kit.Mi), 0o600), unix.ENOSPC)
	stats, err := n.NodeGetVolumeStats(t.Context(), &csipb.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: r.TargetPath})
	if err != nil || stats.Usage[0].Total != 16*kit.Mi {
		t.Errorf("%v, %v", stats, err)
	}
	n.unpublish(id, r.TargetPath)
	wantGone(t, r.TargetPath)
	if left := n.List(); len(left) > 0 {
		t.Errorf("%v", left)
	}
	n.unpublish(id, r.TargetPath)

	for name, c := range map[string]struct {
		attributes map[string]string
		code       codes.Code
	}{
		"no size":   {map[string]string{}, codes.InvalidArgument},
		"a word":    {map[string]string{"size": "large"}, codes.InvalidArgument},
		"unknown":   {map[string]string{"size": "16Mi", "color": "red"}, codes.InvalidArgument},
		"too large": {map[string]string{"size": "1Pi"}, codes.ResourceExhausted},
	} {
		_, err := n.NodePublishVolume(t.Context(), inline("csi-other", "other", c.attributes))
		wantCode(t, name, err, c.code)
	}
	// kubelet removes the pod's directory, and never calls again: the next start sweeps.
	kept, lost := inline("csi-kept", "kept", map[string]string{"size": "1Mi"}), inline("csi-lost", "lost", map[string]string{"size": "1Mi"})
	for _, r := range []*csipb.NodePublishVolumeRequest{kept, lost} {
		_, err := n.NodePublishVolume(t.Context(), r)
		kit.OK(t, err)
	}
	persistent := n.create("csi-lost", kit.Mi) // a persistent volume of that name is another
	kit.OK(t, unix.Unmount(lost.TargetPath, 0))
	kit.OK(t, os.RemoveAll(filepath.Dir(lost.TargetPath)))
	n.reboot(kept.TargetPath)
	kit.Poll(t, "the sweep", func() bool { return len(n.List()) == 2 })
	n.delete(persistent)
	// The kept one is published again, with what it had.
	_, err = n.NodePublishVolume(t.Context(), kept)
	kit.OK(t, err)
	wantMounted(t, kept.TargetPath)
	n.unpublish("csi-kept", kept.TargetPath)
	if left := n.List(); len(left) > 0 {
		t.Errorf("%v", left)
	}
}
