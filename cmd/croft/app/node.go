package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/croftfs/croft/csi"
	"github.com/croftfs/croft/csi/kube"
	"github.com/croftfs/croft/fs/pool"
)

const (
	// sweepEvery is how often inline volumes of pods that are gone are looked for.
	sweepEvery = time.Hour
	// aliveTimeout is how long the mounts may take to answer a Probe, unless the caller waits for less.
	aliveTimeout = 5 * time.Second
	// spareForNode is what of a disk is for the filesystem's own blocks, in percent: XFS has 512 bytes for each inode,
	// which are 3 % where each 16 KiB have one.
	spareForNode = 5
)

// nodeOptions are what croft node has beside what croft mount has.
type nodeOptions struct {
	endpoint    string
	socket      string // of endpoint
	id          string
	mountRoot   string
	maxVolumes  int64
	change      bool // as Kubernetes' VolumeAttributesClass says
	targetRoots []string
	names       []string // of the pools, in the order of mountOptions.pools
}

// args is what of a command line is the node's.
func (o *nodeOptions) args(places []place) []string {
	args := []string{"--endpoint=" + o.endpoint, "--node-id=" + o.id, "--mount-root=" + o.mountRoot,
		"--max-volumes=" + strconv.FormatInt(o.maxVolumes, 10)}
	if o.change {
		args = append(args, "--volume-attributes")
	}
	for _, root := range o.targetRoots {
		args = append(args, "--target-root="+root)
	}
	for i, p := range places {
		args = append(args, "--pool="+o.names[i]+"="+p.dir)
	}
	return args
}

func (a *App) nodeCommand() *cobra.Command {
	o, n := newMountOptions(), nodeOptions{}
	o.node, o.promise = &n, promise{overcommit: 1, spare: spareForNode}
	cmd := &cobra.Command{
		Use:   "node --pool [NAME=]DIR...",
		Short: "Serve a node's pools to Kubernetes: the CSI driver",
		Long: "Mount pools, as `croft mount` does, and serve volumes of them by the Container Storage Interface\n" +
			"on a unix socket: identity, controller and node. NAME is what the parameter `pool` of a StorageClass\n" +
			"says; without it, it is the last part of DIR. Each pool is mounted on MOUNT_ROOT/NAME.",
		Example: "  croft node --pool fast=/srv/nvme --pool bulk=/srv/disk --target-root /var/lib/kubelet",
		Args:    asUsage(cobra.NoArgs),
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.pools, "pool", nil, "a pool: its name in the cluster and its directory, once for each (default $"+PoolEnv+")")
	f.StringVar(&n.endpoint, "endpoint", "unix://"+filepath.Join(a.RunDir, "csi", "csi.sock"), "the CSI socket")
	f.StringVar(&n.id, "node-id", "", "the node's name in the cluster (default the host's name)")
	f.StringVar(&n.mountRoot, "mount-root", filepath.Join(a.RunDir, "mounts"), "the directory that pools are mounted in")
	f.Int64Var(&n.maxVolumes, "max-volumes", 0, "how many volumes may be published on the node; 0: any number")
	f.StringArrayVar(&n.targetRoots, "target-root", nil, "a directory that volumes may be published in, once for each; kubelet's is\n/var/lib/kubelet (default: anywhere)")
	f.BoolVar(&n.change, "volume-attributes", false, "change volumes as their VolumeAttributesClass says, which `croft controller` tells by their\nPersistentVolumes: for a pod of the cluster")
	for _, name := range []string{"endpoint", "node-id", "max-volumes"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
	o.flags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		mountpoints, err := a.checkNode(&o)
		if err != nil {
			return err
		}
		return a.runMount(cmd, &o, mountpoints)
	}
	return cmd
}

// checkNode refuses what is wrong, takes the pools' names off their directories, and makes the mountpoints.
func (a *App) checkNode(o *mountOptions) (mountpoints []string, err error) {
	n := o.node
	if n.socket, err = csi.SocketPath(n.endpoint); err != nil {
		return nil, usage("--endpoint: %w", err)
	}
	if n.id == "" {
		if n.id, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("the host's name: %w: use --node-id", err)
		}
	}
	if dir := a.Getenv(PoolEnv); len(o.pools) == 0 && dir != "" {
		o.pools = []string{dir}
	}
	if n.mountRoot, err = filepath.Abs(n.mountRoot); err != nil {
		return nil, err
	}
	for i, word := range o.pools {
		name, dir, named := strings.Cut(word, "=")
		if !named {
			if dir, err = filepath.Abs(word); err != nil {
				return nil, err
			}
			name = filepath.Base(dir)
		}
		if err := pool.CheckName(name); err != nil {
			return nil, usage("--pool %s: NAME in NAME=DIR: %w", word, err)
		}
		n.names = append(n.names, name)
		o.pools[i] = dir
		mountpoints = append(mountpoints, filepath.Join(n.mountRoot, name))
	}
	if err := a.checkMountArgs(o, mountpoints); err != nil {
		return nil, err
	}
	if err := n.driver().Validate(); err != nil {
		return nil, usage("%w", err)
	}
	if err := a.requireRoot(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(n.mountRoot, 0o700); err != nil {
		return nil, fmt.Errorf("mount root: %w", err)
	}
	for _, at := range mountpoints {
		// Not MkdirAll, which would look at what is mounted there: it may wait for this process.
		if err := os.Mkdir(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return mountpoints, nil
}

// driver returns the options of the driver, but for its pools.
func (n *nodeOptions) driver() *csi.Options {
	o := &csi.Options{NodeID: n.id, MaxVolumes: n.maxVolumes, TargetRoots: n.targetRoots}
	for _, name := range n.names {
		o.Pools = append(o.Pools, csi.NamedPool{Name: name})
	}
	o.EnsureDefaults()
	return o
}

// serveCSI serves the daemon's pools until stop is called.
func (a *App) serveCSI(n *nodeOptions, d *server) (stop func(), err error) {
	o := n.driver()
	o.Version, o.Logger = a.version(), d.log.Named("csi")
	var mountpoints []string
	for i, s := range d.seats {
		o.Pools[i].Pool = s.pool
		mountpoints = append(mountpoints, s.mountpoint)
	}
	o.Alive = func(ctx context.Context) error { return alive(ctx, mountpoints) }
	driver, err := csi.New(*o)
	if err != nil {
		return nil, err
	}
	server, err := csi.Listen(driver, n.socket, o.Logger)
	if err != nil {
		driver.Close()
		return nil, err
	}
	d.metrics.MustRegister(server.Calls())
	sweeping, end := context.WithCancel(context.Background())
	swept := make(chan struct{})
	go func() {
		defer close(swept)
		sweep(sweeping, driver)
	}()
	changed := make(chan struct{})
	go func() {
		defer close(changed)
		if n.change {
			changeVolumes(sweeping, n, driver)
		}
	}()
	d.log.Info("serving CSI", zap.String("socket", n.socket), zap.String("node", n.id))
	return func() {
		end()
		<-changed
		ctx, cancel := context.WithTimeout(context.Background(), controlGrace)
		defer cancel()
		server.Shutdown(ctx)
		<-swept
		driver.Close()
	}, nil
}

// changeVolumes does what croft controller asks for. Whatever the API server does, the pools are served.
func changeVolumes(ctx context.Context, n *nodeOptions, driver *csi.Driver) {
	objects, _, err := kube.InCluster()
	if err != nil {
		driver.Logger.Error("volumes are not changed as their VolumeAttributesClass says", zap.Error(err))
		return
	}
	c := &kube.Changer{
		Objects: objects, Driver: csi.DriverName, TopologyKey: csi.TopologyKey, Node: n.id,
		Change: driver.Modify, Logger: driver.Logger,
	}
	c.Run(ctx)
}

func sweep(ctx context.Context, driver *csi.Driver) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if err := driver.Sweep(ctx); err != nil && ctx.Err() == nil {
			driver.Logger.Error("inline volumes of pods that are gone", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// alive asks the mounts, in a process of its own.
func alive(ctx context.Context, mountpoints []string) error {
	ctx, cancel := context.WithTimeout(ctx, aliveTimeout)
	defer cancel()
	var said strings.Builder
	p, err := startProbe(&said, append([]string{"--"}, mountpoints...)...)
	if err != nil {
		return err
	}
	select {
	case err := <-p.ended:
		if err != nil {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()))
		}
		return err
	case <-ctx.Done():
		p.abandon()
		return fmt.Errorf("no answer: %w", ctx.Err())
	}
}
