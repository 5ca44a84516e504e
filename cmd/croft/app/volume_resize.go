package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) volumeResizeCommand() *cobra.Command {
	var size sizeValue
	var inodes inodesValue
	cmd := &cobra.Command{
		Use:   "resize NAME [--size SIZE] [--inodes NUMBER]",
		Short: "Change a volume's limits, up or down to what is in use",
		Long: "Change a volume's limits at once, while it is in use. They can be lowered to what is in\n" +
			"use. An inode limit that was never named follows the size.",
		Example:           "  croft volume resize web-0 --size 20Gi",
		Args:              oneName,
		ValidArgsFunction: a.completeVolumes(true),
	}
	dir := a.poolFlag(cmd)
	cmd.Flags().Var(&size, "size", "new limit in bytes, such as 64Mi, 10Gi, 1T")
	cmd.Flags().Var(&inodes, "inodes", "new limit in inodes")
	complete(cmd, "size", cobra.NoFileCompletions)
	complete(cmd, "inodes", cobra.NoFileCompletions)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if size == 0 && inodes == 0 {
			return usage("volume %s: to which size? Name --size, --inodes or both", args[0])
		}
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if _, err := p.Volume(ctx, args[0]); err != nil {
				return err
			}
			if err := a.settle(ctx, p); err != nil {
				return err
			}
			_, err := p.Resize(ctx, args[0], pool.ResizeOptions{Bytes: uint64(size), Inodes: uint64(inodes)})
			if errors.Is(err, pool.ErrBelowUse) {
				return belowUse(ctx, p, args[0], err)
			}
			return err
		})
	}
	return cmd
}

// belowUse says in place of err how far the volume can be shrunk.
func belowUse(ctx context.Context, p *access, name string, err error) error {
	v, showErr := p.Volume(ctx, name)
	if showErr != nil {
		return err
	}
	return fmt.Errorf("volume %s: %w: %d bytes (%s) and %d inodes are, the limits can be lowered to that",
		name, pool.ErrBelowUse, v.Used.Bytes, human(v.Used.Bytes), v.Used.Inodes)
}
