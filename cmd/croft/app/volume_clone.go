package app

import (
	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) volumeCloneCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "clone VOLUME NAME",
		Short: "Make a new volume that holds what another one does",
		Long: "Make a new volume that holds what another one does, while that is in use: as a snapshot that\n" +
			"is restored at once. Its limits are those of the other, or what is named.",
		Example:           "  croft volume clone web-0 web-0-test",
		Args:              func(_ *cobra.Command, args []string) error { return wantNames(args, "volume to clone", "new volume") },
		ValidArgsFunction: a.completeVolumes(true),
	}
	a.cloneInto(cmd, func(source string, o *pool.CloneOptions) { o.Volume = source })
	return cmd
}
