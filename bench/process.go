package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// runner starts the processes of a run: each is the leader of a process group, so that it
// ends with its children, and so that ^C reaches only the bench, which ends them in order.
type runner struct {
	env []string
}

// as is the user a process runs as; nil is root.
type as = syscall.Credential

func (r *runner) command(ctx context.Context, user *as, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = r.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: user}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// output runs a command to its end; its error has what the command said.
func (r *runner) output(ctx context.Context, argv ...string) (string, error) {
	return r.outputAs(ctx, nil, "", nil, argv...)
}

func (r *runner) outputAs(ctx context.Context, user *as, dir string, stdin io.Reader, argv ...string) (string, error) {
	cmd := r.command(ctx, user, argv...)
	cmd.Dir, cmd.Stdin = dir, stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stderr.String())
		if said == "" {
			said = strings.TrimSpace(stdout.String())
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv[:min(3, len(argv))], " "), err, tail(said, 600))
	}
	return stdout.String(), nil
}

// quick runs a command that has nothing to do with a mount, also while cleaning up.
func (r *runner) quick(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return r.output(ctx, argv...)
}

// daemon is a process that serves until it is ended.
type daemon struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// start runs a daemon, whose output goes to the file log. It outlives the context of the
// run: it is ended in order, after what uses it.
func (r *runner) start(log string, argv ...string) (*daemon, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := &daemon{cmd: r.command(context.Background(), nil, argv...), log: log, done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = f, f
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = d.cmd.Wait() // how it ended is in its log
		close(d.done)
	}()
	return d, nil
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

func (d *daemon) ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// kill aborts what it serves: with its daemon gone a FUSE mount answers ENOTCONN.
func (d *daemon) kill() { _ = syscall.Kill(-d.pid(), syscall.SIGKILL) }

// wait waits until it has ended, and kills it if it does not.
func (d *daemon) wait(timeout time.Duration) error {
	for _, last := range []bool{false, true} {
		select {
		case <-d.done:
			return nil
		case <-time.After(timeout):
			if !last {
				d.kill()
			}
		}
	}
	return fmt.Errorf("process %d does not end", d.pid())
}

// said is the end of its log, for an error message.
func (d *daemon) said() string {
	data, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return tail(strings.TrimSpace(string(data)), 600)
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// cleanup takes away what was made, the last first.
type cleanup struct{ steps []func() error }

func (c *cleanup) add(step func() error) { c.steps = append(c.steps, step) }

func (c *cleanup) run() error {
	var errs []error
	for i := len(c.steps) - 1; i >= 0; i-- {
		if err := c.steps[i](); err != nil {
			errs = append(errs, fmt.Errorf("cleaning up: %w", err))
		}
	}
	c.steps = nil
	return errors.Join(errs...)
}

// ignoreStatus takes the exit status for a success.
func ignoreStatus(err error, status int) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == status {
		return nil
	}
	return err
}
