package app

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/croftfs/croft/csi"
	"github.com/croftfs/croft/csi/kube"
)

// controllerOptions are the flags of croft controller.
type controllerOptions struct {
	endpoint  string
	change    bool
	place     bool
	deadNodes *choice
	after     time.Duration
	name      string
}

func (a *App) controllerCommand() *cobra.Command {
	o := controllerOptions{deadNodes: newChoice(string(kube.PolicyOff), string(kube.PolicyRetain), string(kube.PolicyDelete))}
	logging := newLogOptions()
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Serve the part of the CSI driver that belongs to no node",
		Long: "Serve the part of the CSI driver that belongs to no node, for external-resizer: it tells that\n" +
			"volumes are expanded on their nodes. It has no pool, and runs until SIGTERM.\n" +
			"\n" +
			"As a pod it can do more, each by a flag: have volumes changed (--volume-attributes), have copies made\n" +
			"where their sources are (--place-copies), and let go of the volumes of nodes that have left the\n" +
			"cluster for good (--dead-nodes). It never touches data, nor a volume of a node that is only not ready.",
		Args: asUsage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			socket, err := csi.SocketPath(o.endpoint)
			if err != nil {
				return usage("--endpoint: %w", err)
			}
			if o.after < kube.MinGrace {
				return usage("--dead-nodes-after %s: it is %s at least, so that a node may come back", o.after, kube.MinGrace)
			}
			log, err := logging.logger(a.Stderr)
			if err != nil {
				return err
			}
			return a.runController(cmd.Context(), &o, socket, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.endpoint, "endpoint", "unix://"+filepath.Join(a.RunDir, "csi", "controller.sock"), "the CSI socket")
	f.BoolVar(&o.change, "volume-attributes", false, "have volumes changed by their nodes' daemons when their VolumeAttributesClass changes; the\ndaemons have the flag, too, and external-resizer --extra-modify-metadata")
	f.BoolVar(&o.place, "place-copies", false, "have claims that are made from a snapshot or another claim scheduled to the node where that is")
	o.deadNodes.flag(cmd, "dead-nodes", "", "what becomes of the volumes of a node that has left the cluster: nothing (off); their\nclaims are deleted, so that a StatefulSet makes new ones elsewhere, and the\nPersistentVolumes stay (retain), or go as well where their reclaim policy is Delete (delete)")
	f.DurationVar(&o.after, "dead-nodes-after", kube.DefaultGrace, "how long a node must have been gone")
	f.StringVar(&o.name, "name", "", "who acts, in events (default the host's name)")
	for _, name := range []string{"endpoint", "dead-nodes-after", "name"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
	logging.flags(cmd)
	return cmd
}

func (a *App) runController(ctx context.Context, o *controllerOptions, socket string, log *zap.Logger) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	var tasks sync.WaitGroup // until ctx ends
	if err := placeCopies(ctx, o, log, &tasks); err != nil {
		return err
	}
	if err := releaseDead(ctx, o, log, &tasks); err != nil {
		return err
	}
	plugin := &csi.ControllerOnly{Version: a.version()}
	if o.change {
		objects, _, err := kube.InCluster()
		if err != nil {
			return err
		}
		asker := &kube.Asker{Objects: objects, Driver: csi.DriverName, TopologyKey: csi.TopologyKey}
		plugin.Modify = func(ctx context.Context, pv, volume string, parameters map[string]string) (uint32, string, error) {
			answer, err := asker.Ask(ctx, pv, volume, parameters)
			return answer.Code, answer.Message, err
		}
	}
	server, err := csi.Listen(plugin, socket, log)
	if err != nil {
		return err
	}
	a.notify("READY=1\nSTATUS=serving CSI")
	log.Info("serving CSI", zap.String("socket", socket))
	<-ctx.Done()
	a.notify("STOPPING=1")
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), controlGrace)
	defer cancel()
	server.Shutdown(grace)
	tasks.Wait()
	return nil
}

// placeCopies begins to send claims with a source to its node.
func placeCopies(ctx context.Context, o *controllerOptions, log *zap.Logger, tasks *sync.WaitGroup) (err error) {
	if !o.place {
		return nil
	}
	p := &kube.Placer{Driver: csi.DriverName, TopologyKey: csi.TopologyKey, Logger: log.Named("place-copies")}
	if p.Objects, p.Metadata, err = kube.InCluster(); err != nil {
		return err
	}
	tasks.Go(func() { p.Run(ctx) })
	return nil
}

// releaseDead begins to let go of the volumes of nodes that are gone.
func releaseDead(ctx context.Context, o *controllerOptions, log *zap.Logger, tasks *sync.WaitGroup) (err error) {
	if o.deadNodes.word == string(kube.PolicyOff) {
		return nil
	}
	options := kube.Options{
		Driver: csi.DriverName, TopologyKey: csi.TopologyKey, Policy: kube.Policy(o.deadNodes.word), Grace: o.after,
		Name: o.name, Logger: log.Named("dead-nodes"),
	}
	if options.Name == "" {
		if options.Name, err = os.Hostname(); err != nil {
			return err
		}
	}
	if options.Objects, options.Metadata, err = kube.InCluster(); err != nil {
		return err
	}
	r, err := kube.New(options)
	if err != nil {
		return err
	}
	log.Info("letting go of the volumes of nodes that are gone", zap.String("policy", o.deadNodes.word), zap.Duration("after", o.after))
	tasks.Go(func() { r.Run(ctx) })
	return nil
}
