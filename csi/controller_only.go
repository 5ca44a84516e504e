package csi

import (
	"context"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// ControllerOnly is the part of the plugin that belongs to no node. It has no volumes. external-resizer, of which there
// is one in a cluster, finds here that volumes are expanded on their nodes, and leaves that to kubelet.
type ControllerOnly struct {
	Version string

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

// ControllerGetCapabilities has none: everything that is about a volume is done on its node.
func (c *ControllerOnly) ControllerGetCapabilities(context.Context, *csipb.ControllerGetCapabilitiesRequest) (*csipb.ControllerGetCapabilitiesResponse, error) {
	return &csipb.ControllerGetCapabilitiesResponse{}, nil
}

// NodeGetCapabilities tells that nodes expand volumes.
func (c *ControllerOnly) NodeGetCapabilities(context.Context, *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	return &csipb.NodeGetCapabilitiesResponse{Capabilities: []*csipb.NodeServiceCapability{
		nodeCapability(csipb.NodeServiceCapability_RPC_EXPAND_VOLUME),
	}}, nil
}
