package app

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *App) volumeShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one volume",
		Args:              oneName,
		ValidArgsFunction: a.completeVolumes(true),
	}
	dir := a.poolFlag(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if _, err := p.Volume(ctx, args[0]); err != nil {
				return err // before waiting for counts
			}
			if err := a.settle(ctx, p); err != nil {
				return err
			}
			v, err := p.Volume(ctx, args[0])
			if err != nil {
				return err
			}
			return writeVolume(a.Stdout, output.word, v)
		})
	}
	return cmd
}
