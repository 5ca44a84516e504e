package app

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) snapshotCreateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create VOLUME NAME",
		Short: "Make a snapshot of a volume",
		Long: "Make a snapshot of a volume, while it is in use: what was written when the command began\n" +
			"is in it, and no write(2) is half in it. Writers of the volume are held meanwhile; the\n" +
			"command says for how long.",
		Example:           "  croft snapshot create web-0 web-0-monday",
		Args:              func(_ *cobra.Command, args []string) error { return wantNames(args, "volume", "snapshot") },
		ValidArgsFunction: a.completeVolumes(true),
	}
	dir := a.poolFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if err := a.settle(ctx, p); err != nil {
				return err
			}
			var s pool.Snapshot
			err := a.showing(ctx, p, pool.OperationSnapshot, args[1], func() (err error) {
				s, err = p.CreateSnapshot(ctx, args[1], pool.SnapshotOptions{Volume: args[0]})
				return err
			})
			if err == nil {
				a.tellHeld(args[0], s.Held)
			}
			return err
		})
	}
	return cmd
}

// tellHeld says how long the writers of a volume were held.
func (a *App) tellHeld(volume string, held time.Duration) {
	if held > 0 {
		a.notice("writers of volume %s were held for %s", volume, held.Round(100*time.Microsecond))
	}
}
