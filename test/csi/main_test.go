// Package csi_test runs `croft node` and calls it over its socket, as kubelet and the sidecars do: csi-sanity, and
// what that does not look at.
package csi_test

import (
	"slices"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) {
	kit.Main(m, map[string]kit.Helper{"sanity": runSanity, "write": runWrite})
}

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
	t.Cleanup(n.sweep)
	n.dial()
	return n
}

// sweep takes away the mounts and the loop devices that a test has left; one that has passed has left none.
func (n *node) sweep() {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.targets))
	if err != nil {
		n.t.Error(err)
	}
	for _, m := range slices.Backward(infos) {
		n.t.Errorf("a mount is left: %s on %s", m.Source, m.Mountpoint)
		_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	for _, device := range n.loops() {
		n.t.Errorf("a loop device is left: %s", device)
		kit.Exec(n.t, "losetup", "--detach", "/dev/"+device)
	}
}

func (n *node) dial() {
	n.t.Helper()
	conn := dial(n.t, n.CSISocket())
	n.IdentityClient, n.ControllerClient, n.NodeClient = csipb.NewIdentityClient(conn), csipb.NewControllerClient(conn), csipb.NewNodeClient(conn)
}

// reboot ends the daemon at once, takes away what a start of the machine would, and starts the next.
func (n *node) reboot(targets ...string) {
	n.t.Helper()
	n.Daemon().Kill()
	for _, at := range append(targets, n.Mnt) {
		kit.OK(n.t, unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	n.Mount()
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
