package csi_test

import (
	"os"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/croftfs/croft/test/kit"
)

// capability is what a volume is to be used as.
func capability(mode csipb.VolumeCapability_AccessMode_Mode, flags ...string) *csipb.VolumeCapability {
	return &csipb.VolumeCapability{
		AccessMode: &csipb.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{MountFlags: flags}},
	}
}

// forGroup is a capability of a pod with that fsGroup.
func forGroup(group string) *csipb.VolumeCapability {
	c := capability(csipb.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER)
	c.GetMount().VolumeMountGroup = group
	return c
}

func blockCapability(mode csipb.VolumeCapability_AccessMode_Mode) *csipb.VolumeCapability {
	return &csipb.VolumeCapability{
		AccessMode: &csipb.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csipb.VolumeCapability_Block{Block: &csipb.VolumeCapability_BlockVolume{}},
	}
}

const (
	rwop = csipb.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	rwo  = csipb.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	rox  = csipb.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	rwx  = csipb.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
)

func creation(name string, bytes int64) *csipb.CreateVolumeRequest {
	return &csipb.CreateVolumeRequest{
		Name:               name,
		CapacityRange:      &csipb.CapacityRange{RequiredBytes: bytes},
		VolumeCapabilities: []*csipb.VolumeCapability{capability(rwo)},
	}
}

// create creates a volume and returns its id.
func (n *node) create(name string, bytes int64) string {
	n.t.Helper()
	return n.createBy(creation(name, bytes))
}

func (n *node) createBy(r *csipb.CreateVolumeRequest) string {
	n.t.Helper()
	v, err := n.CreateVolume(n.t.Context(), r)
	kit.OK(n.t, err)
	return v.GetVolume().GetVolumeId()
}

func (n *node) delete(id string) {
	n.t.Helper()
	_, err := n.DeleteVolume(n.t.Context(), &csipb.DeleteVolumeRequest{VolumeId: id})
	kit.OK(n.t, err)
}

// target makes the directory of a pod, as kubelet does, and returns the target path in it, which is not there.
func (n *node) target(pod string) string {
	n.t.Helper()
	dir := filepath.Join(n.targets, pod)
	kit.OK(n.t, os.MkdirAll(dir, 0o755))
	return filepath.Join(dir, "mount")
}

func publication(id, target string, c *csipb.VolumeCapability) *csipb.NodePublishVolumeRequest {
	return &csipb.NodePublishVolumeRequest{VolumeId: id, TargetPath: target, VolumeCapability: c}
}

// publish publishes a volume for a pod and returns where.
func (n *node) publish(id, pod string, c *csipb.VolumeCapability) string {
	n.t.Helper()
	target := n.target(pod)
	_, err := n.NodePublishVolume(n.t.Context(), publication(id, target, c))
	kit.OK(n.t, err)
	return target
}

func (n *node) unpublish(id, target string) {
	n.t.Helper()
	_, err := n.NodeUnpublishVolume(n.t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
	kit.OK(n.t, err)
}

func wantCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v: %v, want %v", what, got, err, want)
	}
}
