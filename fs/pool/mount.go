package pool

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/transport"
)

// ErrMounted is returned by Mount when the pool was mounted before.
var ErrMounted = errors.New("pool is mounted")

// MountOptions say where to mount.
type MountOptions struct {
	// Mountpoint is an existing directory outside the pool.
	Mountpoint string
	// Tier says which reads and writes come to the daemon. Default: the best
	// tier that works here.
	Tier fs.Tier
	// Wakeups is transport.Options.Wakeups.
	Wakeups transport.Wakeups
}

// mount is the pool's mount; a pool is mounted once in the life of a Pool.
type mount struct {
	mu     sync.Mutex // guards what follows
	conn   *transport.Conn
	device uint64 // of the mount, as in Stat_t.Dev
	tier   fs.Tier
	whyNot error // there is no better tier
	// takeOvers is how often it was taken over, took how long that took last.
	takeOvers uint64
	took      time.Duration
	served    chan struct{} // closed when the mount has ended
	err       error         // set before served is closed
}

func (m *mount) get() (*transport.Conn, chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conn, m.served
}

// deviceNumber returns that of the mount, 0 when there was none.
func (m *mount) deviceNumber() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.device
}

// waits is the filesystem's Options.Waits.
func (m *mount) waits() (over func()) {
	conn, _ := m.get()
	if conn == nil {
		return func() {}
	}
	return conn.Waits()
}

// point returns where the pool is mounted, "" when it is not.
func (m *mount) point() string {
	conn, served := m.get()
	if conn == nil {
		return ""
	}
	select {
	case <-served:
		return ""
	default:
		return conn.Mountpoint()
	}
}

// MountSource is what mountinfo and df show as the mounted device of the pool of that id. It is how its
// mounts are known again.
func MountSource(id string) string { return "croft:" + id }

func (p *Pool) source() string { return MountSource(p.id) }

// Mount mounts the pool and serves it in the background until somebody unmounts
// it. A mount of this pool that is there already is dead, since this process
// has the pool: it is taken away first. What is published agrees with what is mounted when Mount returns.
func (p *Pool) Mount(o MountOptions) error {
	if err := p.serveMount(o); err != nil {
		return err
	}
	p.reconcile()
	return nil
}

func (p *Pool) serveMount(o MountOptions) error {
	p.mount.mu.Lock()
	defer p.mount.mu.Unlock()
	if p.mount.conn != nil {
		return fmt.Errorf("%s: %w on %s", p.dir, ErrMounted, p.mount.conn.Mountpoint())
	}
	var conn *transport.Conn
	var err error
	if p.kept != nil {
		conn, err = p.resume(o)
	} else {
		conn, err = p.mountAnew(o)
	}
	if err != nil {
		return err
	}
	p.mount.conn, p.mount.served = conn, make(chan struct{})
	if p.mount.device, err = conn.Device(); err != nil {
		p.log.Warn("the mount has gone already", zap.Error(err)) // somebody was quick
	}
	go func() {
		err := conn.Serve()
		p.mount.mu.Lock()
		defer p.mount.mu.Unlock()
		p.mount.err = err
		close(p.mount.served)
	}()
	return nil
}

func (p *Pool) transportOptions(o MountOptions) transport.Options {
	return transport.Options{
		FsName:     p.source(),
		Mountpoint: o.Mountpoint,
		Wakeups:    o.Wakeups,
		State:      p.state,
		Notify:     p.notify,
		Step:       p.requestStep,
		Logger:     p.log,
	}
}

func (p *Pool) mountAnew(o MountOptions) (*transport.Conn, error) {
	if err := p.checkMountpoint(o.Mountpoint); err != nil {
		return nil, err
	}
	if err := p.clearStale(o.Mountpoint); err != nil {
		return nil, err
	}
	conn, err := transport.Mount(p.fs, p.transportOptions(o))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: `mkdir -p %s` makes it", err, o.Mountpoint)
	} else if err != nil {
		return nil, err
	}
	tier, whyNot, err := p.chooseTier(conn, o.Tier)
	if err == nil {
		err = p.fs.Attach(conn, tier, 0)
	}
	if err == nil {
		err = p.keep(conn, tier)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Unmount(true), conn.Serve())
	}
	p.mount.tier, p.mount.whyNot = tier, whyNot
	p.log.Info("mounted", zap.String("mountpoint", conn.Mountpoint()), zap.String("tier", string(tier)),
		zap.NamedError("why_not_better", whyNot))
	return conn, nil
}

func (m *mount) describeTakeOvers() (uint64, time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.takeOvers, m.took
}

// checkMountpoint refuses one in the pool: the pool would hold itself.
func (p *Pool) checkMountpoint(mountpoint string) error {
	if mountpoint == "" {
		return fmt.Errorf("%w: no mount point given", ErrInvalid)
	}
	at, err := transport.ResolveMountpoint(mountpoint)
	if err != nil {
		return fmt.Errorf("mount point %s: %w", mountpoint, err)
	}
	if at == p.dir || strings.HasPrefix(at, p.dir+"/") {
		return fmt.Errorf("%w: mount point %s is inside the pool %s", ErrInvalid, mountpoint, p.dir)
	}
	return nil
}

// clearStale detaches dead mounts of this pool from the mount point. Dead bind
// mounts elsewhere stay: whoever writes there must get an error, and not reach
// the directory underneath.
func (p *Pool) clearStale(mountpoint string) error {
	stale, err := transport.StaleMounts(mountpoint)
	if err != nil {
		return err
	}
	for _, m := range stale {
		if m.Source != p.source() {
			return fmt.Errorf("%w: another pool (%s) is mounted on %s", ErrInvalid, m.Source, m.Mountpoint)
		}
		if err := transport.Detach(m.Mountpoint); err != nil {
			return err
		}
		p.log.Info("dead mount detached", zap.String("mountpoint", m.Mountpoint))
	}
	left, err := transport.Mounts(transport.MountFilter{Source: p.source()})
	for _, m := range left {
		p.log.Warn("a dead mount of this pool remains", zap.String("mountpoint", m.Mountpoint), zap.String("root", m.Root))
	}
	return err
}

// Served is closed when the mount has ended; nil when there was none.
func (p *Pool) Served() <-chan struct{} {
	_, served := p.mount.get()
	return served
}

// ServeErr tells why the mount has ended: nil when it was unmounted.
func (p *Pool) ServeErr() error {
	p.mount.mu.Lock()
	defer p.mount.mu.Unlock()
	return p.mount.err
}

// Unmount takes the mount away. Without lazy it fails with EBUSY while the mount
// is in use; with lazy it is detached, and served until its last user has gone.
// It returns nil when nothing is mounted.
func (p *Pool) Unmount(lazy bool) error {
	conn, _ := p.mount.get()
	if conn == nil {
		return nil
	}
	return conn.Unmount(lazy)
}

// endMount ends the mount and waits until no request is under way. One in use is
// cut off, and so is one with bind mounts, such as publications: they remain, dead, for the
// next daemon to replace. One that was detached before is waited for.
func (p *Pool) endMount() error {
	conn, served := p.mount.get()
	if conn == nil {
		return nil
	}
	bound := p.isBound(conn.Mountpoint())
	var err error
	if !bound {
		err = conn.Unmount(false)
	}
	if err != nil || bound {
		// MNT_FORCE ends the connection (fuse_umount_begin, fs/fuse/inode.c).
		if err := unix.Unmount(conn.Mountpoint(), unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("cut off %s: %w", conn.Mountpoint(), err)
		}
	}
	<-served
	return p.ServeErr()
}

// isBound tells whether the pool is mounted on mountpoint and has bind mounts, for which an unmount would not end the connection.
func (p *Pool) isBound(mountpoint string) bool {
	device := p.mount.deviceNumber()
	mounts, err := transport.Mounts(transport.MountFilter{Source: p.source()})
	if err != nil {
		p.log.Warn("bind mounts", zap.Error(err))
	}
	here, others := false, false
	for _, m := range mounts {
		if m.Device != device {
			continue
		}
		here = here || m.Mountpoint == mountpoint
		others = others || m.Mountpoint != mountpoint
	}
	return here && others
}
