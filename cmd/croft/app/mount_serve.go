package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/csi"
	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/keeper"
	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/pool/control"
	"github.com/croftfs/croft/fs/transport"
)

const (
	// controlGrace is how long volume commands under way may take to end when a mount has ended.
	controlGrace = 10 * time.Second
	// lingerNotice is how long after an unmount a mount that is still served is worth a line in the log.
	lingerNotice = 2 * time.Second
	// collectAfter is how long after its start the daemon begins to collect garbage: what waited for it is answered then.
	collectAfter = time.Second
	// cutGrace is how long pools may take to record their use after the second signal.
	cutGrace = 2 * time.Second
)

// mountedPool is what the daemon needs of a pool; *pool.Pool has it.
type mountedPool interface {
	control.Pool
	csi.Pool
	Mount(o pool.MountOptions) error
	Served() <-chan struct{}
	ServeErr() error
	Unmount(lazy bool) error
	HandOver(ctx context.Context) error
	Close() error
}

// server is the daemon: it mounts pools and serves them until they are unmounted.
type server struct {
	app       *App
	log       *zap.Logger
	idleAfter time.Duration
	promise   promise
	tier      fs.Tier
	wakeups   transport.Wakeups
	address   string      // that Prometheus asks; "" for none
	ready     func(error) // is called with nil when all is mounted
	// serve begins what else is served when all is mounted, and returns what ends it. Default: nothing is.
	serve   func() (stop func(), err error)
	still   func()               // ends what serve has begun
	metrics *prometheus.Registry // of what serve serves

	// keeper is nil when nobody keeps the mounts. A supervised daemon hands over to the next on SIGUSR2,
	// another one that has a keeper on SIGTERM.
	keeper     *keeper.Client
	supervised bool
	began      bool // all was mounted

	signals chan os.Signal // default: SIGTERM, SIGINT and SIGUSR2
	open    func(pool.Options) (mountedPool, error)
	seats   []*seat
}

// seat is one pool of the daemon.
type seat struct {
	place
	pool    mountedPool
	control *control.Server
	done    chan struct{} // closed when the pool has been closed after its mount has ended
	err     error         // set before done is closed
}

// run returns when all mounts have ended, with what went wrong. Every pool is open before
// the first is mounted; when one cannot be mounted, none stays. The process must not
// touch a mountpoint from then on: it would wait for itself.
func (d *server) run(ctx context.Context, places []place) error {
	if d.signals == nil {
		d.signals = make(chan os.Signal, 2)
		signal.Notify(d.signals, unix.SIGTERM, unix.SIGINT, unix.SIGUSR2)
		defer signal.Stop(d.signals)
	}
	d.metrics = prometheus.NewRegistry()
	if d.open == nil {
		d.open = func(o pool.Options) (mountedPool, error) { return pool.Open(o) }
	}
	// Little that a start makes is garbage, and everybody waits for one that takes over.
	if percent := debug.SetGCPercent(-1); percent >= 0 {
		time.AfterFunc(collectAfter, func() { debug.SetGCPercent(percent) })
	}
	if err := d.start(ctx, places); err != nil {
		return errors.Join(err, d.abandon())
	}
	d.still = func() {}
	if d.serve != nil {
		stop, err := d.serve()
		if err != nil {
			return errors.Join(err, d.abandon())
		}
		d.still = stop
	}
	if d.address != "" {
		still, stop := d.still, d.serveMetrics(d.address)
		d.still = func() { stop(); still() }
	}
	d.still = sync.OnceFunc(d.still)
	defer func() { d.still() }()
	for _, s := range d.seats {
		go d.attend(s)
	}
	d.began = true
	d.ready(nil)
	d.app.notify("READY=1\nSTATUS=" + d.status())
	d.log.Info("ready", zap.String("version", d.app.version()))
	alive, stop := context.WithCancel(ctx)
	defer stop()
	d.app.watchForSystemd(alive, d.log, places)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for _, s := range d.seats {
			<-s.done
		}
	}()
	for asked := 0; ; {
		select {
		case <-ended:
			return d.result()
		case <-ctx.Done():
			ctx = context.WithoutCancel(ctx)
		case sig := <-d.signals:
			d.log.Info("signal", zap.Stringer("signal", sig))
			switch {
			case d.kept() && asked == 0 && sig == d.handOverSignal():
				return d.handOver()
			case sig == unix.SIGUSR2:
				d.log.Warn("nobody keeps the mounts for another daemon: this one goes on")
				continue
			case d.keeper != nil && sig == d.handOverSignal():
				d.log.Warn("the keeper has gone, so that nobody could take over: unmounting")
			}
		}
		switch asked++; asked {
		case 1:
			d.stop()
		default:
			return d.cut(ended)
		}
	}
}

func (d *server) start(ctx context.Context, places []place) error {
	for _, at := range places {
		if err := d.interrupted(ctx); err != nil {
			return err
		}
		p, err := d.openPool(ctx, at)
		if err != nil {
			return err
		}
		s := &seat{place: at, pool: p, done: make(chan struct{})}
		d.seats = append(d.seats, s)
		s.control, err = control.Listen(p, control.Options{
			RunDir: d.app.RunDir,
			Logger: d.log.With(zap.String("pool", at.dir)),
			Kept:   d.kept,

			Metrics: d.metrics,
		})
		if err != nil {
			return err
		}
	}
	for _, s := range d.seats {
		if err := d.interrupted(ctx); err != nil {
			return err
		}
		if err := s.pool.Mount(pool.MountOptions{Mountpoint: s.mountpoint, Tier: d.tier, Wakeups: d.wakeups}); err != nil {
			return fmt.Errorf("mount %s on %s: %w", s.dir, s.mountpoint, err)
		}
	}
	return nil
}

func (d *server) poolOptions(at place) pool.Options {
	o := pool.Options{
		Dir: at.dir, Logger: d.log, IdleAfter: d.idleAfter, RequestStep: d.app.killStep(), Bind: bindElsewhere, Notify: notifyElsewhere,
		Overcommit: d.promise.overcommit, Spare: d.promise.spare / 100,
	}
	if d.keeper != nil {
		o.Keeper = func(id string) pool.Keeper { return d.keeper.Pool(id) }
	}
	return o
}

// kept tells whether somebody keeps the mounts should this process die.
func (d *server) kept() bool { return d.keeper != nil && d.keeper.Up() }

func (d *server) handOverSignal() os.Signal {
	if d.supervised {
		return unix.SIGUSR2
	}
	return unix.SIGTERM
}

// handOver leaves the mounts to the next daemon. What takes too long is finished by that one.
func (d *server) handOver() error {
	d.app.notify("STOPPING=1\nSTATUS=handing over")
	d.still()
	ctx, cancel := context.WithTimeout(context.Background(), controlGrace)
	defer cancel()
	var wait sync.WaitGroup
	for _, s := range d.seats {
		wait.Go(func() {
			err := errors.Join(s.control.Shutdown(ctx), s.pool.HandOver(ctx))
			d.log.Info("handed over", zap.String("pool", s.dir), zap.Error(err))
		})
	}
	wait.Wait()
	if d.supervised {
		return errHandedOver
	}
	return nil
}

// openPool opens a pool. One that a volume command has is waited for; one that
// a daemon has is not.
func (d *server) openPool(ctx context.Context, at place) (mountedPool, error) {
	for deadline := time.Now().Add(d.app.Patience); ; {
		p, err := d.open(d.poolOptions(at))
		if !errors.Is(err, pool.ErrInUse) || time.Now().After(deadline) {
			return p, err
		}
		if found, _ := d.app.daemons(ctx); slices.ContainsFunc(found, func(r running) bool { return sameDir(r.info.Dir, at.dir) }) {
			return nil, err
		}
		if interrupted := d.interrupted(ctx); interrupted != nil {
			return nil, errors.Join(err, interrupted)
		}
		time.Sleep(retryEvery)
	}
}

// interrupted tells whether somebody wants the daemon to end before it is ready.
func (d *server) interrupted(ctx context.Context) error {
	select {
	case sig := <-d.signals:
		return fmt.Errorf("ended by signal before all was mounted: %s", sig)
	default:
		return ctx.Err()
	}
}

// abandon takes back what start has done.
func (d *server) abandon() error {
	var errs []error
	for _, s := range d.seats {
		errs = append(errs, d.shut(s))
	}
	return errors.Join(errs...)
}

// attend lets go of a pool when its mount has ended, by whomever: others may open it then.
func (d *server) attend(s *seat) {
	defer close(s.done)
	<-s.pool.Served()
	if err := s.pool.ServeErr(); err != nil {
		s.err = fmt.Errorf("serving %s on %s: %w", s.dir, s.mountpoint, err)
	}
	s.err = errors.Join(s.err, d.shut(s))
	if s.err != nil {
		d.log.Error("ended", zap.String("pool", s.dir), zap.String("mountpoint", s.mountpoint), zap.Error(s.err))
		return
	}
	d.log.Info("unmounted", zap.String("pool", s.dir), zap.String("mountpoint", s.mountpoint))
}

// shut ends a pool's control socket, then the pool.
func (d *server) shut(s *seat) error {
	if s.control != nil {
		ctx, cancel := context.WithTimeout(context.Background(), controlGrace)
		defer cancel()
		if err := s.control.Shutdown(ctx); err != nil {
			d.log.Warn("volume commands were cut off", zap.Error(err))
		}
	}
	if err := s.pool.Close(); err != nil {
		return fmt.Errorf("close %s: %w", s.dir, err)
	}
	return nil
}

// stop unmounts everything, and what is in use lazily.
func (d *server) stop() {
	d.app.notify("STOPPING=1\nSTATUS=unmounting")
	d.still()
	var wait sync.WaitGroup
	for _, s := range d.seats {
		wait.Go(func() { d.unmount(s) })
	}
	wait.Wait()
}

func (d *server) unmount(s *seat) {
	log := d.log.With(zap.String("pool", s.dir), zap.String("mountpoint", s.mountpoint))
	err := s.pool.Unmount(false)
	busy := errors.Is(err, unix.EBUSY)
	if busy {
		err = s.pool.Unmount(true)
	}
	if err != nil {
		log.Error("cannot unmount", zap.Error(err))
		return
	}
	const goesOn = "it is served until its last user has gone; another signal ends that at once"
	if busy {
		log.Warn("the mount is in use and was detached: " + goesOn)
		d.app.notify("STATUS=waiting for the last user of " + s.mountpoint)
		return
	}
	go func() {
		select {
		case <-s.done:
		case <-time.After(lingerNotice):
			log.Warn("the mount has bind mounts, or copies in other mount namespaces: " + goesOn)
			d.app.notify("STATUS=waiting for the last bind mount of " + s.mountpoint)
		}
	}()
}

// cut ends without waiting for users: their files answer ENOTCONN, or the daemon's end makes them do so.
func (d *server) cut(ended <-chan struct{}) error {
	d.log.Warn("ending at once: whoever still uses a mount gets errors")
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		var wait sync.WaitGroup
		for _, s := range d.seats {
			wait.Go(func() {
				if err := s.pool.Close(); err != nil {
					d.log.Error("close", zap.String("pool", s.dir), zap.Error(err))
				}
			})
		}
		wait.Wait()
	}()
	select {
	case <-ended:
		return d.result()
	case <-closed:
	case <-time.After(cutGrace):
	}
	return errors.New("ended while mounts were in use: volumes that had changed are recounted at the next mount")
}

func (d *server) result() error {
	var errs []error
	for _, s := range d.seats {
		errs = append(errs, s.err)
	}
	return errors.Join(errs...)
}

func (d *server) status() string {
	var at []string
	for _, s := range d.seats {
		at = append(at, s.dir+" on "+s.mountpoint)
	}
	return "serving " + strings.Join(at, ", ")
}
