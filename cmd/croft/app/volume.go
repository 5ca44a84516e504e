package app

import "github.com/spf13/cobra"

func (a *App) volumeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "Create, clone, list, resize, attach and delete volumes",
		Long: "Create, clone, list, resize, attach and delete volumes, whether their pool is mounted or not.\n\n" +
			"Sizes are written as Kubernetes writes them: 64Mi, 10Gi, 1T.",
		Aliases: []string{"vol"},
	}
	group(cmd)
	cmd.AddCommand(a.volumeCreateCommand(), a.volumeCloneCommand(), a.volumeAttachCommand(), a.volumeDetachCommand(), a.volumeListCommand(), a.volumeShowCommand(), a.volumeResizeCommand(), a.volumeDeleteCommand())
	return cmd
}
