package app

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) volumeAttachCommand() *cobra.Command {
	var o pool.AttachOptions
	cmd := &cobra.Command{
		Use:   "attach NAME",
		Short: "Make a block volume a block device, and print which",
		Long: "Make a block volume a block device and print its name, such as /dev/loop0. One that is attached\n" +
			"keeps its device. It stays attached when the daemon ends.",
		Args:              oneName,
		ValidArgsFunction: a.completeVolumes(true),
	}
	dir := a.poolFlag(cmd)
	output := outputFlag(cmd)
	cmd.Flags().BoolVar(&o.ReadOnly, "read-only", false, "refuse writes to the device")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			attachment, err := p.Attach(ctx, args[0], o)
			switch {
			case err != nil:
			case output.word == formatJSON:
				err = writeJSON(a.Stdout, attachment)
			default:
				_, err = fmt.Fprintln(a.Stdout, attachment.Device)
			}
			return err
		})
	}
	return cmd
}

func (a *App) volumeDetachCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "detach NAME",
		Short:             "Take a block volume's device away",
		Long:              "Take a block volume's device away. It must be neither mounted nor open. One that has none is fine.",
		Args:              oneName,
		ValidArgsFunction: a.completeVolumes(true),
	}
	dir := a.poolFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error { return p.Detach(ctx, args[0]) })
	}
	return cmd
}
