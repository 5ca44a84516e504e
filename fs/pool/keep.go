package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/fs/transport"
)

// Keeper keeps descriptors for the daemon that comes next. fs/keeper's is one.
type Keeper interface {
	// Take returns what is kept, by name; the descriptors are the caller's.
	Take() (map[string]*os.File, error)
	// Hold keeps a duplicate of fd under a name, in the place of what was kept there.
	Hold(name string, fd int) error
	// Drop lets go of all that is kept.
	Drop() error
}

// The names of what is kept of a pool: the state region, the connection, the gate's
// group and the claim. The region's tier is set once all of them are.
const (
	keptState      = "state"
	keptConnection = "fuse"
	keptGate       = "gate"
	keptClaim      = "claim"
)

// errKept is returned to who opens a pool without the keeper that has its mount.
var errKept = fmt.Errorf("%w: its mount is kept for the daemon to come (by `croft keeper`, or `croft mount` itself): "+
	"when none is to come, end that first", ErrInUse)

// kept is what an earlier daemon has left.
type kept struct {
	connection, gate *os.File // gate is nil in tiers without one
	begun            time.Time
}

func (k *kept) gateFD() int {
	if k.gate == nil {
		return 0
	}
	return int(k.gate.Fd())
}

func (k *kept) close() {
	for _, f := range []*os.File{k.connection, k.gate} {
		if f != nil {
			f.Close()
		}
	}
}

// take returns what is kept of the pool, by name.
func (p *Pool) take() (map[string]*os.File, error) {
	if p.keeper == nil {
		return nil, nil
	}
	files, err := p.keeper.Take()
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	return files, nil
}

// openClaim claims the pool for this process and whoever keeps its mount afterwards: who comes without that keeper would
// change the pool under those who wait for the next daemon. It is a lock on the directory of volumes; earlier is what is kept
// of it, or nil.
func (p *Pool) openClaim(earlier *os.File) (err error) {
	if p.claim = earlier; earlier != nil {
		return nil
	}
	if p.claim, err = os.OpenFile(filepath.Join(p.dir, volumesName), unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
		return err
	}
	switch err := unix.Flock(int(p.claim.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return errKept
	case err != nil:
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// openState takes over what is kept of the pool, files, or begins anew. state.ErrNewer for
// what only a newer croft can go on with: it stays kept.
func (p *Pool) openState(files map[string]*os.File, begun time.Time) error {
	if err := p.takeState(files, begun); err != nil || p.state != nil {
		return err
	}
	var err error
	p.state, err = state.New(p.id, p.bootID, transport.RequestSize)
	return err
}

// takeState takes from files what it can go on with.
func (p *Pool) takeState(files map[string]*os.File, begun time.Time) error {
	if files[keptState] == nil || files[keptConnection] == nil {
		return nil
	}
	region, err := state.Open(takeFrom(files, keptState))
	switch {
	case errors.Is(err, state.ErrForeign):
		p.log.Error("what was kept cannot be used", zap.Error(err))
		return nil
	case err != nil:
		return err
	}
	tier := fs.Tier(region.Tier())
	gated := tier == fs.TierGate || tier == fs.TierHold
	if region.Pool() != p.id || region.Boot() != p.bootID || tier == "" || gated && files[keptGate] == nil {
		p.log.Warn("what was kept is not complete, or of something else: the pool is mounted anew")
		return region.Close()
	}
	p.state = region
	p.kept = &kept{connection: takeFrom(files, keptConnection), begun: begun}
	if gated {
		p.kept.gate = takeFrom(files, keptGate)
	}
	return nil
}

// takeFrom takes a file out of files, if it is there.
func takeFrom(files map[string]*os.File, name string) *os.File {
	f := files[name]
	delete(files, name)
	return f
}

// resume goes on with the earlier daemon's mount.
func (p *Pool) resume(o MountOptions) (*transport.Conn, error) {
	k := p.kept
	if at := p.state.Mountpoint(); at != o.Mountpoint {
		resolved, err := transport.ResolveMountpoint(o.Mountpoint)
		if err != nil || at != resolved {
			return nil, fmt.Errorf("%w: it is mounted on %s by the daemon before this one: go on there, or `umount %s` first", ErrMounted, at, at)
		}
	}
	tier := fs.Tier(p.state.Tier())
	if o.Tier != "" && o.Tier != tier {
		p.log.Warn("the tier stays what it was until the pool is mounted anew", zap.String("tier", string(tier)))
	}
	fd, err := unix.FcntlInt(k.connection.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	conn, err := transport.Resume(p.fs, p.transportOptions(o), fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	if err := p.fs.Attach(conn, tier, k.gateFD()); err != nil {
		return nil, err // what was kept stays so
	}
	if err := p.keeper.Hold(keptClaim, int(p.claim.Fd())); err != nil { // an older croft has none
		return nil, fmt.Errorf("keeper: %w", err)
	}
	k.close()
	p.mount.tier, p.mount.took = tier, time.Since(k.begun)
	p.mount.takeOvers = p.state.TakenOver()
	p.log.Info("taken over", zap.String("mountpoint", conn.Mountpoint()), zap.String("tier", string(tier)),
		zap.Uint64("take_overs", p.mount.takeOvers), zap.Duration("took", p.mount.took))
	return conn, nil
}

// keep has the keeper hold what the next daemon needs. Nothing has been served yet.
func (p *Pool) keep(conn *transport.Conn, tier fs.Tier) error {
	p.state.SetMountpoint(conn.Mountpoint())
	if p.keeper == nil {
		p.state.SetTier(string(tier))
		return nil
	}
	if !conn.Resends() {
		p.log.Warn("the mount ends with its daemon", zap.Error(transport.ErrNoResend))
		return p.keeper.Drop()
	}
	err := errors.Join(p.keeper.Drop(), p.keeper.Hold(keptClaim, int(p.claim.Fd())),
		p.keeper.Hold(keptState, p.state.FD()), p.keeper.Hold(keptConnection, conn.FD()))
	if gate := p.fs.GateFD(); err == nil && gate >= 0 {
		err = p.keeper.Hold(keptGate, gate)
	}
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	p.state.SetTier(string(tier))
	return nil
}

// HandOver is Close, but that the mount is left to the next daemon: what is asked of
// it waits for that. When ctx ends before all requests under way are answered, the next
// daemon does those again, and nothing is recorded here.
func (p *Pool) HandOver(ctx context.Context) error {
	conn, _ := p.mount.get()
	if conn == nil || p.keeper == nil {
		return p.Close()
	}
	p.closing.Lock()
	defer p.closing.Unlock()
	if !p.shut() {
		return nil
	}
	if err := conn.Pause(ctx); err != nil {
		// Whoever is under way has locks that what follows waits for, or waits itself for
		// what cancel would have fail.
		return err
	}
	p.cancel()
	p.background.Wait()
	err := p.checkpoint(p.all())
	return errors.Join(err, p.fs.Leave(), p.store.Close(), p.claim.Close(), p.lock.Close())
}
