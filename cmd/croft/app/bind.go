package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/transport"
)

// bindCommand is what a daemon runs in a process of its own: see bindElsewhere.
func bindCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "bind SOURCE TARGET [FLAG...]",
		Short:  "Mount a directory of a mount elsewhere",
		Hidden: true,
		Args:   asUsage(cobra.MinimumNArgs(2)),
		RunE: func(_ *cobra.Command, args []string) error {
			return transport.Bind(args[0], args[1], args[2:])
		},
	}
}

// bindElsewhere is transport.Bind in another process. It looks source up, which is in the daemon's own mount: a thread of
// the daemon that waits for that when the daemon is killed would keep its files open, and with them the pool's
// lock, so that nobody could take over and answer. The process ends with the daemon: the next one sees what it has mounted,
// and nothing is mounted after that.
func bindElsewhere(ctx context.Context, source, target string, flags []string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"bind", "--", source, target}, flags...)...)
	cmd.Args[0] = "croft"
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // whose death the signal tells of
	defer runtime.UnlockOSThread()
	var said bytes.Buffer
	cmd.Stderr = &said
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("mount on %s: %w", target, ctx.Err())
	case errors.As(err, &exit) && said.Len() > 0:
		return errors.New(strings.TrimPrefix(strings.TrimSpace(said.String()), "croft: "))
	}
	return err
}
