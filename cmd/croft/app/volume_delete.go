package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) volumeDeleteCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a volume and all that is in it",
		Long: "Delete a volume and all that is in it. On a mounted pool the command returns at once and\n" +
			"the daemon frees the space. On one that is not mounted it frees the space itself; what an\n" +
			"interrupt leaves is freed when the pool is used next. There is no question and no way back.",
		Aliases:           []string{"rm"},
		Args:              oneName,
		ValidArgsFunction: a.completeVolumes(true),
	}
	dir := a.poolFlag(cmd)
	force := cmd.Flags().Bool("force", false, "even if its files are open: they answer ESTALE from then on")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if err := p.Delete(ctx, args[0], pool.DeleteOptions{Force: *force}); err != nil {
				return err
			}
			return a.waitFreed(ctx, p, "volume", args[0])
		})
	}
	return cmd
}

// waitFreed waits until what was deleted is freed, when this process is the one who does it.
func (a *App) waitFreed(ctx context.Context, p *access, kind, name string) error {
	if p.local == nil {
		return nil
	}
	// Closing the pool would stop the freeing.
	err := p.local.WaitTrash(ctx)
	switch {
	case errors.Is(err, context.Canceled):
		a.notice("%s %s is deleted; the rest of its space is freed when the pool is used next", kind, name)
	case err != nil:
		return fmt.Errorf("%s %s is deleted, but freeing its space: %w", kind, name, err)
	}
	return nil
}
