package app

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *App) volumeListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the volumes of a pool",
		Aliases: []string{"ls"},
		Args:    asUsage(cobra.NoArgs),
	}
	dir := a.poolFlag(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if err := a.settle(ctx, p); err != nil {
				return err
			}
			list, err := p.Volumes(ctx)
			if err != nil {
				return err
			}
			return writeVolumes(a.Stdout, output.word, list)
		})
	}
	return cmd
}
