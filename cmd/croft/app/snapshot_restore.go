package app

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) snapshotRestoreCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restore SNAPSHOT NAME",
		Short: "Make a new volume from a snapshot",
		Long: "Make a new volume from a snapshot. Its limits are those that the snapshot's volume had, or\n" +
			"what is named, but not less than the snapshot uses.",
		Example:           "  croft snapshot restore web-0-monday web-1 --size 20Gi",
		Args:              func(_ *cobra.Command, args []string) error { return wantNames(args, "snapshot", "volume") },
		ValidArgsFunction: a.completeSnapshots,
	}
	a.cloneInto(cmd, func(source string, o *pool.CloneOptions) { o.Snapshot = source })
	return cmd
}

// cloneInto makes cmd one that makes a volume, its second argument, from a source, its first.
func (a *App) cloneInto(cmd *cobra.Command, from func(source string, o *pool.CloneOptions)) {
	var size sizeValue
	var inodes inodesValue
	var o pool.CloneOptions
	dir := a.poolFlag(cmd)
	cmd.Flags().Var(&size, "size", "limit in bytes, such as 64Mi, 10Gi, 1T (default the source's)")
	cmd.Flags().Var(&inodes, "inodes", "limit in inodes (default the source's if one was named, else following the size)")
	wipeFlag(cmd, &o.Wipe)
	for _, flag := range []string{"size", "inodes"} {
		complete(cmd, flag, cobra.NoFileCompletions)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		from(args[0], &o)
		o.Bytes, o.Inodes = uint64(size), uint64(inodes)
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			if err := a.settle(ctx, p); err != nil {
				return err
			}
			var v pool.Volume
			err := a.showing(ctx, p, pool.OperationClone, args[1], func() (err error) {
				v, err = p.Clone(ctx, args[1], o)
				return err
			})
			if err == nil && v.Source != nil {
				a.tellHeld(args[0], v.Source.Held)
			}
			return err
		})
	}
}
