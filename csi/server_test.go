package csi

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// serve serves a plugin on a socket until the test's end, and returns a client of it.
func serve(t testing.TB, p Plugin, socket string, log *zap.Logger) *grpc.ClientConn {
	t.Helper()
	server, err := Listen(p, socket, log)
	ok(t, err)
	t.Cleanup(func() { server.Shutdown(context.Background()) })
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestControllerOnly wants the plugin of no node to tell what external-resizer asks for, and to do nothing.
func TestControllerOnly(t *testing.T) {
	conn := serve(t, &ControllerOnly{Version: "7"}, filepath.Join(t.TempDir(), "csi.sock"), zap.NewNop())
	ctx := t.Context()
	info, err := csipb.NewIdentityClient(conn).GetPluginInfo(ctx, &csipb.GetPluginInfoRequest{})
	if err != nil || info.GetName() != DriverName || info.GetVendorVersion() != "7" {
		t.Errorf("info: %v, %v", info, err)
	}
	plugin, err := csipb.NewIdentityClient(conn).GetPluginCapabilities(ctx, &csipb.GetPluginCapabilitiesRequest{})
	ok(t, err)
	var controller, online bool
	for _, c := range plugin.GetCapabilities() {
		controller = controller || c.GetService().GetType() == csipb.PluginCapability_Service_CONTROLLER_SERVICE
		online = online || c.GetVolumeExpansion().GetType() == csipb.PluginCapability_VolumeExpansion_ONLINE
	}
	if !controller || !online {
		t.Errorf("capabilities of the plugin: %v", plugin)
	}
	if r, err := csipb.NewControllerClient(conn).ControllerGetCapabilities(ctx, &csipb.ControllerGetCapabilitiesRequest{}); err != nil || len(r.GetCapabilities()) > 0 {
		t.Errorf("capabilities of the controller: %v, %v", r, err)
	}
	node, err := csipb.NewNodeClient(conn).NodeGetCapabilities(ctx, &csipb.NodeGetCapabilitiesRequest{})
	if err != nil || len(node.GetCapabilities()) != 1 || node.GetCapabilities()[0].GetRpc().GetType() != csipb.NodeServiceCapability_RPC_EXPAND_VOLUME {
		t.Errorf("capabilities of the node: %v, %v", node, err)
	}
	ready, err := csipb.NewIdentityClient(conn).Probe(ctx, &csipb.ProbeRequest{})
	if err != nil || !ready.GetReady().GetValue() {
		t.Errorf("probe: %v, %v", ready, err)
	}

	served := []string{"GetPluginInfo", "GetPluginCapabilities", "Probe", "ControllerGetCapabilities", "NodeGetCapabilities"}
	for _, service := range []grpc.ServiceDesc{csipb.Identity_ServiceDesc, csipb.Controller_ServiceDesc, csipb.Node_ServiceDesc} {
		for _, m := range service.Methods {
			want := codes.Unimplemented
			if slices.Contains(served, m.MethodName) {
				want = codes.OK
			}
			// On the wire an empty message is one of any type.
			name := "/" + service.ServiceName + "/" + m.MethodName
			if err := conn.Invoke(ctx, name, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != want {
				t.Errorf("%s: %v, want %s", name, err, want)
			}
		}
	}
}

func TestSocketPath(t *testing.T) {
	for _, endpoint := range []string{"unix:///run/csi.sock", "unix:/run/csi.sock", "/run/csi.sock"} {
		if at, err := SocketPath(endpoint); err != nil || at != "/run/csi.sock" {
			t.Errorf("%s: %q, %v", endpoint, at, err)
		}
	}
	for _, endpoint := range []string{"", "csi.sock", "unix://csi.sock", "tcp://127.0.0.1:1", "unix://"} {
		if at, err := SocketPath(endpoint); err == nil {
			t.Errorf("%s: %q", endpoint, at)
		}
	}
}

// TestListen wants a dead socket replaced, and neither one that somebody listens on nor a file that is no socket.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	ok(t, err)
	l.SetUnlinkOnClose(false)
	ok(t, l.Close())
	serve(t, &ControllerOnly{}, dead, zap.NewNop())
	if fi, err := os.Stat(dead); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", fi, err)
	}
	if s, err := Listen(&ControllerOnly{}, dead, zap.NewNop()); err == nil {
		s.Shutdown(t.Context())
		t.Error("two listen on one socket")
	}
	file := filepath.Join(dir, "letter")
	ok(t, os.WriteFile(file, []byte("dear"), 0o600))
	if s, err := Listen(&ControllerOnly{}, file, zap.NewNop()); err == nil {
		s.Shutdown(t.Context())
		t.Error("a file became a socket")
	}
	if body, err := os.ReadFile(file); err != nil || string(body) != "dear" {
		t.Errorf("the file: %q, %v", body, err)
	}
}
