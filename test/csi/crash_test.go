package csi_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/croftfs/croft/test/kit"
)

// TestKeptPublications kills the daemon of published volumes: with a keeper nobody notices, also not who has a group's view.
func TestKeptPublications(t *testing.T) {
	n := start(t, "ext4", "auto")
	id, grouped := n.create("v", 16*kit.Mi), n.create("g", 16*kit.Mi)
	before := n.publish(grouped, "before", capability(rwo))
	kit.OK(t, os.WriteFile(filepath.Join(before, "f"), nil, 0o600))
	n.unpublish(grouped, before)
	target, groupTarget := n.publish(id, "pod", capability(rwop)), n.publish(grouped, "group", forGroup("5000"))
	f, err := os.Create(filepath.Join(target, "f"))
	kit.OK(t, err)
	defer f.Close()
	for i := range 5 {
		pid := n.Serving()
		n.KillServing()
		if _, err := fmt.Fprintln(f, i); err != nil {
			t.Fatal(err)
		}
		n.AwaitNext(pid)
		if st := kit.Stat(t, filepath.Join(groupTarget, "f")); st.Gid != 5000 || st.Mode&0o777 != 0o660 {
			t.Fatalf("group %d, mode %o", st.Gid, st.Mode)
		}
		n.publish(id, "pod", capability(rwop))
		wantMounted(t, target)
		_, err := n.NodePublishVolume(t.Context(), publication(id, n.target("other"), capability(rwo)))
		wantCode(t, "beside the only one", err, codes.FailedPrecondition)
		probe, err := n.Probe(t.Context(), &csipb.ProbeRequest{})
		if err != nil || !probe.GetReady().GetValue() {
			t.Errorf("%v, %v", probe, err)
		}
	}
	kit.OK(t, f.Close())
	n.unpublish(id, target)
	n.unpublish(grouped, groupTarget)
	wantGone(t, target)
	wantGone(t, groupTarget)
	n.delete(id)
	n.delete(grouped)
}

// TestLostPublications kills the daemon of published volumes that nobody keeps, and starts the machine anew.
func TestLostPublications(t *testing.T) {
	n := start(t, "ext4", "none")
	id, grouped := n.create("v", 16*kit.Mi), n.create("g", 16*kit.Mi)
	target, groupTarget := n.publish(id, "pod", capability(rwop, "noexec")), n.publish(grouped, "group", forGroup("5000"))
	kit.OK(t, os.WriteFile(filepath.Join(target, "f"), []byte("kept"), 0o600))
	kit.OK(t, os.WriteFile(filepath.Join(groupTarget, "f"), []byte("kept"), 0o600))

	n.Daemon().Kill()
	_, err := os.Stat(filepath.Join(target, "f"))
	kit.IsErr(t, "a dead mount", err, unix.ENOTCONN)
	n.Mount()
	// The next daemon has replaced the dead mounts, each in its way.
	for _, at := range []string{target, groupTarget} {
		if body, err := os.ReadFile(filepath.Join(at, "f")); err != nil || string(body) != "kept" {
			t.Errorf("%q, %v", body, err)
		}
	}
	if m := wantMounted(t, target); !slices.Contains(strings.Split(m.Options, ","), "noexec") {
		t.Errorf("mounted with %s", m.Options)
	}
	if st := kit.Stat(t, filepath.Join(groupTarget, "f")); st.Gid != 5000 {
		t.Errorf("group %d", st.Gid)
	}

	// A start of the machine leaves no mount, and records that nobody misses.
	n.reboot(target, groupTarget)
	if at := n.Show(volumeName(id)).Published; len(at) > 0 {
		t.Errorf("published on %v", at)
	}
	n.publish(id, "other", capability(rwop)) // the pod has moved
	n.unpublish(id, n.target("other"))
	n.unpublish(id, target) // kubelet cleans up after it
	wantGone(t, target)
	n.unpublish(grouped, groupTarget)
	n.delete(id)
	n.delete(grouped)
}
