package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// countsAtATime is how many volumes are recounted at a time; each scan is
// parallel in itself.
const countsAtATime = 2

// count is whether a volume's use is known. Its changes wait until it has ended.
type count struct {
	ctx   context.Context
	stop  context.CancelFunc // ends it early; its changes then fail
	ended chan struct{}

	mu  sync.Mutex
	err error // guarded by mu: why the use is not known although it has ended
}

// counted is the count of a volume whose use is known.
func counted() *count {
	c := &count{stop: func() {}, ended: make(chan struct{})}
	close(c.ended)
	return c
}

func (p *Pool) newCount() *count {
	c := &count{ended: make(chan struct{})}
	c.ctx, c.stop = context.WithCancel(p.ctx)
	return c
}

func (c *count) done() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

func (c *count) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *count) setFailure(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

// wait waits until the use is known; an error says that it is not.
func (c *count) wait(ctx context.Context) error {
	select {
	case <-c.ended:
		return c.failure()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// WaitCounted waits until no volume is being recounted.
func (p *Pool) WaitCounted(ctx context.Context) error {
	for _, v := range p.all() {
		select {
		case <-v.count.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// startCounts begins the recounts that recover has found to be due.
func (p *Pool) startCounts() {
	for _, v := range p.all() {
		if c := v.count; !c.done() {
			p.background.Go(func() {
				err := p.recount(c.ctx, v)
				if err != nil {
					p.log.Error("recount failed: changes are refused", zap.String("volume", v.name), zap.Error(err))
				}
				c.setFailure(err)
				close(c.ended)
			})
		}
	}
}

// recount frees what had lost its name when the pool was last in use, and
// counts the rest.
func (p *Pool) recount(ctx context.Context, v *volume) (err error) {
	select {
	case p.counting <- struct{}{}:
		defer func() { <-p.counting }()
	case <-ctx.Done():
		return ctx.Err()
	}
	p.step("recount: begun")
	begin := time.Now()
	if v.used {
		err = p.countLeft(ctx, v)
	} else {
		err = p.countFresh(ctx, v)
	}
	if err != nil {
		return err
	}
	p.fs.SetCounted(v.name)
	used := v.ledger.Used()
	p.log.Info("volume recounted", zap.String("volume", v.name), zap.Stringer("used", used), zap.Duration("took", time.Since(begin)))
	if limit := v.ledger.Limit(); !used.Fits(limit) {
		p.log.Error("volume is above its limit", zap.String("volume", v.name), zap.Stringer("used", used), zap.Stringer("limit", limit))
	}
	return nil
}

// countFresh counts a volume of which no file can be open.
func (p *Pool) countFresh(ctx context.Context, v *volume) error {
	if err := errors.Join(p.reapOrphans(v.name, nil), p.settleMaps()); err != nil {
		return err
	}
	used, err := p.scan(ctx, p.volumesDir, v.name, quota.ScanOptions{})
	if err == nil {
		v.ledger.Reset(used)
	}
	return err
}

// countLeft counts a volume of which files may be open since an earlier daemon's life.
func (p *Pool) countLeft(ctx context.Context, v *volume) error {
	left, err := p.fs.Left(v.name)
	if errors.Is(err, fs.ErrNoVolume) {
		return p.countFresh(ctx, v)
	} else if err != nil {
		return err
	}
	defer left.Settle()
	if err := p.reapOrphans(v.name, left); err != nil {
		return err
	}
	// Who writes is stopped first: what follows may take long.
	if _, err := p.scan(ctx, p.volumesDir, v.name, quota.ScanOptions{Watch: left.Watch, OnlyWatch: true}); err != nil {
		return err
	}
	if err := p.settleMaps(); err != nil {
		return err
	}
	orphans, err := p.scan(ctx, p.orphansDir, v.name, quota.ScanOptions{Watch: left.WatchOrphan})
	if err != nil {
		return err
	}
	used, err := p.scan(ctx, p.volumesDir, v.name, quota.ScanOptions{Watch: left.Watch})
	if err == nil {
		v.ledger.Reset(used.Add(orphans))
	}
	return err
}

// settleMaps makes the extent maps complete: on xfs, data that waits for write-back
// over shared blocks is not there yet.
func (p *Pool) settleMaps() error {
	if p.fstype != "xfs" {
		return nil
	}
	if err := unix.Syncfs(int(p.root.Fd())); err != nil {
		return fmt.Errorf("syncfs: %w", err)
	}
	return nil
}

// scan counts one of a volume's trees, by the pool's rule.
func (p *Pool) scan(ctx context.Context, parent *os.File, name string, o quota.ScanOptions) (quota.Usage, error) {
	tree, err := openDirAt(parent, name)
	if err != nil {
		return quota.Usage{}, err
	}
	defer tree.Close()
	o.Rule = p.rule
	found, err := quota.Scan(ctx, tree, o)
	return found.Usage, err
}

// reapOrphans removes a volume's files without a name, but those that are written
// still. It is called while no other file of the volume is open.
func (p *Pool) reapOrphans(name string, left *fs.Left) error {
	dir, err := openDirAt(p.orphansDir, name)
	if err != nil {
		return err
	}
	defer dir.Close()
	kept := make(map[string]bool)
	for {
		names, err := dir.Readdirnames(0)
		if err != nil {
			return err
		}
		if len(names) == len(kept) {
			return nil
		}
		for _, orphan := range names {
			if kept[orphan] || left != nil && left.WatchOrphan(int(dir.Fd()), orphan) != nil {
				kept[orphan] = true
				continue
			}
			if err := unix.Unlinkat(int(dir.Fd()), orphan, 0); err != nil {
				return fmt.Errorf("orphan %s/%s: %w", dir.Name(), orphan, err)
			}
		}
		if _, err := dir.Seek(0, 0); err != nil {
			return err
		}
	}
}

// hasOrphans tells whether a volume holds files without a name.
func (p *Pool) hasOrphans(name string) (bool, error) {
	dir, err := openDirAt(p.orphansDir, name)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(1)
	return len(names) > 0, ignoreEOF(err)
}

// markDirty is the filesystem's BeforeChange.
func (p *Pool) markDirty(v *volume) error {
	if err := v.count.failure(); err != nil {
		return fmt.Errorf("its use is unknown: %w", err)
	}
	if err := p.store.SetDirty(v.name, p.bootID); err != nil {
		p.log.Error("dirty mark", zap.String("volume", v.name), zap.Error(err))
		return err
	}
	v.idle.dirty.Store(true)
	return nil
}

// idleState is what watchIdle knows of a volume.
type idleState struct {
	dirty atomic.Bool // its record says so

	// watchIdle's own:
	changes uint64
	since   time.Time // changes has been so since then
}

// watchIdle records volumes that have not changed for a while as clean.
func (p *Pool) watchIdle() {
	tick := time.NewTicker(max(p.idleAfter/2, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
		}
		var idle []*volume
		for _, v := range p.all() {
			if !p.isIdle(v) {
				continue
			}
			if err := p.settle(v); err != nil {
				p.log.Error("recount", zap.String("volume", v.name), zap.Error(err))
			}
			idle = append(idle, v)
		}
		if err := p.checkpoint(idle); err != nil {
			p.log.Error("checkpoint", zap.Error(err))
		}
	}
}

// settle recounts a volume of which a take-over could not tell all, if it is one.
func (p *Pool) settle(v *volume) error {
	if !p.fs.Unsettled(v.name) {
		return nil
	}
	defer p.names.take(v.name)()
	var c VolumeCheck
	return p.quiesce(v, func(floating quota.Usage) error { return p.compare(p.ctx, v, floating, false, &c) })
}

func (p *Pool) isIdle(v *volume) bool {
	if !v.idle.dirty.Load() || p.fs.Writers(v.name) > 0 {
		return false
	}
	now, changes := time.Now(), p.fs.Changes(v.name)
	if changes != v.idle.changes || v.idle.since.IsZero() {
		v.idle.changes, v.idle.since = changes, now
		return false
	}
	return now.Sub(v.idle.since) >= p.idleAfter
}

// snapshot is a volume's use at a moment at which nothing was under way.
type snapshot struct {
	v       *volume
	changes uint64
	used    quota.Usage
}

// checkpoint records the use of those volumes that do not change meanwhile:
// snapshot, sync, and then, if the snapshot still holds, the record. The sync
// comes first so that after a power cut the disk holds what the record says.
func (p *Pool) checkpoint(volumes []*volume) error {
	p.checkpointing.Lock()
	defer p.checkpointing.Unlock()
	var snapshots []snapshot
	var errs []error
	for _, v := range volumes {
		if !v.idle.dirty.Load() || !v.count.done() || v.count.failure() != nil {
			continue
		}
		s, ok, err := p.snapshot(v)
		if err != nil {
			errs = append(errs, err)
		} else if ok {
			snapshots = append(snapshots, s)
		}
	}
	if len(snapshots) == 0 {
		return errors.Join(errs...)
	}
	if err := unix.Syncfs(int(p.root.Fd())); err != nil {
		return errors.Join(append(errs, fmt.Errorf("syncfs: %w", err))...)
	}
	for _, s := range snapshots {
		errs = append(errs, p.record(s))
	}
	return errors.Join(errs...)
}

// snapshot takes a volume's use, unless it holds something that has no name: a
// crash would free that, and the record would be wrong.
func (p *Pool) snapshot(v *volume) (s snapshot, ok bool, err error) {
	s.v = v
	err = p.quiesce(v, func(floating quota.Usage) error {
		s.changes, s.used = p.fs.Changes(v.name), v.ledger.Used()
		if floating != (quota.Usage{}) || p.fs.Writers(v.name) > 0 {
			return nil
		}
		orphans, err := p.hasOrphans(v.name)
		ok = err == nil && !orphans
		return err
	})
	return s, ok, err
}

func (p *Pool) record(s snapshot) error {
	return p.quiesce(s.v, func(quota.Usage) error {
		if p.fs.Changes(s.v.name) != s.changes {
			return nil
		}
		c := meta.Checkpoint{Used: s.used, BootID: p.bootID, Taken: time.Now().UTC()}
		if err := p.store.PutCheckpoint(s.v.name, c, true); err != nil {
			return err
		}
		s.v.idle.dirty.Store(false)
		p.fs.SetClean(s.v.name)
		return nil
	})
}
