package app

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *App) snapshotDeleteCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a snapshot",
		Long: "Delete a snapshot. Volumes that were restored from it stay. On a mounted pool the command\n" +
			"returns at once and the daemon frees the space.",
		Aliases:           []string{"rm"},
		Args:              func(_ *cobra.Command, args []string) error { return wantNames(args, "snapshot") },
		ValidArgsFunction: a.completeSnapshots,
	}
	dir := a.poolFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if err := p.DeleteSnapshot(ctx, args[0]); err != nil {
				return err
			}
			return a.waitFreed(ctx, p, "snapshot", args[0])
		})
	}
	return cmd
}
