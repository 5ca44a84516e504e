package app

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) poolCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pool", Short: "Make pools"}
	group(cmd)
	cmd.AddCommand(a.poolInitCommand())
	return cmd
}

func (a *App) poolInitCommand() *cobra.Command {
	var ifMissing bool
	cmd := &cobra.Command{
		Use:   "init [--if-missing] DIR",
		Short: "Make a pool of a directory",
		Long: "Make a pool of a directory on ext4, xfs or btrfs. The directory is empty, or does not\n" +
			"exist while its parent does. The pool's id is printed.",
		Args: asUsage(cobra.ExactArgs(1)),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if err := a.requireRoot(); err != nil {
				return err
			}
			id, err := pool.Init(args[0])
			if ifMissing && errors.Is(err, pool.ErrIsPool) {
				id, err = pool.ReadID(args[0])
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Stdout, id)
			return err
		},
	}
	cmd.Flags().BoolVar(&ifMissing, "if-missing", false, "when DIR is a pool already, leave it as it is and print its id")
	return cmd
}
