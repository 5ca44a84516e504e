package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
)

// daemonReady is what the background process writes when all is mounted. No error reads like that.
const daemonReady = "\x00ready"

// startDaemon runs the same command in the background, in a session of its own, and
// returns when it has mounted everything, or with its error. An interrupt ends it again.
func (a *App) startDaemon(ctx context.Context, o *mountOptions, places []place) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	log, err := openLog(o.logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	reader, writer, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	defer reader.Close()
	cmd := exec.Command(self, daemonArgs(o, places, "--keeper="+o.keeper, "--watchdog="+o.watchdog.String(), fmt.Sprint("--restart=", o.restart))...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{writer} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	writer.Close()
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	defer context.AfterFunc(ctx, func() {
		// It may have ended already; the pipe tells.
		_ = cmd.Process.Signal(syscall.SIGTERM)
	})()
	answer, err := io.ReadAll(reader)
	switch {
	case err != nil:
		return fmt.Errorf("daemon: %w", err)
	case string(answer) == daemonReady:
		return cmd.Process.Release()
	case len(answer) > 0:
		return errors.Join(errors.New(string(answer)), waitFailed(cmd))
	}
	return fmt.Errorf("the daemon ended before it had mounted: see %s: %w", o.logFile, cmd.Wait())
}

// waitFailed waits for a process that has said why it fails; that it does is no news.
func waitFailed(cmd *exec.Cmd) error {
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return nil
}

// daemonArgs is the command line of the background process. Its log is its stderr.
func daemonArgs(o *mountOptions, places []place, more ...string) []string {
	command := "mount"
	if o.node != nil {
		command = "node"
	}
	args := []string{
		command, "--ready-fd=3", "--idle-after=" + o.idleAfter.String(),
		fmt.Sprintf("--overcommit=%v", o.promise.overcommit), fmt.Sprintf("--spare=%v", o.promise.spare),
		"--tier=" + o.tier.word, "--wakeups=" + o.wakeups.word, "--metrics-address=" + o.metrics,
	}
	args = append(append(args, o.log.args()...), more...)
	if o.node != nil {
		return append(args, o.node.args(places)...)
	}
	for _, p := range places {
		args = append(args, "--pool="+p.dir)
	}
	args = append(args, "--")
	for _, p := range places {
		args = append(args, p.mountpoint)
	}
	return args
}
