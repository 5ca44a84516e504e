package csi_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/croftfs/croft/csi"
	"github.com/croftfs/croft/test/kit"
)

// changed returns a request that is like another but for what change does.
func changed(name string, change func(r *csipb.CreateVolumeRequest)) *csipb.CreateVolumeRequest {
	r := creation(name, 16*kit.Mi)
	r.Parameters = map[string]string{}
	change(r)
	return r
}

func onNodes(names ...string) []*csipb.Topology {
	var all []*csipb.Topology
	for _, name := range names {
		all = append(all, &csipb.Topology{Segments: map[string]string{csi.TopologyKey: name}})
	}
	return all
}

func fromSnapshot(id string) *csipb.VolumeContentSource {
	return &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Snapshot{
		Snapshot: &csipb.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csipb.VolumeContentSource {
	return &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Volume{
		Volume: &csipb.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

// TestCreateRefused asks for volumes that cannot be, and for those that are there in another way.
func TestCreateRefused(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	block := n.createBy(changed("block", func(r *csipb.CreateVolumeRequest) {
		r.VolumeCapabilities = []*csipb.VolumeCapability{blockCapability(rwo)}
	}))
	for name, c := range map[string]struct {
		request *csipb.CreateVolumeRequest
		code    codes.Code
		says    string
	}{
		"unknown parameter":  {changed("x", func(r *csipb.CreateVolumeRequest) { r.Parameters["fsType"] = "ext4" }), codes.InvalidArgument, `"fsType" is unknown: known are gid, inodes, mode, pool, uid, wipe`},
		"unknown mutable":    {changed("x", func(r *csipb.CreateVolumeRequest) { r.MutableParameters = map[string]string{"iops": "1"} }), codes.InvalidArgument, `"iops"`},
		"inodes":             {changed("x", func(r *csipb.CreateVolumeRequest) { r.Parameters["inodes"] = "-1" }), codes.InvalidArgument, "inodes"},
		"mode":               {changed("x", func(r *csipb.CreateVolumeRequest) { r.Parameters["mode"] = "4755" }), codes.InvalidArgument, "mode"},
		"no such pool":       {changed("x", func(r *csipb.CreateVolumeRequest) { r.Parameters["pool"] = "gold" }), codes.ResourceExhausted, "gold"},
		"too large":          {creation("x", 1<<50), codes.ResourceExhausted, "overcommit 1"},
		"range":              {changed("x", func(r *csipb.CreateVolumeRequest) { r.CapacityRange.LimitBytes = kit.Mi }), codes.InvalidArgument, "limit"},
		"below the smallest": {changed("x", func(r *csipb.CreateVolumeRequest) { r.CapacityRange = &csipb.CapacityRange{LimitBytes: 1000} }), codes.OutOfRange, "1048576"},
		"another node":       {changed("x", func(r *csipb.CreateVolumeRequest) { r.AccessibilityRequirements = requisite("node-b") }), codes.ResourceExhausted, "node-a"},
		"block's inodes": {changed("x", func(r *csipb.CreateVolumeRequest) {
			r.Parameters["inodes"] = "9"
			r.VolumeCapabilities[0] = blockCapability(rwo)
		}), codes.InvalidArgument, "block"},
		"no such snapshot":    {changed("x", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromSnapshot(n.ID + "/none") }), codes.NotFound, "none"},
		"no such source":      {changed("x", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromVolume(n.ID + "/none") }), codes.NotFound, "none"},
		"source elsewhere":    {changed("x", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromVolume("0123456789/v") }), codes.ResourceExhausted, "another node"},
		"snapshot elsewhere":  {changed("x", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromSnapshot("0123456789/v") }), codes.ResourceExhausted, "another node"},
		"source of a kind":    {changed("x", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromVolume(block) }), codes.InvalidArgument, "block"},
		"another size":        {creation("v", 32*kit.Mi), codes.AlreadyExists, "16777216 bytes"},
		"another kind":        {changed("v", func(r *csipb.CreateVolumeRequest) { r.VolumeCapabilities[0] = blockCapability(rwo) }), codes.AlreadyExists, "filesystem"},
		"another inode limit": {changed("v", func(r *csipb.CreateVolumeRequest) { r.Parameters["inodes"] = "5" }), codes.AlreadyExists, "inodes"},
		"wiped":               {changed("v", func(r *csipb.CreateVolumeRequest) { r.Parameters["wipe"] = "true" }), codes.AlreadyExists, "wiped"},
		"from a source":       {changed("v", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromVolume(id) }), codes.AlreadyExists, "source"},
	} {
		_, err := n.CreateVolume(t.Context(), c.request)
		wantCode(t, name, err, c.code)
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v does not say %q", name, err, c.says)
		}
	}
	if all := n.List(); len(all) != 2 {
		t.Errorf("what was refused has left %v", all)
	}
	_, err := n.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: "0123456789/v"})
	wantCode(t, "delete another node's", err, codes.FailedPrecondition)
}

func requisite(names ...string) *csipb.TopologyRequirement {
	return &csipb.TopologyRequirement{Requisite: onNodes(names...), Preferred: onNodes(names...)}
}

// TestParameters are what the volume has then.
func TestParameters(t *testing.T) {
	n := start(t, "ext4", "none")
	r := changed("v", func(r *csipb.CreateVolumeRequest) {
		r.Parameters = map[string]string{"pool": "mnt", "inodes": "77", "uid": "1000", "gid": "2000", "mode": "2770", "wipe": "true",
			"csi.storage.k8s.io/pvc/name": "claim"}
		r.AccessibilityRequirements = requisite("node-b", "node-a")
	})
	v, err := n.CreateVolume(t.Context(), r)
	kit.OK(t, err)
	if at := v.Volume.AccessibleTopology; len(at) != 1 || at[0].Segments[csi.TopologyKey] != "node-a" {
		t.Errorf("topology %v", at)
	}
	id := v.Volume.VolumeId
	if again := n.createBy(r); again != id {
		t.Errorf("%s, and then %s", id, again)
	}
	target := n.publish(id, "pod", capability(rwo))
	if st := kit.Stat(t, target); st.Uid != 1000 || st.Gid != 2000 || st.Mode&0o7777 != 0o2770 {
		t.Errorf("%d:%d, mode %o", st.Uid, st.Gid, st.Mode)
	}
	shown := n.Show(volumeName(id))
	if shown.Limit.Inodes != 77 || !shown.Wipe {
		t.Errorf("%+v", shown)
	}
	// A VolumeAttributesClass raises the inodes, while it is in use.
	modify := func(parameters map[string]string) error {
		_, err := n.ControllerModifyVolume(t.Context(), &csipb.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: parameters})
		return err
	}
	kit.OK(t, modify(map[string]string{"inodes": "1234"}))
	if st := kit.Statfs(t, target); st.Files != 1234 {
		t.Errorf("%d inodes", st.Files)
	}
	wantCode(t, "modify what cannot be", modify(map[string]string{"wipe": "true"}), codes.InvalidArgument)
	kit.OK(t, os.WriteFile(filepath.Join(target, "f"), nil, 0o600))
	kit.OK(t, os.WriteFile(filepath.Join(target, "g"), nil, 0o600))
	wantCode(t, "below its use", modify(map[string]string{"inodes": "1"}), codes.OutOfRange)
	n.unpublish(id, target)
	validate := func(c *csipb.VolumeCapability) *csipb.ValidateVolumeCapabilitiesResponse {
		v, err := n.ValidateVolumeCapabilities(t.Context(), &csipb.ValidateVolumeCapabilitiesRequest{VolumeId: id,
			VolumeCapabilities: []*csipb.VolumeCapability{c}})
		kit.OK(t, err)
		return v
	}
	if v := validate(capability(rwx)); v.Confirmed == nil {
		t.Errorf("%v", v)
	}
	if v := validate(blockCapability(rwo)); v.Confirmed != nil || v.Message == "" {
		t.Errorf("%v", v)
	}
	n.delete(id)
}

// TestPages lists volumes in pages, of which some come and go between two.
func TestPages(t *testing.T) {
	n := start(t, "ext4", "none")
	var ids []string
	for i := range 25 {
		ids = append(ids, n.create(fmt.Sprint("v", i), kit.Mi))
	}
	slices.Sort(ids)
	var seen []string
	var sizes []int
	deleted := ids[15]
	for token := ""; ; {
		r, err := n.ListVolumes(t.Context(), &csipb.ListVolumesRequest{MaxEntries: 10, StartingToken: token})
		kit.OK(t, err)
		for _, e := range r.Entries {
			seen = append(seen, e.Volume.VolumeId)
		}
		sizes = append(sizes, len(r.Entries))
		if token = r.NextToken; token == "" {
			break
		}
		if len(sizes) == 1 { // also the one that the token names
			n.delete(deleted)
			n.delete(ids[9])
		}
	}
	want := slices.Delete(slices.Clone(ids), 15, 16)
	if !slices.Equal(seen, want) || !slices.Equal(sizes, []int{10, 10, 4}) {
		t.Errorf("%v\n%v, want\n%v", sizes, seen, want)
	}
	_, err := n.ListVolumes(t.Context(), &csipb.ListVolumesRequest{StartingToken: "no token"})
	wantCode(t, "a token of nobody", err, codes.Aborted)
	_, err = n.ListVolumes(t.Context(), &csipb.ListVolumesRequest{MaxEntries: -1})
	wantCode(t, "a negative number", err, codes.InvalidArgument)
}

// TestSnapshots makes and restores snapshots by their ids, on each filesystem, and after the source has gone.
func TestSnapshots(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		n := start(t, fstype, "none")
		id := n.create("v", 16*kit.Mi)
		target := n.publish(id, "pod", capability(rwo))
		kit.OK(t, os.WriteFile(filepath.Join(target, "f"), []byte("then"), 0o600))
		shoot := func() *csipb.Snapshot {
			r, err := n.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
			kit.OK(t, err)
			return r.Snapshot
		}
		s := shoot()
		kit.OK(t, os.WriteFile(filepath.Join(target, "f"), []byte("later"), 0o600))
		if again := shoot(); again.SnapshotId != s.SnapshotId || !again.CreationTime.AsTime().Equal(s.CreationTime.AsTime()) || !s.ReadyToUse {
			t.Errorf("%v, and then %v", s, again)
		}
		other := n.create("w", 16*kit.Mi)
		_, err := n.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: "s", SourceVolumeId: other})
		wantCode(t, "that name of another volume", err, codes.AlreadyExists)
		n.unpublish(id, target)
		n.delete(id)

		restore := changed("restored", func(r *csipb.CreateVolumeRequest) { r.VolumeContentSource = fromSnapshot(s.SnapshotId) })
		v, err := n.CreateVolume(t.Context(), restore)
		kit.OK(t, err)
		if v.Volume.ContentSource.GetSnapshot().GetSnapshotId() != s.SnapshotId {
			t.Errorf("source %v", v.Volume.ContentSource)
		}
		restored := v.Volume.VolumeId
		target = n.publish(restored, "pod", capability(rwo))
		if body, err := os.ReadFile(filepath.Join(target, "f")); err != nil || string(body) != "then" {
			t.Errorf("%q, %v", body, err)
		}
		n.unpublish(restored, target)
		small := changed("small", func(r *csipb.CreateVolumeRequest) {
			r.VolumeContentSource = fromSnapshot(s.SnapshotId)
			r.Parameters["inodes"] = "1"
		})
		kit.OK(t, err)
		if _, err := n.CreateVolume(t.Context(), small); err != nil {
			t.Errorf("as many inodes as it needs: %v", err)
		}
		list, err := n.ListSnapshots(t.Context(), &csipb.ListSnapshotsRequest{SourceVolumeId: id})
		if err != nil || len(list.Entries) != 1 || list.Entries[0].Snapshot.SnapshotId != s.SnapshotId {
			t.Errorf("%v, %v", list, err)
		}
		for range 2 {
			_, err = n.DeleteSnapshot(t.Context(), &csipb.DeleteSnapshotRequest{SnapshotId: s.SnapshotId})
			kit.OK(t, err)
		}
		// It needs its snapshot no longer, and is itself when it is asked for again.
		if again := n.createBy(restore); again != restored {
			t.Errorf("%s, and then %s", restored, again)
		}
	})
}
