package pool

import (
	"context"
	"errors"
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/copytree"
	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// CloneOptions describe a new volume that is made from another one or from a snapshot.
type CloneOptions struct {
	// Volume or Snapshot names the source: exactly one of them.
	Volume   string `json:"volume,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	// Bytes and Inodes are the limits. Zero Bytes means the source's limit. Zero Inodes means the source's where that was
	// named or Bytes is zero, else one for each BytesPerInode, but not less than the source uses.
	Bytes  uint64 `json:"bytes,omitempty"`
	Inodes uint64 `json:"inodes,omitempty"`
	// Wipe has its data overwritten before its space is freed. It always is when the source's is.
	Wipe bool `json:"wipe,omitempty"`
	// Labels are kept with the volume; at most MaxLabels bytes in all.
	Labels map[string]string `json:"labels,omitempty"`
}

// origin is what a volume is made from.
type origin struct {
	volume *volume // or
	snap   *snap   // which Pool.useSnap has given

	source      meta.Source
	family      string
	block, wipe bool
	limit       quota.Usage
	fixed       bool // meta.Volume.InodesFixed
	used        quota.Usage
}

// Clone makes a volume from a snapshot, or from another volume as CreateSnapshot would show it, and serves it. It is
// durable when Clone returns. Errors as Create and CreateSnapshot, and ErrExistsSame when the volume that exists was made from
// that source; ErrBelowUse with the figures when a limit is below what the source uses.
// When ctx ends before it is ready, there is none.
func (p *Pool) Clone(ctx context.Context, name string, o CloneOptions) (Volume, error) {
	if err := CheckName(name); err != nil {
		return Volume{}, err
	}
	if (o.Volume == "") == (o.Snapshot == "") {
		return Volume{}, fmt.Errorf("volume %s: %w: name a volume or a snapshot to make it from", name, ErrInvalid)
	}
	if err := checkLabels(o.Labels); err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	defer p.names.take(name)()
	from, release, originErr := p.origin(o)
	if originErr == nil {
		defer release()
	}
	if err := p.checkCloned(name, o, from, originErr); err != nil {
		return Volume{}, err
	}
	if err := p.measureOrigin(ctx, from); err != nil {
		return Volume{}, err
	}
	record, err := p.cloneRecord(name, o, from)
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	releasePromise, err := p.promise(record.Limit.Bytes)
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	defer releasePromise()
	op := &operation{Operation: Operation{Kind: OperationClone, Name: name, Source: describeSource(from.source),
		TotalEntries: from.used.Inodes, TotalBytes: from.used.Bytes}}
	ctx, end, err := p.begin(ctx, op)
	if err != nil {
		return Volume{}, err
	}
	defer end()
	v, err := p.create(record, func(r *meta.Volume) (quota.Usage, error) { return p.fillClone(ctx, r, from, op) })
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, asNoRoom(err))
	}
	return p.describe(v), nil
}

// checkCloned refuses a name that is taken, and says whether it is so by what was asked for; then a source that
// cannot be had, for originErr.
func (p *Pool) checkCloned(name string, o CloneOptions, from *origin, originErr error) error {
	v, err := p.find(name)
	if errors.Is(err, ErrNotFound) {
		return originErr
	} else if err != nil {
		return err
	}
	s := v.record.Source
	switch {
	case originErr != nil && !errors.Is(originErr, ErrNotFound) && !errors.Is(originErr, ErrSnapshotNotFound):
		return originErr
	case s != nil && from != nil && sameSource(*s, from.source, false),
		s != nil && from == nil && sameSource(*s, meta.Source{Volume: o.Volume, Snapshot: o.Snapshot}, true):
		return fmt.Errorf("volume %s: %w, %s", name, ErrExistsSame, describeSource(*s))
	}
	return fmt.Errorf("volume %s: %w", name, ErrExists)
}

// origin finds a source. A snapshot cannot be deleted until release is called.
func (p *Pool) origin(o CloneOptions) (from *origin, release func(), err error) {
	if o.Volume != "" {
		v, err := p.find(o.Volume)
		if err != nil {
			return nil, nil, err
		}
		r := p.recordOf(v)
		return &origin{volume: v, source: sourceOf(r), family: familyOf(r), block: r.Block, wipe: r.Wipe, fixed: r.InodesFixed}, func() {}, nil
	}
	s, err := p.findSnap(o.Snapshot)
	if err != nil {
		return nil, nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.snaps[o.Snapshot] != s {
		return nil, nil, fmt.Errorf("snapshot %s: %w", o.Snapshot, ErrSnapshotNotFound)
	}
	s.users++
	r := s.record
	from = &origin{snap: s, source: meta.Source{Snapshot: r.Name, Created: r.Created}, family: r.Family, block: r.Block, wipe: r.Wipe,
		limit: r.Limit, fixed: r.InodesFixed, used: r.Used}
	return from, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		s.users--
	}, nil
}

// measureOrigin finds out what the source uses, and whether the disk has room for that.
func (p *Pool) measureOrigin(ctx context.Context, from *origin) (err error) {
	if from.volume != nil {
		from.limit = from.volume.ledger.Limit()
		from.used, err = p.usedOf(ctx, from.volume)
		return err
	}
	if err := p.needRoomFor(from.used); err != nil {
		return fmt.Errorf("snapshot %s: %w", from.source.Snapshot, err)
	}
	return nil
}

// cloneRecord checks the limits that were asked for and returns the new volume's record.
func (p *Pool) cloneRecord(name string, o CloneOptions, from *origin) (meta.Volume, error) {
	bytes, inodes, fixed := o.Bytes, o.Inodes, o.Inodes != 0
	if bytes == 0 {
		bytes = from.limit.Bytes
	}
	if inodes == 0 && (from.fixed || o.Bytes == 0) {
		inodes, fixed = from.limit.Inodes, from.fixed
	}
	limit, err := p.limitOf(bytes, inodes)
	if err != nil {
		return meta.Volume{}, err
	}
	if inodes == 0 {
		limit.Inodes = max(limit.Inodes, from.used.Inodes)
	}
	if from.block {
		if o.Inodes != 0 {
			return meta.Volume{}, fmt.Errorf("%w: a block volume has no inodes", ErrInvalid)
		}
		limit.Inodes = 1
	}
	// What a live volume uses includes files that have lost their names, and may change: that is seen when it was copied.
	if from.snap != nil || from.block {
		if err := fits(from.used, limit, from.source); err != nil {
			return meta.Volume{}, err
		}
	}
	source := from.source
	return meta.Volume{Name: name, Limit: limit, InodesFixed: fixed, Created: now(), Block: from.block,
		Wipe: o.Wipe || from.wipe, Labels: o.Labels, Source: &source, Family: from.family}, nil
}

// fits returns ErrBelowUse with the figures when limit is below what the source uses.
func fits(used, limit quota.Usage, source meta.Source) error {
	if used.Fits(limit) {
		return nil
	}
	return fmt.Errorf("%w: %s uses %s, and %s were asked for", ErrBelowUse, describeSource(source), used, limit)
}

// fillClone makes what the new volume holds, durably, and says what it uses.
func (p *Pool) fillClone(ctx context.Context, record *meta.Volume, from *origin, op *operation) (used quota.Usage, err error) {
	if record.Block {
		return record.Limit, p.fillBlockClone(ctx, *record, from, op)
	}
	if err := p.makeTrees(*record, CreateOptions{Mode: 0o700}); err != nil {
		return used, err
	}
	to := place{parent: p.volumesDir, name: record.Name, wipe: record.Wipe}
	if from.volume != nil {
		m, err := p.copyLive(ctx, from.volume, to, op)
		if err != nil {
			return used, err
		}
		record.Source.Held = m.held
		p.log.Info("volume copied", zap.String("volume", record.Name), zap.String("source", from.volume.name),
			zap.Duration("writers_held", m.held))
	} else if err := p.copySnap(ctx, from.snap, to, op); err != nil {
		return used, err
	}
	if used, err = p.finish(ctx, to); err != nil {
		return used, err
	}
	return used, fits(used, record.Limit, from.source)
}

// copySnap makes the directory to a copy of a snapshot.
func (p *Pool) copySnap(ctx context.Context, s *snap, to place, op *operation) error {
	src, err := openDirAt(p.snapshotsDir, s.record.Name)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("snapshot %s: %w", s.record.Name, ErrMissing)
	} else if err != nil {
		return err
	}
	defer src.Close()
	dst, err := openDirAt(to.parent, to.name)
	if err != nil {
		return err
	}
	defer dst.Close()
	return copytree.Copy(ctx, src, dst, p.copyOptions(op))
}

func (p *Pool) fillBlockClone(ctx context.Context, record meta.Volume, from *origin, op *operation) (err error) {
	to := place{parent: p.blocksDir, name: record.Name, wipe: record.Wipe}
	if from.volume != nil {
		_, err = p.copyLiveBlock(ctx, from.volume, to, op)
	} else {
		err = p.copyBlock(ctx, p.snapPlace(from.snap.record), to, op)
	}
	if err != nil {
		return err
	}
	return p.growBlock(record.Name, record.Limit.Bytes)
}
