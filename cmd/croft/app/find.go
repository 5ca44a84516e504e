package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap/zapcore"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/pool/control"
)

const (
	// askTimeout is how long a daemon may take to say which pool it has.
	askTimeout = 5 * time.Second
	// retryEvery is how often a pool in use is tried again.
	retryEvery = 200 * time.Millisecond
)

// volumes is what volume commands need; *pool.Pool and *control.Client have it.
type volumes interface {
	Create(ctx context.Context, name string, o pool.CreateOptions) (pool.Volume, error)
	Resize(ctx context.Context, name string, o pool.ResizeOptions) (pool.Volume, error)
	Delete(ctx context.Context, name string, o pool.DeleteOptions) error
	Volume(ctx context.Context, name string) (pool.Volume, error)
	Volumes(ctx context.Context) ([]pool.Volume, error)
	Check(ctx context.Context, o pool.CheckOptions) (pool.CheckResult, error)
	control.Copies
	Close() error
}

// localPool is a pool opened by this process, for a volume command.
type localPool interface {
	volumes
	WaitCounted(ctx context.Context) error
	WaitTrash(ctx context.Context) error
}

// access is a pool that was found. Close it.
type access struct {
	volumes
	local localPool // the same, when no daemon has the pool; else nil
}

// poolFlag adds --pool to a command that works on one pool.
func (a *App) poolFlag(cmd *cobra.Command) *string {
	dir := cmd.Flags().String("pool", "", "the pool's directory (default $"+PoolEnv+", else the one pool that is mounted)")
	complete(cmd, "pool", a.completePools)
	return dir
}

// withPool finds the pool and calls work with it. The context ends when the user interrupts.
func (a *App) withPool(ctx context.Context, dir string, work func(context.Context, *access) error) error {
	if err := a.requireRoot(); err != nil {
		return err
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	p, err := a.find(ctx, dir)
	if err != nil {
		return err
	}
	err = work(ctx, p)
	if closeErr := p.Close(); closeErr != nil {
		err = errors.Join(err, closeErr)
	}
	return err
}

// find opens the pool in dir; when dir is empty the one that the environment
// names, or else the only one that a daemon has. A pool that another command has
// is waited for.
func (a *App) find(ctx context.Context, dir string) (*access, error) {
	if dir == "" {
		dir = a.Getenv(PoolEnv)
	}
	if dir == "" {
		client, err := a.findMounted(ctx)
		if err != nil {
			return nil, err
		}
		return &access{volumes: client}, nil
	}
	id, err := pool.ReadID(dir)
	if err != nil {
		return nil, err
	}
	socket := control.SocketPath(a.RunDir, id)
	for deadline := time.Now().Add(a.Patience); ; {
		client, err := a.ask(ctx, socket, dir)
		if err != nil {
			return nil, err
		}
		if client != nil {
			return &access{volumes: client}, nil
		}
		p, err := a.open(pool.Options{Dir: dir, Logger: newLogger(a.Stderr, logConsole, zapcore.WarnLevel)})
		if err == nil {
			return &access{volumes: p, local: p}, nil
		}
		if !errors.Is(err, pool.ErrInUse) {
			return nil, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w; for %s it neither let go nor listened on %s", err, a.Patience, socket)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(retryEvery):
		}
	}
}

// errNotMounted is returned when a command needs a mounted pool.
var errNotMounted = errors.New("the pool is not mounted")

// findDaemon is find for what only a mounted pool can do: errNotMounted when no daemon has it.
func (a *App) findDaemon(ctx context.Context, dir string) (*control.Client, error) {
	if dir == "" {
		dir = a.Getenv(PoolEnv)
	}
	if dir == "" {
		return a.findMounted(ctx)
	}
	id, err := pool.ReadID(dir)
	if err != nil {
		return nil, err
	}
	client, err := a.ask(ctx, control.SocketPath(a.RunDir, id), dir)
	if client == nil && err == nil {
		err = fmt.Errorf("pool %s: %w", dir, errNotMounted)
	}
	return client, err
}

// ask returns the daemon of the pool in dir, or nil when there is none.
func (a *App) ask(ctx context.Context, socket, dir string) (*control.Client, error) {
	client := control.NewClient(socket)
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	info, err := client.Info(ctx)
	switch {
	case errors.Is(err, control.ErrNoServer):
		return nil, nil
	case err != nil:
		return nil, errors.Join(fmt.Errorf("the daemon of %s: %w", dir, err), client.Close())
	case !sameDir(info.Dir, dir):
		// A copy of the pool, with its id: not what the daemon has.
		return nil, client.Close()
	}
	return client, nil
}

// sameDir compares what is there, and not how it is written.
func sameDir(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// running is a daemon that answers.
type running struct {
	socket string
	info   pool.Info
}

// daemons returns who listens in the run directory; stale sockets are left out.
func (a *App) daemons(ctx context.Context) ([]running, error) {
	sockets, err := control.Sockets(a.RunDir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var found []running
	var errs []error
	for _, socket := range sockets {
		client := control.NewClient(socket)
		info, err := client.Info(ctx)
		if err == nil {
			found = append(found, running{socket, info})
		} else if !errors.Is(err, control.ErrNoServer) {
			errs = append(errs, fmt.Errorf("%s: %w", socket, err))
		}
		errs = append(errs, client.Close())
	}
	return found, errors.Join(errs...)
}

// findMounted returns the only daemon.
func (a *App) findMounted(ctx context.Context) (*control.Client, error) {
	found, err := a.daemons(ctx)
	switch {
	case len(found) == 0 && err != nil:
		return nil, err
	case len(found) == 0:
		return nil, usage("which pool? None is mounted: name its directory with --pool DIR or $%s", PoolEnv)
	case len(found) > 1:
		var dirs []string
		for _, d := range found {
			dirs = append(dirs, d.info.Dir)
		}
		return nil, usage("which pool? Several are mounted, name one with --pool DIR or $%s:\n  %s", PoolEnv, strings.Join(dirs, "\n  "))
	}
	return control.NewClient(found[0].socket), nil
}

// settle waits until the use of volumes is known, when this process is the one who counts.
// Through a daemon it returns at once.
func (a *App) settle(ctx context.Context, p *access) error {
	if p.local == nil {
		return nil
	}
	list, err := p.Volumes(ctx)
	if err != nil {
		return err
	}
	var counting []string
	for _, v := range list {
		if v.State == pool.StateRecounting {
			counting = append(counting, v.Name)
		}
	}
	if len(counting) == 0 {
		return nil
	}
	a.notice("recounting what was in use at a crash: %s", strings.Join(counting, ", "))
	if err := p.local.WaitCounted(ctx); err != nil {
		return fmt.Errorf("recount: %w", err)
	}
	return nil
}

// resolvePool makes a pool's directory absolute and free of links.
func resolvePool(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if _, err := pool.ReadID(abs); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}
