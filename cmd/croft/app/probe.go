package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/transport"
)

func (a *App) probeCommand() *cobra.Command {
	var direct bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "probe [--timeout 5s] [MOUNTPOINT...]",
		Short: "Tell whether mounts answer",
		Long: "Tell whether mounts answer: the exit code is 1, with a message, when one of them does not in\n" +
			"time. It never hangs itself, as whoever touches a mount that hangs does. Without MOUNTPOINT it\n" +
			"is the mount of --pool or $" + PoolEnv + ".",
		Example: "  croft probe --timeout 2s /mnt/croft",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveNoFileComp // to complete a path is to touch it
		},
	}
	f := cmd.Flags()
	dir := f.String("pool", "", "a mounted pool's directory (default $"+PoolEnv+")")
	complete(cmd, "pool", a.completePools)
	f.DurationVar(&timeout, "timeout", 5*time.Second, "how long they may take to answer")
	complete(cmd, "timeout", cobra.NoFileCompletions)
	f.BoolVar(&direct, "direct", false, "")
	if err := f.MarkHidden("direct"); err != nil {
		panic(err) // there is no such flag
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *dir == "" && len(args) == 0 {
			*dir = a.Getenv(PoolEnv)
		}
		switch {
		case timeout <= 0:
			return usage("--timeout %s: it must be more than 0", timeout)
		case *dir == "" && len(args) == 0:
			return usage("which mount? Name its MOUNTPOINT, or its pool with --pool DIR or $%s", PoolEnv)
		case *dir != "" && len(args) > 0:
			return usage("name MOUNTPOINTs or --pool, not both")
		case direct && *dir != "":
			return probePool(*dir)
		case direct:
			return probeMounts(args)
		}
		return a.probeWithin(timeout, *dir, args)
	}
	return cmd
}

// probeWithin does it in a process of its own, which nobody waits for when it hangs: it has nothing of the caller's open, who may wait
// for the end of what is printed.
func (a *App) probeWithin(timeout time.Duration, dir string, mountpoints []string) error {
	var names []string
	if dir != "" {
		names = append(names, "--pool="+dir)
	}
	var said strings.Builder
	p, err := startProbe(&said, append(append(names, "--"), mountpoints...)...)
	if err != nil {
		return err
	}
	select {
	case err := <-p.ended:
		if _, printErr := io.WriteString(a.Stderr, said.String()); printErr != nil {
			return printErr
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Exited() {
			return errTold
		}
		return err
	case <-time.After(timeout):
		p.abandon()
		return fmt.Errorf("no answer in %s", timeout)
	}
}

// probe is a process that touches mounts.
type probe struct {
	cmd   *exec.Cmd
	ended chan error // of its end, when it comes to that
}

// startProbe starts one; stderr takes what it says.
func startProbe(stderr io.Writer, args ...string) (*probe, error) {
	// The program may be on a mount, or gone: this one is in memory.
	cmd := exec.Command("/proc/self/exe", append([]string{"probe", "--direct"}, args...)...)
	cmd.Args[0] = "croft"
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	p := &probe{cmd: cmd, ended: make(chan error, 1)}
	go func() { p.ended <- cmd.Wait() }()
	return p, nil
}

// abandon kills it. What waits for a request that the daemon has read ends when that is answered.
func (p *probe) abandon() { _ = p.cmd.Process.Kill() }

// probePool asks the mount of a pool; it may hang.
func probePool(dir string) error {
	id, err := pool.ReadID(dir)
	if err != nil {
		return err
	}
	mounts, err := transport.Mounts(transport.MountFilter{Source: pool.MountSource(id)})
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.Root == "/" {
			return statfs(m.Mountpoint)
		}
	}
	return fmt.Errorf("pool %s: %w", dir, errNotMounted)
}

// probeMounts asks the mounts that directories are on; it may hang.
func probeMounts(dirs []string) error {
	mounts, err := transport.Mounts(transport.MountFilter{})
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, probeMount(mounts, dir))
	}
	return errors.Join(errs...)
}

func probeMount(mounts []transport.MountEntry, dir string) error {
	at, err := resolveParent(dir) // not the place itself: a dead mount does not even answer that
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if within(at, filepath.Clean(m.Mountpoint)) {
			return statfs(at)
		}
	}
	return fmt.Errorf("no pool is mounted on %s (`croft mount` does that)", dir)
}

// statfs asks the daemon: the kernel answers no statfs(2) by itself.
func statfs(path string) error {
	var st unix.Statfs_t
	switch err := unix.Statfs(path, &st); {
	case errors.Is(err, unix.ENOTCONN):
		return fmt.Errorf("%s: its daemon has died (%w)", path, err)
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// watch looks whether mounts answer, until ctx ends. It never touches them itself.
// answered is called each time that they have, hung when they have not for about
// limit, and again after each further one.
type watch struct {
	ask            func() (ended <-chan error, abandon func(), err error)
	every, limit   time.Duration
	answered, hung func()
}

func (w watch) run(ctx context.Context) {
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	var ended <-chan error
	abandon := func() {}
	defer func() { abandon() }()
	for missed := time.Duration(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			ended, missed = nil, 0
			w.answered()
			continue
		case <-tick.C:
		}
		if ended != nil {
			select {
			case <-ended: // they came together: this process has been stopped, or the machine is busy
				ended, missed = nil, 0
				w.answered()
			default:
				// Ticks are counted, not time: while this process is stopped nobody is late.
				if missed += w.every; missed >= w.limit {
					missed = 0
					w.hung()
				}
				continue
			}
		}
		var err error
		if ended, abandon, err = w.ask(); err != nil { // no process can be started: that says nothing of the mounts
			ended, abandon = nil, func() {}
			w.answered()
		}
	}
}
