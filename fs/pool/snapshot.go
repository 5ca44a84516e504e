package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// Snapshot describes a snapshot: what a volume held at one moment. It needs its source no longer.
type Snapshot struct {
	Name   string `json:"name"`
	Volume string `json:"volume"` // the source's name; it may be gone
	Kind   Kind   `json:"kind"`
	// Used is what a volume that is restored from it uses, and what it counts in Capacity.Committed.
	Used quota.Usage `json:"used"`
	// Limit is the source's at that moment, and a restored volume's if none is named.
	Limit   quota.Usage `json:"limit"`
	Created time.Time   `json:"created"` // that moment
	// Held is for how long the source's writers were held.
	Held time.Duration `json:"held"`
	// Wipe tells that it is overwritten before its space is freed, as its source.
	Wipe   bool              `json:"wipe,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
}

// SnapshotOptions describe a new snapshot.
type SnapshotOptions struct {
	// Volume names the source.
	Volume string `json:"volume"`
	// Labels are kept with the snapshot; at most MaxLabels bytes in all.
	Labels map[string]string `json:"labels,omitempty"`
}

// snap is a snapshot of an open pool.
type snap struct {
	record meta.Snapshot // does not change
	users  int           // who copies from it; guarded by Pool.mu
}

func (s *snap) describe() Snapshot {
	r := s.record
	return Snapshot{Name: r.Name, Volume: r.Source.Volume, Kind: kindOf(r.Block), Used: r.Used, Limit: r.Limit,
		Created: r.Created, Held: r.Source.Held, Wipe: r.Wipe, Labels: r.Labels}
}

// snapName is what stands for a snapshot in nameLocks; no volume has that name.
func snapName(name string) string { return "snapshot/" + name }

func (p *Pool) snapPlace(r meta.Snapshot) place {
	return place{parent: p.snapshotsDir, name: r.Name, wipe: r.Wipe}
}

// checkSnapshotName is CheckName, which speaks of volumes.
func checkSnapshotName(name string) error {
	if err := CheckName(name); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// CreateSnapshot makes a snapshot of a volume. It shows one moment, at which no write(2) was half done; changes of
// the volume wait meanwhile. It is durable when CreateSnapshot returns. ErrSnapshotExists when there is one of that name,
// ErrSnapshotExistsSame when that is of the same volume, ErrNotFound when there is no such volume, ErrNoRoom, ErrMissing.
// When ctx ends before it is ready, there is none.
func (p *Pool) CreateSnapshot(ctx context.Context, name string, o SnapshotOptions) (Snapshot, error) {
	if err := checkSnapshotName(name); err != nil {
		return Snapshot{}, err
	}
	if err := checkLabels(o.Labels); err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %s: %w", name, err)
	}
	defer p.names.take(snapName(name))()
	v, findErr := p.find(o.Volume)
	if findErr != nil && !errors.Is(findErr, ErrNotFound) {
		return Snapshot{}, findErr
	}
	if s, err := p.findSnap(name); err == nil {
		source := meta.Source{Volume: o.Volume}
		if v != nil {
			source = sourceOf(p.recordOf(v))
		}
		if sameSource(s.record.Source, source, v == nil) {
			return s.describe(), fmt.Errorf("snapshot %s: %w", name, ErrSnapshotExistsSame)
		}
		return Snapshot{}, fmt.Errorf("snapshot %s: %w, of volume %s", name, ErrSnapshotExists, s.record.Source.Volume)
	} else if !errors.Is(err, ErrSnapshotNotFound) {
		return Snapshot{}, err
	}
	if findErr != nil {
		return Snapshot{}, findErr
	}
	used, err := p.usedOf(ctx, v)
	if err != nil {
		return Snapshot{}, err
	}
	r := p.recordOf(v)
	release, err := p.promise(used.Bytes)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %s: %w", name, err)
	}
	defer release()
	op := &operation{Operation: Operation{Kind: OperationSnapshot, Name: name, Source: describeSource(sourceOf(r)),
		TotalEntries: used.Inodes, TotalBytes: used.Bytes}}
	ctx, end, err := p.begin(ctx, op)
	if err != nil {
		return Snapshot{}, err
	}
	defer end()
	record := meta.Snapshot{Name: name, State: meta.StateCreating, Source: sourceOf(r), Family: familyOf(r), Block: r.Block, Wipe: r.Wipe,
		Labels: o.Labels}
	s, err := p.createSnapshot(ctx, record, v, op)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot %s: %w", name, asNoRoom(err))
	}
	return s.describe(), nil
}

// usedOf returns what a live volume uses, as far as it can be known before a copy of it is made, and refuses one that
// cannot be copied.
func (p *Pool) usedOf(ctx context.Context, v *volume) (quota.Usage, error) {
	if v.missing {
		return quota.Usage{}, fmt.Errorf("volume %s: %w", v.name, ErrMissing)
	}
	if err := v.count.wait(ctx); err != nil {
		return quota.Usage{}, fmt.Errorf("volume %s: %w", v.name, err)
	}
	p.fs.Refresh(v.name)
	used := v.ledger.Used()
	if err := p.needRoomFor(used); err != nil {
		return used, fmt.Errorf("volume %s: %w", v.name, err)
	}
	return used, nil
}

// needRoomFor is needRoom for a copy of what uses used.
func (p *Pool) needRoomFor(used quota.Usage) error {
	if p.reflinks() {
		used.Bytes = 0
	}
	if err := p.needRoom(used); err != nil {
		return fmt.Errorf("a copy of it: %w", err)
	}
	return nil
}

// createSnapshot performs the steps of the package's documentation, and takes them back on failure.
func (p *Pool) createSnapshot(ctx context.Context, record meta.Snapshot, v *volume, op *operation) (*snap, error) {
	if err := p.strayIn(p.snapshotsDir, record.Name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSnapshotExists, err)
	}
	if err := p.store.CreateSnapshot(record); err != nil {
		return nil, err
	}
	p.step("snapshot: recorded")
	if err := p.fillSnapshot(ctx, &record, v, op); err != nil {
		return nil, errors.Join(err, p.removeSnapshot(record))
	}
	p.step("snapshot: made")
	record.State = meta.StateReady
	if err := p.store.PutSnapshot(record); err != nil {
		return nil, errors.Join(err, p.removeSnapshot(record))
	}
	p.step("snapshot: ready")
	s := &snap{record: record}
	p.mu.Lock()
	p.snaps[record.Name] = s
	p.mu.Unlock()
	p.log.Info("snapshot created", zap.String("snapshot", record.Name), zap.String("volume", v.name),
		zap.Stringer("used", record.Used), zap.Duration("writers_held", record.Source.Held))
	return s, nil
}

// fillSnapshot makes what the snapshot holds, durably, and completes its record.
func (p *Pool) fillSnapshot(ctx context.Context, record *meta.Snapshot, v *volume, op *operation) (err error) {
	to := p.snapPlace(*record)
	var m moment
	if record.Block {
		m, err = p.copyLiveBlock(ctx, v, to, op)
		record.Used = m.limit
	} else {
		if err := p.makeDir(to.parent, to.name, dirOptions{mode: 0o700, wipe: to.wipe}); err != nil {
			return err
		}
		if m, err = p.copyLive(ctx, v, to, op); err == nil {
			record.Used, err = p.finish(ctx, to)
		}
	}
	record.Created, record.Limit, record.InodesFixed, record.Source.Held = m.at, m.limit, m.fixed, m.held
	return err
}

// DeleteSnapshot deletes a snapshot. It is gone for good when DeleteSnapshot returns; its space is freed in the
// background. ErrSnapshotNotFound, ErrBusy while a volume is made from it.
func (p *Pool) DeleteSnapshot(_ context.Context, name string) error {
	if err := checkSnapshotName(name); err != nil {
		return err
	}
	defer p.names.take(snapName(name))()
	s, err := p.findSnap(name)
	if err != nil {
		return err
	}
	p.mu.Lock()
	busy := s.users > 0
	if !busy {
		delete(p.snaps, name) // nobody begins to use it
	}
	p.mu.Unlock()
	if busy {
		return fmt.Errorf("snapshot %s: %w: a volume is being made from it", name, ErrBusy)
	}
	record := s.record
	record.State = meta.StateDeleting
	if err := p.store.PutSnapshot(record); err != nil {
		p.mu.Lock()
		p.snaps[name] = s
		p.mu.Unlock()
		return fmt.Errorf("snapshot %s: %w", name, err)
	}
	// From here on it is gone, whatever happens.
	p.step("snapshot delete: recorded")
	if err := p.removeSnapshot(record); err != nil {
		return fmt.Errorf("snapshot %s: %w", name, err)
	}
	p.log.Info("snapshot deleted", zap.String("snapshot", name))
	return nil
}

// removeSnapshot moves a snapshot's tree into the trash and removes its record. It may be repeated after a crash.
func (p *Pool) removeSnapshot(r meta.Snapshot) error {
	err := p.trash.take(p.snapshotsDir, r.Name, r.Wipe)
	p.step("snapshot remove: moved")
	if err == nil {
		err = p.store.DeleteSnapshot(r.Name)
	}
	p.trash.wake()
	return err
}

func (p *Pool) findSnap(name string) (*snap, error) {
	if err := checkSnapshotName(name); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	s := p.snaps[name]
	if s == nil {
		return nil, fmt.Errorf("snapshot %s: %w", name, ErrSnapshotNotFound)
	}
	return s, nil
}

// Snapshot describes a snapshot. ErrSnapshotNotFound when there is none of that name, or it is not ready yet.
func (p *Pool) Snapshot(_ context.Context, name string) (Snapshot, error) {
	s, err := p.findSnap(name)
	if err != nil {
		return Snapshot{}, err
	}
	return s.describe(), nil
}

// Snapshots describes every snapshot that is ready, by name.
func (p *Pool) Snapshots(context.Context) ([]Snapshot, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Snapshot, 0, len(p.snaps))
	for _, s := range p.snaps {
		list = append(list, s.describe())
	}
	slices.SortFunc(list, func(a, b Snapshot) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// recoverSnapshots reads the records of snapshots, and finishes what a crash has cut in two.
func (p *Pool) recoverSnapshots(records []meta.Snapshot) error {
	for _, r := range records {
		var err error
		switch r.State {
		case meta.StateReady:
			if err = CheckName(r.Name); err != nil {
				err = fmt.Errorf("%w: %w", meta.ErrCorrupt, err)
			}
			p.snaps[r.Name] = &snap{record: r}
		case meta.StateCreating, meta.StateDeleting:
			p.log.Info("finishing what was cut short", zap.String("snapshot", r.Name), zap.String("state", string(r.State)))
			err = p.removeSnapshot(r)
		default:
			err = fmt.Errorf("%w: state %q", meta.ErrCorrupt, r.State)
		}
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", r.Name, err)
		}
	}
	return p.sweepStages()
}

// sweepStages removes what was copied ahead when a crash came.
func (p *Pool) sweepStages() error {
	names, err := namesIn(p.snapshotsDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if staged, ok := strings.CutPrefix(name, stagePrefix); ok {
			err = errors.Join(err, p.trash.take(p.snapshotsDir, name, wipes(staged)))
		}
	}
	return err
}

// namesIn lists an open directory.
func namesIn(parent *os.File) ([]string, error) {
	dir, err := openDirAt(parent, ".")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(0)
}
