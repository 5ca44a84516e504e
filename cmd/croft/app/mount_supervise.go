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

	// startLooks is how many times the watchdog's limit one that takes over may take until it is ready.
	startLooks = 5
)

// supervisor runs a daemon as a child, keeps what must outlive it, and starts
// another when it dies. It never touches the mounts.
type supervisor struct {
	app      *App
	log      *zap.Logger
	args     []string // of the daemon
	places   []place
	ready    func(error)
	watchdog time.Duration // a daemon that does not answer for so long is killed; 0: never
	path     string        // of the program; what is there may change
	external bool          // the keeper is elsewhere: this process keeps nothing

	signals chan os.Signal
	keeper  *keeper.Server
	worked  *os.File // the program that was ready last
	doubt   bool     // what is at path could not take over: worked is what to start
	served  bool     // a daemon was ready
	upgrade bool     // it was asked for since the last daemon was started
	ending  bool     // it was asked to end
}

// child is a daemon that runs.
type child struct {
	cmd     *exec.Cmd
	program *os.File
	served  time.Time     // since when; zero before it is ready
	ready   chan error    // says once how mounting went; closed without a word when the daemon has died
	exited  chan struct{} // closed when it has
	hung    chan struct{} // takes a word when the mounts do not answer
}

// supervise runs the daemon as a child of this process.
func (a *App) supervise(ctx context.Context, o *mountOptions, places []place, log *zap.Logger, ready func(error)) (err error) {
	s := &supervisor{
		app: a, log: log, places: places, ready: ready, watchdog: o.watchdog,
		args:     daemonArgs(o, places, "--keeper-fd=4", "--log-file="+o.logFile),
		external: o.keeper != keeperAuto,
	}
	if s.external {
		s.args = daemonArgs(o, places, "--keeper="+o.keeper, "--restarted", "--log-file="+o.logFile)
	}
	if s.path, err = os.Executable(); err == nil {
		s.worked, err = os.Open("/proc/self/exe")
	}
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	defer func() { s.worked.Close() }()
	shrink(log)
	return s.run(ctx)
}

// run returns when a daemon has ended in order, or cannot begin.
func (s *supervisor) run(ctx context.Context) error {
	s.keeper = keeper.NewServer()
	s.signals = make(chan os.Signal, 4)
	signal.Notify(s.signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(s.signals)
	for pause := time.Duration(0); ; {
		c, err := s.start()
		if err == nil {
			err = s.watch(ctx, c)
		}
		var exit *exec.ExitError
		switch {
		case err == nil && s.external && s.upgrade && !s.ending:
			s.log.Info("the daemon has handed over")
			pause = 0
			continue
		case err == nil, s.ending, !s.served:
			return s.end(err)
		case errors.As(err, &exit) && exit.ExitCode() == handedOver:
			s.log.Info("the daemon has handed over")
			pause, s.upgrade = 0, true
			continue
		}
		born := c != nil && !c.served.IsZero()
		if born && time.Since(c.served) >= healthy {
			pause = 0
		}
		if !born {
			s.doubt = !s.doubt // the other program may be able to
		}
		if born || exit != nil && !exit.Exited() {
			s.log.Error("the daemon has died: another takes over", zap.Duration("pause", pause), zap.Error(err))
		} else {
			s.log.Error("the daemon could not take over", zap.Bool("the_one_before_is_next", s.doubt), zap.Duration("pause", pause), zap.Error(err))
		}
		s.app.notify("STATUS=the daemon has died: another takes over")
		if stop := s.wait(ctx, pause); stop {
			return s.end(err)
		}
		pause = nextPause(pause)
	}
}

// nextPause is the pause before the next start, when the one after this pause is of no use.
func nextPause(pause time.Duration) time.Duration { return min(max(2*pause, firstPause), lastPause) }

// wait returns true when the process is to end meanwhile.
func (s *supervisor) wait(ctx context.Context, pause time.Duration) bool {
	select {
	case <-ctx.Done():
		return true
	case sig := <-s.signals:
		s.upgrade = sig == unix.SIGHUP
		return !s.upgrade
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

// start starts a daemon of the program as it is on the disk, or else of the one that was ready last.
func (s *supervisor) start() (*child, error) {
	program := s.worked
	if s.upgrade {
		s.upgrade, s.doubt = false, false
	}
	if !s.doubt {
		if there, err := os.Open(s.path); err == nil {
			program = there
		} else {
			s.log.Warn("the program is gone: this one goes on", zap.Error(err))
		}
	}
	c, err := s.exec(program)
	if err != nil && program != s.worked {
		program.Close()
	}
	return c, err
}

func (s *supervisor) exec(program *os.File) (*child, error) {
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	defer writer.Close()
	files := []*os.File{writer} // descriptor 3
	keep := func() {}
	giveUp := func() {}
	if !s.external {
		conn, theirs, err := keeperConn()
		if err != nil {
			reader.Close()
			return nil, fmt.Errorf("daemon: %w", err)
		}
		defer theirs.Close()
		files = append(files, theirs) // descriptor 4
		keep, giveUp = func() { s.keeper.ServeConn(conn) }, func() { conn.Close() }
	}
	// By this process's descriptor: in the child its number may be one of ExtraFiles.
	cmd := exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()), s.args...)
	cmd.Args[0] = s.path
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = os.Stdout, s.app.Stderr
	cmd.ExtraFiles = files
	// Of the terminal's signals it gets those that are passed on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		reader.Close()
		giveUp()
		return nil, fmt.Errorf("daemon: %w", err)
	}
	go keep()
	c := &child{cmd: cmd, program: program, ready: make(chan error, 1), exited: make(chan struct{}), hung: make(chan struct{}, 1)}
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

// keeperConn makes a connection for a child, and what it has of that.
func keeperConn() (ours *net.UnixConn, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "keeper"), os.NewFile(uintptr(pair[1]), "keeper")
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

// watch waits for a daemon's end and passes signals on to it.
func (s *supervisor) watch(ctx context.Context, c *child) error {
	alive, stop := context.WithCancel(context.Background())
	defer stop()
	defer func() {
		if c.program != s.worked {
			c.program.Close()
		}
	}()
	var said error
	hear := func(err error, ok bool) {
		c.ready = nil
		if ok && err == nil {
			s.isReady(alive, c)
		}
		said = err
	}
	done := ctx.Done()
	var late <-chan time.Time
	if s.served && s.watchdog > 0 {
		late = time.After(startLooks * s.watchdog)
	}
	for {
		select {
		case err, ok := <-c.ready:
			hear(err, ok)
		case <-c.exited:
			if c.ready != nil {
				err, ok := <-c.ready
				hear(err, ok)
			}
			return c.end(said, s.served)
		case <-late:
			if c.served.IsZero() {
				s.log.Error("the daemon does not come to serve: killing it", zap.Int("pid", c.cmd.Process.Pid))
				_ = c.cmd.Process.Kill()
			}
		case <-c.hung:
			s.log.Error("the mounts do not answer: killing the daemon", zap.Int("pid", c.cmd.Process.Pid))
			_ = c.cmd.Process.Kill()
		case <-done:
			done = nil
			s.pass(c, unix.SIGTERM)
		case sig := <-s.signals:
			s.pass(c, sig)
		}
	}
}

// end tells how a daemon that has exited has ended; said is what it says stands against mounting.
func (c *child) end(said error, served bool) error {
	state := c.cmd.ProcessState
	switch {
	case said != nil && !served:
		return said // that is the command's error
	case state.Success():
		return nil
	case said != nil:
		return fmt.Errorf("daemon: %w: %w", &exec.ExitError{ProcessState: state}, said)
	}
	return fmt.Errorf("daemon: %w", &exec.ExitError{ProcessState: state})
}

// isReady has the daemon watched until ctx ends.
func (s *supervisor) isReady(ctx context.Context, c *child) {
	c.served = time.Now()
	if c.program != s.worked {
		s.worked.Close()
		s.worked = c.program
	}
	if !s.served {
		s.served = true
		s.ready(nil)
	}
	s.app.notify("READY=1\nSTATUS=serving")
	if s.upgrade {
		s.pass(c, unix.SIGHUP)
	}
	hung := func() {
		if s.watchdog == 0 {
			return
		}
		select {
		case c.hung <- struct{}{}:
		default: // it has been said
		}
	}
	if w, wanted := s.app.newWatch(s.places, s.watchdog, hung); wanted {
		go w.run(ctx)
	}
}

// pass passes a signal on: SIGHUP has the daemon hand over to one of the program as it is now, as soon as it
// has something to hand over.
func (s *supervisor) pass(c *child, sig os.Signal) {
	if sig == unix.SIGHUP {
		if s.upgrade = true; c.served.IsZero() {
			return
		}
		s.log.Info("upgrade: the daemon hands over")
		if sig = unix.SIGUSR2; s.external {
			sig = unix.SIGTERM
		}
	} else {
		s.ending = true
	}
	// It may have ended already; its end is waited for.
	_ = c.cmd.Process.Signal(sig)
}
