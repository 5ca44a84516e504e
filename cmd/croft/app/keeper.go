package app

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/croftfs/croft/fs/keeper"
)

// keeperMemory is what a keeper's heap is held to, in bytes.
const keeperMemory = 4 << 20

func (a *App) keeperCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "keeper [--socket PATH]",
		Short: "Keep mounts for daemons that come and go",
		Long: "Keep what a mount lives by, for `croft mount --keeper PATH`: when that daemon dies or is\n" +
			"upgraded, the next one goes on. It runs until SIGTERM. Its end harms no mount as long as\n" +
			"the daemon lives; only both together end one.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.requireRoot(); err != nil {
				return err
			}
			if socket == "" {
				socket = filepath.Join(a.RunDir, "keeper.sock")
			}
			return a.runKeeper(cmd.Context(), socket)
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "where daemons find it (default "+filepath.Join("RUN_DIR", "keeper.sock")+")")
	return cmd
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
	debug.SetMemoryLimit(keeperMemory)
	debug.FreeOSMemory() // what the program's other parts have left when they were loaded
	a.notify("READY=1\nSTATUS=keeping")
	log.Info("keeping", zap.String("socket", socket))
	err = server.Serve(listener)
	a.notify("STOPPING=1")
	if n := server.Pools(); n > 0 {
		log.Warn("what was kept is let go: the mounts live as long as their daemons", zap.Int("pools", n))
	}
	return err
}
