// Package csi_test runs `croft node` and calls it over its socket, as kubelet and the sidecars do: csi-sanity, and
// what that does not look at.
package csi_test

import (
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) { kit.Main(m, map[string]kit.Helper{"sanity": runSanity}) }

// node is a `croft node` of one pool, and a client of it.
type node struct {
	*kit.Pool
	t       testing.TB
	targets string // where volumes are published
	csipb.IdentityClient
	csipb.ControllerClient
	csipb.NodeClient
}

// start starts one with those arguments; keeper is its --keeper.
func start(t testing.TB, fstype, keeper string, args ...string) *node {
	t.Helper()
	return startIn(t, kit.NewPool(t, fstype), "node-a", keeper, args...)
}

func startIn(t testing.TB, p *kit.Pool, name, keeper string, args ...string) *node {
	t.Helper()
	p.Node, p.Keeper, p.MountArgs = name, keeper, args
	p.Mount()
	n := &node{Pool: p, t: t, targets: kit.TempDir(t)}
	n.dial()
	return n
}

func (n *node) dial() {
	n.t.Helper()
	conn := dial(n.t, n.CSISocket())
	n.IdentityClient, n.ControllerClient, n.NodeClient = csipb.NewIdentityClient(conn), csipb.NewControllerClient(conn), csipb.NewNodeClient(conn)
}

// dial connects with a socket; calls wait until somebody listens there.
func dial(t testing.TB, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	kit.OK(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}
