package csi

import (
	"context"
	"fmt"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// GetPluginInfo tells name and version.
func (d *Driver) GetPluginInfo(context.Context, *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	return &csipb.GetPluginInfoResponse{Name: DriverName, VendorVersion: d.Version}, nil
}

// GetPluginCapabilities tells that there is a Controller, that volumes belong to a node, and that volumes grow in use.
func (d *Driver) GetPluginCapabilities(context.Context, *csipb.GetPluginCapabilitiesRequest) (*csipb.GetPluginCapabilitiesResponse, error) {
	return &csipb.GetPluginCapabilitiesResponse{Capabilities: []*csipb.PluginCapability{
		pluginService(csipb.PluginCapability_Service_CONTROLLER_SERVICE),
		pluginService(csipb.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS),
		onlineExpansion(),
	}}, nil
}

func pluginService(t csipb.PluginCapability_Service_Type) *csipb.PluginCapability {
	return &csipb.PluginCapability{Type: &csipb.PluginCapability_Service_{Service: &csipb.PluginCapability_Service{Type: t}}}
}

func onlineExpansion() *csipb.PluginCapability {
	return &csipb.PluginCapability{Type: &csipb.PluginCapability_VolumeExpansion_{
		VolumeExpansion: &csipb.PluginCapability_VolumeExpansion{Type: csipb.PluginCapability_VolumeExpansion_ONLINE}}}
}

// Probe is true when the mounts of all pools answer. FAILED_PRECONDITION, which has the CO start the plugin anew, when they do not.
func (d *Driver) Probe(ctx context.Context, _ *csipb.ProbeRequest) (*csipb.ProbeResponse, error) {
	if err := d.Alive(ctx); err != nil {
		return nil, status.Error(codes.FailedPrecondition, fmt.Sprintf("the mounts do not answer: %s", err))
	}
	return &csipb.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}
