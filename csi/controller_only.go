package csi

import (
	"context"
	"fmt"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// ControllerOnly is the part of the plugin that belongs to no node. It has no volumes. external-resizer, of which there
// is one in a cluster, finds here that volumes are expanded on their nodes, and leaves that to kubelet.
type ControllerOnly struct {
	Version string
	// Modify has a volume's node change it, of which Kubernetes has the PV, and returns the gRPC status that it answered with. Default:
	// volumes are not changed.
	Modify func(ctx context.Context, pv, volume string, parameters map[string]string) (code uint32, message string, err error)

	csipb.UnimplementedIdentityServer
	csipb.UnimplementedControllerServer
	csipb.UnimplementedNodeServer
}

// GetPluginInfo tells name and version.
func (c *ControllerOnly) GetPluginInfo(context.Context, *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	return &csipb.GetPluginInfoResponse{Name: DriverName, VendorVersion: c.Version}, nil
}

// GetPluginCapabilities tells that volumes grow in use.
func (c *ControllerOnly) GetPluginCapabilities(context.Context, *csipb.GetPluginCapabilitiesRequest) (*csipb.GetPluginCapabilitiesResponse, error) {
	return &csipb.GetPluginCapabilitiesResponse{Capabilities: []*csipb.PluginCapability{
		pluginService(csipb.PluginCapability_Service_CONTROLLER_SERVICE),
		pluginService(csipb.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS),
		onlineExpansion(),
	}}, nil
}

// Probe is true.
func (c *ControllerOnly) Probe(context.Context, *csipb.ProbeRequest) (*csipb.ProbeResponse, error) {
	return &csipb.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

// ControllerGetCapabilities has nothing but Modify: everything that is about a volume is done on its node.
func (c *ControllerOnly) ControllerGetCapabilities(context.Context, *csipb.ControllerGetCapabilitiesRequest) (*csipb.ControllerGetCapabilitiesResponse, error) {
	r := &csipb.ControllerGetCapabilitiesResponse{}
	if c.Modify != nil {
		r.Capabilities = append(r.Capabilities, &csipb.ControllerServiceCapability{Type: &csipb.ControllerServiceCapability_Rpc{
			Rpc: &csipb.ControllerServiceCapability_RPC{Type: csipb.ControllerServiceCapability_RPC_MODIFY_VOLUME}}})
	}
	return r, nil
}

// kubernetesPV is where external-resizer puts the name of a volume's PV, with --extra-modify-metadata.
const kubernetesPV = "csi.storage.k8s.io/pv/name"

// modifyMargin is what of a call's time is left to tell that the node has not answered.
const modifyMargin = 2 * time.Second

// ControllerModifyVolume has the volume's node do it, and answers as that does; UNAVAILABLE when it does not in time.
func (c *ControllerOnly) ControllerModifyVolume(ctx context.Context, r *csipb.ControllerModifyVolumeRequest) (*csipb.ControllerModifyVolumeResponse, error) {
	if c.Modify == nil {
		return c.UnimplementedControllerServer.ControllerModifyVolume(ctx, r)
	}
	pv := r.GetMutableParameters()[kubernetesPV]
	if r.GetVolumeId() == "" || pv == "" {
		return nil, fmt.Errorf("%w: a volume_id and the parameter %s are needed: external-resizer gives it with --extra-modify-metadata", ErrArgument, kubernetesPV)
	}
	var params parameters
	if err := params.parse(r.GetMutableParameters(), ParameterInodes); err != nil {
		return nil, err
	}
	if until, limited := ctx.Deadline(); limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until.Add(-modifyMargin))
		defer cancel()
	}
	code, message, err := c.Modify(ctx, pv, r.GetVolumeId(), r.GetMutableParameters())
	switch {
	case err != nil:
		return nil, status.Error(codes.Unavailable, err.Error())
	case codes.Code(code) != codes.OK:
		return nil, status.Error(codes.Code(code), message)
	}
	return &csipb.ControllerModifyVolumeResponse{}, nil
}

// NodeGetCapabilities tells that nodes expand volumes.
func (c *ControllerOnly) NodeGetCapabilities(context.Context, *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	return &csipb.NodeGetCapabilitiesResponse{Capabilities: []*csipb.NodeServiceCapability{
		nodeCapability(csipb.NodeServiceCapability_RPC_EXPAND_VOLUME),
	}}, nil
}
