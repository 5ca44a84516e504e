package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

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
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // whose death the signal tells of
	defer runtime.UnlockOSThread()
	err := runSelf(cmd)
	if ctx.Err() != nil {
		return fmt.Errorf("mount on %s: %w", target, ctx.Err())
	}
	return err
}

// notifyDevice is the descriptor that `croft notify` has /dev/fuse as.
const notifyDevice = 3

// notifyCommand is what a daemon runs in a process of its own: see notifyElsewhere.
func notifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "notify",
		Short:  "Hand the kernel a message from standard input",
		Hidden: true,
		Args:   asUsage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			message, err := io.ReadAll(os.Stdin)
			if err != nil {
				return err
			}
			return transport.Notify(notifyDevice, message)
		},
	}
}

// notifyElsewhere is transport.Notify in another process: see transport.Options.Notify. It is done also when the daemon is
// killed meanwhile.
func notifyElsewhere(dev int, message []byte) error {
	copied, err := unix.FcntlInt(uintptr(dev), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	device := os.NewFile(uintptr(copied), "/dev/fuse")
	defer device.Close()
	cmd := exec.Command("/proc/self/exe", "notify")
	cmd.ExtraFiles = []*os.File{device}
	cmd.Stdin = bytes.NewReader(message)
	return runSelf(cmd)
}

// runSelf runs a command of this program, and returns what it says is wrong.
func runSelf(cmd *exec.Cmd) error {
	cmd.Args[0] = "croft"
	var said bytes.Buffer
	cmd.Stderr = &said
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && said.Len() > 0 {
		return errors.New(strings.TrimPrefix(strings.TrimSpace(said.String()), "croft: "))
	}
	return err
}
