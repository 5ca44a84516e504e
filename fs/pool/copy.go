package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/copytree"
	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

const (
	// stagePrefix begins the names in snapshots/ of what is copied ahead; no snapshot's does. A name of the trash's
	// follows. What is there of it at start is of no use to anybody.
	stagePrefix = ".stage-"
)

// stageFrom is the size in bytes of the smallest file that is copied ahead: where to copy it takes longer than to move
// it. A reflink is several transactions on xfs, and no more than a move on btrfs unless the file has many extents.
var stageFrom = map[string]int64{"ext4": 64 << 10, "xfs": 1, "btrfs": 1 << 20}

// place is where a copy is made.
type place struct {
	parent *os.File
	name   string
	wipe   bool
}

// moment is what a copy of a live volume shows.
type moment struct {
	at    time.Time
	limit quota.Usage
	fixed bool          // meta.Volume.InodesFixed
	held  time.Duration // how long changes have waited
}

func (p *Pool) copyOptions(op *operation) copytree.Options {
	return copytree.Options{Rule: p.rule, Progress: &op.progress}
}

// copyLive makes the directory to a copy of the volume's tree at one moment. While that is taken no change of the
// volume begins, and none that had begun is half in. What can be done before or after, is.
func (p *Pool) copyLive(ctx context.Context, v *volume, to place, op *operation) (m moment, err error) {
	dst, err := openDirAt(to.parent, to.name)
	if err != nil {
		return m, err
	}
	defer dst.Close()
	// A reflink writes dirty data back first: better now, while nobody waits.
	if err := p.sync(); err != nil {
		return m, err
	}
	o := p.copyOptions(op)
	stage, err := p.stage(ctx, v, to, &o)
	if err != nil {
		return m, err
	}
	defer stage()
	p.step("copy: staged")
	begun := time.Now()
	err = p.fs.Quiesce(v.name, func(quota.Usage) error {
		if found, err := p.find(v.name); err != nil {
			return err
		} else if found != v {
			return fmt.Errorf("volume %s: %w: it was replaced meanwhile", v.name, ErrNotFound)
		}
		src, err := openDirAt(p.volumesDir, v.name)
		if err != nil {
			return err
		}
		defer src.Close()
		m.at, m.limit, m.fixed = now(), v.ledger.Limit(), p.recordOf(v).InodesFixed
		return copytree.Copy(ctx, src, dst, o)
	})
	m.held = time.Since(begun)
	p.step("copy: copied")
	if errors.Is(err, fs.ErrNoVolume) {
		err = fmt.Errorf("volume %s: %w: it was deleted meanwhile", v.name, ErrNotFound)
	}
	return m, err
}

// stage copies what it can of a volume ahead, and has o use it. Call done when the copy was made.
func (p *Pool) stage(ctx context.Context, v *volume, to place, o *copytree.Options) (done func(), err error) {
	o.StageFrom = stageFrom[p.fstype]
	name := stagePrefix + p.trash.newName(to.wipe)
	if err := p.makeDir(p.snapshotsDir, name, dirOptions{mode: 0o700, wipe: to.wipe}); err != nil {
		return nil, err
	}
	dir, err := openDirAt(p.snapshotsDir, name)
	if err != nil {
		return nil, err
	}
	done = func() {
		var err error
		if o.Staged != nil {
			err = o.Staged.Close()
		}
		if err := errors.Join(err, dir.Close(), p.trash.take(p.snapshotsDir, name, to.wipe)); err != nil {
			p.log.Error("what was copied ahead is left until the next start", zap.Error(err))
		}
		p.trash.wake()
	}
	src, err := openDirAt(p.volumesDir, v.name)
	if err == nil {
		defer src.Close()
		o.Staged, err = copytree.Stage(ctx, src, dir, *o)
	}
	if err != nil {
		done()
		return nil, err
	}
	return done, nil
}

// reflinks tells whether files can share their blocks here.
func (p *Pool) reflinks() bool {
	a, err := p.scratch()
	if err != nil {
		return false
	}
	defer unix.Close(a)
	b, err := p.scratch()
	if err != nil {
		return false
	}
	defer unix.Close(b)
	return unix.IoctlFileClone(a, b) == nil
}

func (p *Pool) scratch() (int, error) {
	return unix.Openat(int(p.root.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
}

// sync writes all of the backing filesystem back.
func (p *Pool) sync() error {
	if err := unix.Syncfs(int(p.root.Fd())); err != nil {
		return fmt.Errorf("syncfs: %w", err)
	}
	return nil
}

// finish makes a copied tree durable and counts it.
func (p *Pool) finish(ctx context.Context, at place) (quota.Usage, error) {
	if err := p.sync(); err != nil {
		return quota.Usage{}, err
	}
	return p.scan(ctx, at.parent, at.name, quota.ScanOptions{})
}

// copyBlock makes the file to one with the data of a block volume or its snapshot. It is durable then.
func (p *Pool) copyBlock(ctx context.Context, from, to place, op *operation) error {
	src, err := openFileAt(from.parent, from.name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := p.makeFile(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	if _, err := copytree.File(ctx, src, dst, p.copyOptions(op)); err != nil {
		return err
	}
	return errors.Join(dst.Sync(), to.parent.Sync())
}

// copyLiveBlock is copyLive for a block volume. Who writes to its device cannot be held: a reflink is of one moment by
// itself, and anything else needs that nobody writes.
func (p *Pool) copyLiveBlock(ctx context.Context, v *volume, to place, op *operation) (m moment, err error) {
	l, attached, err := p.loopOf(v)
	if err != nil {
		return m, err
	}
	if attached && !l.readOnly {
		if !p.reflinks() {
			return m, fmt.Errorf("%w: it is attached as %s, and %s cannot copy it while it is written: "+
				"detach it, or attach it read-only", ErrBusy, l.device, p.fstype)
		}
		if err := l.flush(); err != nil {
			return m, err
		}
	}
	m.at, m.limit, m.fixed = now(), v.ledger.Limit(), true
	err = p.copyBlock(ctx, place{parent: p.blocksDir, name: v.name}, to, op)
	return m, err
}

// recordOf returns a volume's record as it is now.
func (p *Pool) recordOf(v *volume) meta.Volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	return v.record
}

// sourceOf says what a live volume is as a source.
func sourceOf(r meta.Volume) meta.Source { return meta.Source{Volume: r.Name, Created: r.Created} }

// sameSource tells whether two are the same; when gone, b's time is not known.
func sameSource(a, b meta.Source, gone bool) bool {
	return a.Volume == b.Volume && a.Snapshot == b.Snapshot && (gone || a.Created.Equal(b.Created))
}

// now is the time that goes into records: what comes back from there is equal to it.
func now() time.Time { return time.Now().UTC().Round(0) }

// describeSource names a source for people and logs.
func describeSource(s meta.Source) string {
	if s.Snapshot != "" {
		return "snapshot " + s.Snapshot
	}
	return "volume " + s.Volume
}
