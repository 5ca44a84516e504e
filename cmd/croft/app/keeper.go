package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/keeper"
	"github.com/croftfs/croft/fs/pool"
)

// keeperMemory is what the memory of Go's runtime is held to in a process that only keeps, in bytes.
const keeperMemory = 8 << 20

func (a *App) keeperCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "keeper [--socket PATH]",
		Short: "Keep mounts for daemons that come and go",
		Long: "Keep what a mount lives by, for `croft mount --keeper PATH`: when that daemon dies or is\n" +
			"upgraded, the next one goes on. It runs until SIGTERM. Its end harms no mount as long as\n" +
			"the daemon lives, which goes on and gives the next keeper what this one has held; only\n" +
			"the end of both together ends a mount.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.requireRoot(); err != nil {
				return err
			}
			if socket == "" {
				socket = a.keeperSocket()
			}
			return a.runKeeper(cmd.Context(), socket)
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "where daemons find it (default "+filepath.Join("RUN_DIR", "keeper.sock")+")")
	return cmd
}

// keeperSocket is where a keeper listens by default.
func (a *App) keeperSocket() string { return filepath.Join(a.RunDir, "keeper.sock") }

// checkKeeper tells whether a keeper listens.
func (a *App) checkKeeper(d *diagnosis) {
	c, err := keeper.Dial(a.keeperSocket(), nil)
	if err == nil {
		err = c.Close()
	} else if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		err = fmt.Errorf("none on %s: `croft mount` keeps its mounts by itself", a.keeperSocket())
	}
	d.add("keeper", pool.Optional, err, "it listens on "+a.keeperSocket())
}

func (a *App) runKeeper(ctx context.Context, socket string) error {
	log := newLogger(a.Stderr, logConsole, zapcore.InfoLevel)
	ctx, stop := interruptible(ctx)
	defer stop()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	listener, err := keeper.Listen(socket)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	server := keeper.NewServer()
	defer context.AfterFunc(ctx, func() { _ = listener.Close() })()
	shrink(log)
	a.notify("READY=1\nSTATUS=keeping")
	log.Info("keeping", zap.String("socket", socket))
	err = server.Serve(listener)
	a.notify("STOPPING=1")
	if n := server.Pools(); n > 0 {
		log.Warn("what was kept is let go: the mounts live as long as their daemons, or until they find another keeper", zap.Int("pools", n))
	}
	return err
}

// findKeeper connects with the keeper; nil when there is to be none.
func (a *App) findKeeper(ctx context.Context, o *mountOptions, log *zap.Logger) (*keeper.Client, error) {
	changed := func(up bool, err error) {
		if up {
			log.Info("another keeper keeps the mounts")
			return
		}
		log.Warn("the keeper has gone: the mounts go on, but end with this process", zap.Bool("looks_for_another", o.keeperFD < 0), zap.Error(err))
	}
	switch {
	case o.keeperFD >= 0:
		unix.CloseOnExec(o.keeperFD)
		return keeper.NewClient(os.NewFile(uintptr(o.keeperFD), "keeper"), changed)
	case o.keeper == keeperNone || o.keeper == keeperAuto:
		return nil, nil
	}
	for deadline := time.Now().Add(a.Patience); ; time.Sleep(retryEvery) {
		c, err := keeper.Dial(o.keeper, changed)
		switch {
		case err == nil:
			return c, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case time.Now().After(deadline):
			return nil, fmt.Errorf("%w: start `croft keeper --socket %s` first", err, o.keeper)
		}
	}
}

// shrink gives back what a process does not need that only keeps: the program is large, and
// its parts have filled pages when they were loaded.
func shrink(log *zap.Logger) {
	debug.SetMemoryLimit(keeperMemory)
	debug.FreeOSMemory()
	if err := forgetProgram(); err != nil {
		log.Warn("the program's pages stay in memory", zap.Error(err))
	}
}

// forgetProgram unmaps the pages of the program's file: those that are needed are mapped again. Only
// mappings that nobody writes to have nothing but what is in the file.
func forgetProgram() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		var mode string
		if !strings.HasSuffix(line, " "+exe+"\n") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		if strings.Contains(mode, "w") {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
			return os.NewSyscallError("madvise", errno)
		}
	}
	return nil
}
