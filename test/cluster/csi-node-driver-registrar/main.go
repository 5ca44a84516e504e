// Command csi-node-driver-registrar tells the kubelet of a CSI driver on this node.  It stands
// in for node-driver-registrar, whose module the Go module proxy does not
// serve, and takes the same flags.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

type server struct {
	registration.UnsafeRegistrationServer
	name, endpoint string
}

func (s server) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              s.name,
		Endpoint:          s.endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (s server) NotifyRegistrationStatus(_ context.Context, st *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if !st.PluginRegistered {
		log.Fatalf("not registered: %s", st.Error)
	}
	log.Printf("registered %s", s.name)
	return &registration.RegistrationStatusResponse{}, nil
}

func main() {
	dir := flag.String("plugin-registration-path", "/registration", "folder of the kubelet's registration sockets")
	address := flag.String("csi-address", "/run/csi/socket", "path of the CSI driver's socket here")
	endpoint := flag.String("kubelet-registration-path", "", "path of the CSI driver's socket on the node")
	timeout := flag.Duration("timeout", time.Minute, "how long to wait for the driver")
	flag.Int("v", 0, "ignored")
	flag.Parse()

	conn, err := grpc.NewClient("unix://"+*address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithTimeout(context.Background(), *timeout)
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	stop()
	if err != nil {
		log.Fatal(err)
	}
	path := filepath.Join(*dir, info.Name+"-reg.sock")
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		log.Fatal(err)
	}
	s := grpc.NewServer()
	registration.RegisterRegistrationServer(s, server{name: info.Name, endpoint: *endpoint})
	log.Fatal(s.Serve(l))
}
