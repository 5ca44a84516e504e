package app

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool/control"
)

func (a *App) metricsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "metrics",
		Short: "Print what a mounted pool tells Prometheus",
		Long: "Print the metrics of a mounted pool in the text form of Prometheus, as GET /metrics on its\n" +
			"control socket answers: its tier and why there is no better one, the volumes' limits and use,\n" +
			"which of them are gated, held system calls, FUSE requests, and the daemon's process.",
		Args:              asUsage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	dir := a.poolFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withDaemon(cmd.Context(), *dir, func(ctx context.Context, c *control.Client) error {
			text, err := c.Metrics(ctx)
			if err == nil {
				_, err = io.WriteString(a.Stdout, text)
			}
			return err
		})
	}
	return cmd
}
