// Package app is the croft command: one file a subcommand.
//
// Volume commands work through the daemon that has the pool mounted, or, when
// there is none, on the pool itself under its lock; find.go decides which.
// Results go to stdout, everything else to stderr. Exit codes: see ExitOK and those after it.
package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/pool/control"
)

// Exit codes.
const (
	ExitOK       = 0
	ExitFailure  = 1 // it could not be done
	ExitUsage    = 2 // the command line is wrong; nothing was tried
	ExitFindings = 3 // check found something
)

// PoolEnv names the environment variable with the pool's directory.
const PoolEnv = "CROFT_POOL"

// Options configure an App. Zero fields have the defaults of a real process.
type Options struct {
	// Version is what the build says it is. Default: what the Go toolchain recorded.
	Version string
	// Stdout and Stderr default to the process's own.
	Stdout, Stderr io.Writer
	// Getenv defaults to os.Getenv.
	Getenv func(string) string
	// RunDir is where control sockets are. Default control.RunDir().
	RunDir string
	// Patience is how long a command waits for a pool that another command holds. Default 15 s.
	Patience time.Duration

	geteuid func() int
	open    func(pool.Options) (localPool, error)
	notify  func(state string) // tells systemd
	watched func() bool        // whether somebody looks at Stderr: it is a terminal
}

// EnsureDefaults puts the default where a field is zero.
func (o *Options) EnsureDefaults() {
	if o.Stdout == nil {
		o.Stdout = os.Stdout
	}
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	if o.RunDir == "" {
		o.RunDir = control.RunDir()
	}
	if o.Patience == 0 {
		o.Patience = 15 * time.Second
	}
	if o.geteuid == nil {
		o.geteuid = os.Geteuid
	}
	if o.open == nil {
		o.open = func(o pool.Options) (localPool, error) {
			p, err := pool.Open(o)
			if err != nil {
				return nil, err
			}
			return p, nil
		}
	}
	if o.watched == nil {
		stderr := o.Stderr
		o.watched = func() bool { return isTerminal(stderr) }
	}
	if o.notify == nil {
		o.notify = func(state string) {
			// Without systemd there is nobody to tell, and nothing to do about it.
			_, _ = daemon.SdNotify(false, state)
		}
	}
}

// isTerminal tells whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// App is the croft command.
type App struct {
	Options
}

// New returns an App.
func New(o Options) *App {
	o.EnsureDefaults()
	return &App{Options: o}
}

// Run executes one command line, without the program's name, and returns the exit code.
func (a *App) Run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	return a.report(cmd, err)
}

func (a *App) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "croft",
		Short:         "Local volumes with hard limits, carved out of any directory",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage("%w", err) })
	group(root)
	root.AddCommand(a.poolCommand(), a.volumeCommand(), a.snapshotCommand(), a.mountCommand(), a.nodeCommand(), a.controllerCommand(),
		a.keeperCommand(), bindCommand(), notifyCommand(), a.probeCommand(), a.checkCommand(), a.requestsCommand(), a.metricsCommand(), a.doctorCommand(), a.versionCommand())
	addCompletion(root)
	return root
}

// group makes cmd one that only has subcommands: by itself it shows its help, and anything else is wrong.
func group(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		hint := ""
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = fmt.Sprintf(": did you mean %s?", near[0])
		}
		return usage("unknown command %q%s", args[0], hint)
	}
}

// asUsage makes what a cobra.PositionalArgs refuses a usage error.
func asUsage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usage("%w", err)
		}
		return nil
	}
}

// oneName wants exactly one argument that can be a volume's name.
func oneName(_ *cobra.Command, args []string) error { return wantNames(args, "volume") }

// wantNames wants as many names as there are words that say what they are names of.
func wantNames(args []string, what ...string) error {
	switch {
	case len(args) < len(what):
		return usage("name the %s", what[len(args)])
	case len(args) > len(what) && len(what) == 1:
		return usage("one %s at a time: %q is too many", what[0], args[1])
	case len(args) > len(what):
		return usage("%q is too many", args[len(what)])
	}
	return names(args)
}

// names checks names of volumes.
func names(args []string) error {
	for _, name := range args {
		if err := pool.CheckName(name); err != nil {
			return usage("%w", err)
		}
	}
	return nil
}

// requireRoot refuses everybody else before anything fails half way.
func (a *App) requireRoot() error {
	if uid := a.geteuid(); uid != 0 {
		return fmt.Errorf("only root can do this, and you are user %d: try sudo", uid)
	}
	return nil
}

// interruptible returns a context that ends at the first SIGINT or SIGTERM; the second one kills as usual.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// notice tells the user something that is not the result.
func (a *App) notice(format string, args ...any) {
	fmt.Fprintf(a.Stderr, "croft: "+format+"\n", args...)
}

// errFindings ends a check that has printed its findings.
var errFindings = errors.New("the check found something")
