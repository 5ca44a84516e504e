package app

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) snapshotListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the snapshots of a pool",
		Aliases: []string{"ls"},
		Args:    asUsage(cobra.NoArgs),
	}
	dir := a.poolFlag(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			list, err := p.Snapshots(ctx)
			if err != nil {
				return err
			}
			if output.word == formatJSON {
				if list == nil {
					list = []pool.Snapshot{}
				}
				return writeJSON(a.Stdout, list)
			}
			rows := [][]string{snapshotHead}
			for _, s := range list {
				rows = append(rows, snapshotRow(s))
			}
			return writeTable(a.Stdout, rows)
		})
	}
	return cmd
}

func formatCount(n uint64) string { return strconv.FormatUint(n, 10) }
