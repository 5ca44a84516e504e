// Command bench measures Croft beside the native directory and beside other FUSE
// filesystems, interleaved in one run, and reports ratios to native. See README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Exit statuses.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitNoisy       = 3
	exitInterrupted = 130
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	defer stop()
	cmd := command()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench: interrupted; everything was taken away")
		return exitInterrupted
	}
	fmt.Fprintln(os.Stderr, "bench:", err)
	switch {
	case errors.Is(err, errNoisy):
		return exitNoisy
	case errors.Is(err, errUsage):
		return exitUsage
	}
	return exitFailure
}

func command() *cobra.Command {
	o := options{}
	cmd := &cobra.Command{
		Use:           "bench",
		Short:         "Measure Croft beside the native directory and other FUSE filesystems",
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.validate(); err != nil {
				return err
			}
			return measure(cmd.Context(), &o)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	o.register(cmd.Flags())
	cmd.AddCommand(loopCommand())
	return cmd
}
