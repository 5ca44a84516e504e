package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/keeper"
)

const (
	// handedOver is the exit code of a daemon that has left its mounts to the next.
	handedOver = 75 // EX_TEMPFAIL of sysexits.h

	// A daemon that dies is replaced at once, as long as it has served for healthy: everybody waits.
	// One that dies at birth is replaced after firstPause, and the next after twice that, up to lastPause.
	healthy    = 100 * time.Millisecond
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// supervisor runs a daemon as a child, keeps what must outlive it, and starts
// another when it dies. It never touches the mounts.
type supervisor struct {
	app    *App
	log    *zap.Logger
	args   []string // of the daemon
	places []place
	ready  func(error)

	signals chan os.Signal
	keeper  *keeper.Server
	// program is what is run; it may have been replaced since this process began.
	program string
	served  bool // a daemon was ready
	ending  bool // it was asked to end
}

// child is a daemon that runs.
type child struct {
	cmd    *exec.Cmd
	served time.Time     // since when; zero before it is ready
	ready  chan error    // says once how mounting went; closed without a word when the daemon has died
	exited chan struct{} // closed when it has
}

// run returns when a daemon has ended in order, or cannot begin.
func (s *supervisor) run(ctx context.Context) error {
	s.keeper = keeper.NewServer()
	s.signals = make(chan os.Signal, 4)
	signal.Notify(s.signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(s.signals)
	pause, upgrade := time.Duration(0), false
	for {
		c, err := s.start(upgrade)
		if err == nil {
			err = s.watch(ctx, c)
		}
		var exit *exec.ExitError
		code := -1
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		switch {
		case err == nil, s.ending, !s.served:
			return s.end(err)
		case code == handedOver:
			s.log.Info("the daemon has handed over")
			pause, upgrade = 0, true
			continue
		}
		if c != nil && !c.served.IsZero() && time.Since(c.served) >= healthy {
			pause = 0
		}
		s.log.Error("the daemon has died: another takes over", zap.Error(err), zap.Duration("pause", pause))
		s.app.notify("STATUS=the daemon has died: another takes over")
		upgrade = false
		if stop := s.wait(ctx, pause); stop {
			return s.end(err)
		}
		pause = min(max(2*pause, firstPause), lastPause)
	}
}

// wait returns true when the process is to end meanwhile.
func (s *supervisor) wait(ctx context.Context, pause time.Duration) bool {
	select {
	case <-ctx.Done():
		return true
	case sig := <-s.signals:
		return sig != unix.SIGHUP
	case <-time.After(pause):
		return false
	}
}

// end cuts off what a daemon that has not ended in order has left mounted: nobody would
// answer there.
func (s *supervisor) end(err error) error {
	if err == nil {
		return nil
	}
	if s.keeper.Pools() > 0 {
		for _, p := range s.places {
			if uerr := unix.Unmount(p.mountpoint, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); uerr == nil {
				s.log.Warn("cut off", zap.String("mountpoint", p.mountpoint))
			}
		}
	}
	return err
}

// start starts a daemon; after is that one has handed over to it.
func (s *supervisor) start(after bool) (*child, error) {
	program := s.program
	if _, err := os.Stat(program); err != nil {
		program = "/proc/self/exe" // it was removed since
	}
	c, err := s.exec(program)
	if err != nil || !after {
		return c, err
	}
	// What takes over from one that works may turn out not to.
	select {
	case err, ok := <-c.ready:
		if ok && err == nil {
			c.ready = nil
			return c, nil
		}
		<-c.exited
		s.log.Error("the new daemon refuses: the old one goes on", zap.String("program", program), zap.Error(err))
		return s.exec("/proc/self/exe")
	case sig := <-s.signals:
		s.signals <- sig
		return c, nil
	}
}

func (s *supervisor) exec(program string) (*child, error) {
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	defer writer.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		reader.Close()
		return nil, fmt.Errorf("daemon: %w", os.NewSyscallError("socketpair", err))
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "keeper"), os.NewFile(uintptr(pair[1]), "keeper")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		reader.Close()
		return nil, fmt.Errorf("daemon: %w", err)
	}
	cmd := exec.Command(program, s.args...)
	cmd.Args[0] = s.program
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = os.Stdout, s.app.Stderr
	cmd.ExtraFiles = []*os.File{writer, theirs} // descriptors 3 and 4
	// Of the terminal's signals it gets those that are passed on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		reader.Close()
		conn.Close()
		return nil, fmt.Errorf("daemon: %w", err)
	}
	go s.keeper.ServeConn(conn.(*net.UnixConn))
	c := &child{cmd: cmd, ready: make(chan error, 1), exited: make(chan struct{})}
	go func() {
		defer reader.Close()
		defer close(c.ready)
		switch answer, err := io.ReadAll(reader); {
		case err != nil:
			c.ready <- err
		case string(answer) == daemonReady:
			c.ready <- nil
		case len(answer) > 0:
			c.ready <- errors.New(strings.TrimSpace(string(answer)))
		}
	}()
	go func() {
		defer close(c.exited)
		_ = cmd.Wait() // watch looks at its state
	}()
	return c, nil
}

// watch waits for a daemon's end and passes signals on to it.
func (s *supervisor) watch(ctx context.Context, c *child) error {
	if c.ready == nil {
		s.isReady(c)
	}
	done := ctx.Done()
	for {
		select {
		case err, ok := <-c.ready:
			c.ready = nil
			switch {
			case ok && err == nil:
				s.isReady(c)
			case ok && !s.served: // it has said why: that is the command's error
				<-c.exited
				return err
			}
		case <-c.exited:
			if state := c.cmd.ProcessState; !state.Success() {
				return fmt.Errorf("daemon: %w", &exec.ExitError{ProcessState: state})
			}
			return nil
		case <-done:
			done = nil
			s.pass(c, unix.SIGTERM)
		case sig := <-s.signals:
			s.pass(c, sig)
		}
	}
}

func (s *supervisor) isReady(c *child) {
	c.served = time.Now()
	if !s.served {
		s.served = true
		s.ready(nil)
	}
	s.app.notify("READY=1\nSTATUS=serving")
}

// pass passes a signal on: SIGHUP has the daemon hand over to one of the program as it is now.
func (s *supervisor) pass(c *child, sig os.Signal) {
	if sig == unix.SIGHUP {
		s.log.Info("upgrade: the daemon hands over")
		sig = unix.SIGUSR2
	} else {
		s.ending = true
	}
	// It may have ended already; its end is waited for.
	_ = c.cmd.Process.Signal(sig)
}
