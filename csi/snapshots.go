package csi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/croftfs/croft/fs/pool"
)

// CreateSnapshot makes a snapshot of a volume of this node.
func (d *Driver) CreateSnapshot(ctx context.Context, r *csipb.CreateSnapshotRequest) (*csipb.CreateSnapshotResponse, error) {
	name := r.GetName()
	if name == "" {
		return nil, fmt.Errorf("%w: no name is given", ErrArgument)
	}
	var none parameters
	if err := none.parse(r.GetParameters()); err != nil {
		return nil, err
	}
	own := ownName(name)
	lock, err := d.lockSnapshot(own)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	// One that exists is looked for first: its source may be gone.
	p, s, err := d.findSnapshot(ctx, own)
	if errors.Is(err, pool.ErrSnapshotNotFound) {
		p, s, err = d.makeSnapshot(ctx, r, own, lock)
	}
	if err == nil {
		err = d.snapshotDiffers(r, p, s)
	}
	if err != nil {
		return nil, err
	}
	return &csipb.CreateSnapshotResponse{Snapshot: d.describeSnapshot(p, s)}, nil
}

func (d *Driver) makeSnapshot(ctx context.Context, r *csipb.CreateSnapshotRequest, own string, lock *hold) (Pool, pool.Snapshot, error) {
	p, v, err := d.volume(ctx, r.GetSourceVolumeId())
	switch {
	case err != nil:
		return nil, pool.Snapshot{}, err
	case !d.reaches(r.GetAccessibilityRequirements()):
		return nil, pool.Snapshot{}, fmt.Errorf("snapshot %s: %w: it is to be on another node than %s", r.GetName(), ErrNoPool, d.NodeID)
	}
	o := pool.SnapshotOptions{Volume: v.Name, Labels: map[string]string{LabelName: r.GetName()}}
	err = d.copies.do(ctx, lock, func(ctx context.Context) error {
		_, err := p.CreateSnapshot(ctx, own, o)
		return err
	})
	if err != nil {
		return nil, pool.Snapshot{}, err
	}
	s, err := p.Snapshot(ctx, own)
	return p, s, err
}

// lockSnapshot is for the calls that make or delete a snapshot, by what it is called in its pool.
func (d *Driver) lockSnapshot(own string) (*hold, error) { return d.locks.take("snapshot " + own) }

// snapshotDiffers returns ErrDiffers when a snapshot is not what is asked for.
func (d *Driver) snapshotDiffers(r *csipb.CreateSnapshotRequest, p Pool, s pool.Snapshot) error {
	how := ""
	switch word, source, ok := splitID(r.GetSourceVolumeId()); {
	case r.GetSourceVolumeId() == "":
		return fmt.Errorf("%w: no source_volume_id is given", ErrArgument)
	case s.Labels[LabelName] != r.GetName():
		how = "it was not made by CSI under that name"
	case ok && (d.poolOf(word) != p || s.Volume != source), !ok && s.Volume != ephemeralName(r.GetSourceVolumeId()):
		how = "it is of volume " + idOf(p.Info().ID, s.Volume)
	default:
		return nil
	}
	return fmt.Errorf("snapshot %s %w: %s", r.GetName(), ErrDiffers, how)
}

// findSnapshot finds what has that name in any pool.
func (d *Driver) findSnapshot(ctx context.Context, name string) (Pool, pool.Snapshot, error) {
	for _, p := range d.Pools {
		s, err := p.Pool.Snapshot(ctx, name)
		if !errors.Is(err, pool.ErrSnapshotNotFound) {
			return p.Pool, s, err
		}
	}
	return nil, pool.Snapshot{}, fmt.Errorf("snapshot %s: %w", name, pool.ErrSnapshotNotFound)
}

// describeSnapshot gives the size that a volume made of it needs at least.
func (d *Driver) describeSnapshot(p Pool, s pool.Snapshot) *csipb.Snapshot {
	return &csipb.Snapshot{
		SnapshotId:     idOf(p.Info().ID, s.Name),
		SourceVolumeId: idOf(p.Info().ID, s.Volume),
		SizeBytes:      int64(max(s.Used.Bytes, pool.MinBytes)),
		CreationTime:   timestamppb.New(s.Created),
		ReadyToUse:     true,
	}
}

// DeleteSnapshot deletes a snapshot. FAILED_PRECONDITION while a volume is made of it, and for one whose pool is not
// here. What does not exist is deleted.
func (d *Driver) DeleteSnapshot(ctx context.Context, r *csipb.DeleteSnapshotRequest) (*csipb.DeleteSnapshotResponse, error) {
	p, name, err := d.locate(r.GetSnapshotId(), pool.ErrSnapshotNotFound)
	switch {
	case errors.Is(err, pool.ErrSnapshotNotFound):
		return &csipb.DeleteSnapshotResponse{}, nil
	case errors.Is(err, ErrElsewhere):
		return nil, fmt.Errorf("%w: %w", ErrNotDeleted, err)
	case err != nil:
		return nil, err
	}
	lock, err := d.lockSnapshot(name)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	if err := p.DeleteSnapshot(ctx, name); err != nil && !errors.Is(err, pool.ErrSnapshotNotFound) {
		return nil, err
	}
	return &csipb.DeleteSnapshotResponse{}, nil
}

// GetSnapshot describes a snapshot.
func (d *Driver) GetSnapshot(ctx context.Context, r *csipb.GetSnapshotRequest) (*csipb.GetSnapshotResponse, error) {
	p, name, err := d.locate(r.GetSnapshotId(), pool.ErrSnapshotNotFound)
	if err != nil {
		return nil, err
	}
	s, err := p.Snapshot(ctx, name)
	if err != nil {
		return nil, err
	}
	return &csipb.GetSnapshotResponse{Snapshot: d.describeSnapshot(p, s)}, nil
}

// ListSnapshots lists the snapshots of all pools, or that of an id, or those of a volume, by id.
func (d *Driver) ListSnapshots(ctx context.Context, r *csipb.ListSnapshotsRequest) (*csipb.ListSnapshotsResponse, error) {
	var all []*csipb.Snapshot
	for _, p := range d.Pools {
		snapshots, err := p.Pool.Snapshots(ctx)
		if err != nil {
			return nil, err
		}
		for _, s := range snapshots {
			all = append(all, d.describeSnapshot(p.Pool, s))
		}
	}
	wanted := func(s *csipb.Snapshot) bool {
		return (r.GetSnapshotId() == "" || d.sameID(s.SnapshotId, r.GetSnapshotId())) &&
			(r.GetSourceVolumeId() == "" || d.sameID(s.SourceVolumeId, r.GetSourceVolumeId()))
	}
	all = slices.DeleteFunc(all, func(s *csipb.Snapshot) bool { return !wanted(s) })
	slices.SortFunc(all, func(a, b *csipb.Snapshot) int { return strings.Compare(a.SnapshotId, b.SnapshotId) })
	part, next, err := page(all, (*csipb.Snapshot).GetSnapshotId, r.GetStartingToken(), r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	answer := &csipb.ListSnapshotsResponse{NextToken: next}
	for _, s := range part {
		answer.Entries = append(answer.Entries, &csipb.ListSnapshotsResponse_Entry{Snapshot: s})
	}
	return answer, nil
}

// sameID tells whether an id that somebody gave, perhaps with the pool's name, is ours.
func (d *Driver) sameID(ours, given string) bool {
	word, name, ok := splitID(given)
	if !ok {
		return false
	}
	p := d.poolOf(word)
	return p != nil && ours == idOf(p.Info().ID, name)
}
