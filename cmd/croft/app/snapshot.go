package app

import (
	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Create, list, delete snapshots of volumes, and restore them",
		Long: "Create, list, delete snapshots of volumes, and restore them to new volumes, whether their pool\n" +
			"is mounted or not. A snapshot shows one moment of its volume, and stays when that is deleted.\n" +
			"Its files are reflinks on xfs and btrfs, and copies on ext4.",
		Aliases: []string{"snap"},
	}
	group(cmd)
	cmd.AddCommand(a.snapshotCreateCommand(), a.snapshotListCommand(), a.snapshotDeleteCommand(), a.snapshotRestoreCommand())
	return cmd
}

// completeSnapshots offers the snapshots of the pool, if a daemon has it, as the first argument.
func (a *App) completeSnapshots(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var names []cobra.Completion
	if p := a.completionDaemon(cmd); p != nil && len(args) == 0 {
		defer p.Close()
		list, _ := p.Snapshots(cmd.Context())
		for _, s := range list {
			names = append(names, s.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

var snapshotHead = []string{"NAME", "VOLUME", "KIND", "USED", "IUSED", "CREATED"}

func snapshotRow(s pool.Snapshot) []string {
	inodes := "-"
	if s.Kind != pool.KindBlock {
		inodes = formatCount(s.Used.Inodes)
	}
	return []string{s.Name, s.Volume, string(s.Kind), human(s.Used.Bytes), inodes, s.Created.Local().Format("2006-01-02 15:04:05")}
}
