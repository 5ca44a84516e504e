package csi_test

import (
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/croftfs/croft/csi"
	"github.com/croftfs/croft/test/kit"
)

// TestNodes runs three nodes, with a pool each, and one controller: what belongs to a node is done by that one alone.
func TestNodes(t *testing.T) {
	var nodes []*node
	for _, name := range []string{"node-a", "node-b", "node-c"} {
		nodes = append(nodes, startIn(t, kit.NewPoolIn(t, kit.Backing(t, "ext4", kit.Gi)), name, "none", "--max-volumes", "17"))
	}
	ids := map[string]bool{}
	for i, n := range nodes {
		name := fmt.Sprint("node-", string(rune('a'+i)))
		info, err := n.NodeGetInfo(t.Context(), &csipb.NodeGetInfoRequest{})
		if err != nil || info.NodeId != name || info.AccessibleTopology.Segments[csi.TopologyKey] != name || info.MaxVolumesPerNode != 17 {
			t.Errorf("%v, %v", info, err)
		}
		// One name, asked of each node as external-provisioner does for each that the scheduler has chosen.
		r := creation("claim", 16*kit.Mi)
		r.AccessibilityRequirements = requisite(name)
		v, err := n.CreateVolume(t.Context(), r)
		kit.OK(t, err)
		id := v.Volume.VolumeId
		if ids[id] || len(v.Volume.AccessibleTopology) != 1 || v.Volume.AccessibleTopology[0].Segments[csi.TopologyKey] != name {
			t.Errorf("%v", v)
		}
		ids[id] = true
		n.unpublish(id, n.publish(id, "pod", capability(rwo)))

		other := nodes[(i+1)%len(nodes)]
		_, err = other.NodePublishVolume(t.Context(), publication(id, other.target("pod"), capability(rwo)))
		wantCode(t, "publish another node's", err, codes.NotFound)
		_, err = other.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: id})
		wantCode(t, "delete another node's", err, codes.FailedPrecondition)
		clone := creation("clone", 16*kit.Mi)
		clone.VolumeContentSource = fromVolume(id)
		_, err = other.CreateVolume(t.Context(), clone)
		wantCode(t, "clone another node's", err, codes.ResourceExhausted)
		_, err = other.CreateVolume(t.Context(), r)
		wantCode(t, "create for another node", err, codes.ResourceExhausted)

		here, err := n.GetCapacity(t.Context(), &csipb.GetCapacityRequest{AccessibleTopology: onNodes(name)[0]})
		kit.OK(t, err)
		there, err := n.GetCapacity(t.Context(), &csipb.GetCapacityRequest{AccessibleTopology: onNodes("elsewhere")[0]})
		kit.OK(t, err)
		if here.AvailableCapacity == 0 || there.AvailableCapacity != 0 {
			t.Errorf("%v here, %v there", here, there)
		}
	}

	socket := filepath.Join(nodes[0].RunDir, "controller.sock")
	cmd := nodes[0].Command("controller", "--endpoint", "unix://"+socket)
	kit.OK(t, cmd.Start())
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the controller: %v", err)
		}
	})
	conn := dial(t, socket)
	identity, controller, nodePart := csipb.NewIdentityClient(conn), csipb.NewControllerClient(conn), csipb.NewNodeClient(conn)
	info, err := identity.GetPluginInfo(t.Context(), &csipb.GetPluginInfoRequest{})
	if err != nil || info.Name != csi.DriverName || info.VendorVersion == "" {
		t.Errorf("%v, %v", info, err)
	}
	probe, err := identity.Probe(t.Context(), &csipb.ProbeRequest{})
	if err != nil || !probe.GetReady().GetValue() {
		t.Errorf("%v, %v", probe, err)
	}
	plugin, err := identity.GetPluginCapabilities(t.Context(), &csipb.GetPluginCapabilitiesRequest{})
	if err != nil || len(plugin.Capabilities) != 3 {
		t.Errorf("%v, %v", plugin, err)
	}
	can, err := controller.ControllerGetCapabilities(t.Context(), &csipb.ControllerGetCapabilitiesRequest{})
	if err != nil || len(can.Capabilities) != 0 {
		t.Errorf("%v, %v", can, err)
	}
	onNode, err := nodePart.NodeGetCapabilities(t.Context(), &csipb.NodeGetCapabilitiesRequest{})
	if err != nil || len(onNode.Capabilities) != 1 || onNode.Capabilities[0].GetRpc().Type != csipb.NodeServiceCapability_RPC_EXPAND_VOLUME {
		t.Errorf("%v, %v", onNode, err)
	}
	_, err = controller.CreateVolume(t.Context(), creation("claim", 16*kit.Mi))
	wantCode(t, "create by nobody's node", err, codes.Unimplemented)
	for _, n := range nodes {
		n.delete(n.create("claim", 16*kit.Mi))
	}
}

// TestPools has one node with two pools: a StorageClass names one, or the one with more room is taken.
func TestPools(t *testing.T) {
	first := kit.NewPoolIn(t, kit.Backing(t, "ext4", kit.Gi))
	bulk := kit.Backing(t, "xfs", 2*kit.Gi)
	dir := filepath.Join(bulk, "pool")
	first.MustCroft("pool", "init", dir)
	n := startIn(t, first, "node-a", "none", "--pool", "bulk="+dir)
	capacity := func(parameters map[string]string) *csipb.GetCapacityResponse {
		c, err := n.GetCapacity(t.Context(), &csipb.GetCapacityRequest{Parameters: parameters})
		kit.OK(t, err)
		return c
	}
	all, fast, large, none := capacity(nil), capacity(map[string]string{"pool": "mnt"}), capacity(map[string]string{"pool": "bulk"}), capacity(map[string]string{"pool": "none"})
	if all.AvailableCapacity != fast.AvailableCapacity+large.AvailableCapacity || all.MaximumVolumeSize.Value != large.AvailableCapacity ||
		none.AvailableCapacity != 0 || all.MinimumVolumeSize.GetValue() != kit.Mi {
		t.Errorf("%v, of %v and %v; %v", all, fast, large, none)
	}
	if !(fast.MaximumVolumeSize.GetValue() < large.MaximumVolumeSize.GetValue()) {
		t.Errorf("%v, %v", fast, large)
	}
	anywhere := n.create("anywhere", 16*kit.Mi)
	named := n.createBy(changed("named", func(r *csipb.CreateVolumeRequest) { r.Parameters["pool"] = "mnt" }))
	if filepath.Dir(anywhere) == n.ID || filepath.Dir(named) != n.ID {
		t.Errorf("%s, %s", anywhere, named)
	}
	_, err := n.CreateVolume(t.Context(), changed("anywhere", func(r *csipb.CreateVolumeRequest) { r.Parameters["pool"] = "mnt" }))
	wantCode(t, "that name in the other pool", err, codes.AlreadyExists)
	for _, id := range []string{anywhere, named} {
		target := n.publish(id, "pod", capability(rwo))
		n.unpublish(id, target)
	}
	// A static PersistentVolume may name the pool as people do.
	target := n.publish("bulk/"+volumeName(anywhere), "static", capability(rwo))
	n.unpublish(anywhere, target)
	wantGone(t, target)
	_, err = n.CreateVolume(t.Context(), changed("moved", func(r *csipb.CreateVolumeRequest) {
		r.VolumeContentSource = fromVolume(anywhere)
		r.Parameters["pool"] = "mnt"
	}))
	wantCode(t, "a clone in another pool", err, codes.InvalidArgument)
	n.delete(anywhere)
	n.delete(named)
	n.Stop() // before the second filesystem goes
}
