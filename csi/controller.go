package csi

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/croftfs/croft/fs/pool"
)

var controllerCapabilities = []csipb.ControllerServiceCapability_RPC_Type{
	csipb.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	csipb.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csipb.ControllerServiceCapability_RPC_GET_VOLUME,
	csipb.ControllerServiceCapability_RPC_GET_CAPACITY,
	csipb.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	csipb.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
	csipb.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	csipb.ControllerServiceCapability_RPC_CLONE_VOLUME,
	csipb.ControllerServiceCapability_RPC_MODIFY_VOLUME,
	csipb.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csipb.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csipb.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
}

// ControllerGetCapabilities has no EXPAND_VOLUME: a volume is expanded on its node, by NodeExpandVolume alone.
func (d *Driver) ControllerGetCapabilities(context.Context, *csipb.ControllerGetCapabilitiesRequest) (*csipb.ControllerGetCapabilitiesResponse, error) {
	r := &csipb.ControllerGetCapabilitiesResponse{}
	for _, t := range controllerCapabilities {
		r.Capabilities = append(r.Capabilities, &csipb.ControllerServiceCapability{Type: &csipb.ControllerServiceCapability_Rpc{
			Rpc: &csipb.ControllerServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

// wish is what CreateVolume is asked for.
type wish struct {
	name   string // the CO's
	own    string // the pool's
	kind   pool.Kind
	sizes  sizes
	params parameters

	source         *csipb.VolumeContentSource
	volume, snap   string // the source's name in pool from; one of them, or none
	from           Pool
	sourceGone     bool // it is not there any more; the next two are empty then
	sourceSnapshot pool.Snapshot
	sourceVolume   pool.Volume
}

// CreateVolume makes a volume, empty or from a snapshot or a volume of this node.
func (d *Driver) CreateVolume(ctx context.Context, r *csipb.CreateVolumeRequest) (*csipb.CreateVolumeResponse, error) {
	w, err := parseWish(r)
	if err != nil {
		return nil, err
	}
	if !d.reaches(r.GetAccessibilityRequirements()) {
		return nil, fmt.Errorf("volume %s: %w: it is to be on another node than %s", w.name, ErrNoPool, d.NodeID)
	}
	lock, err := d.lockVolume(w.own)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	sourceErr := d.findSource(ctx, w)
	p, v, err := d.findVolume(ctx, w.own)
	switch {
	case sourceErr != nil && !(err == nil && w.sourceGone):
		err = sourceErr
	case err == nil:
		err = d.differs(w, p, v)
	case errors.Is(err, pool.ErrNotFound):
		p, v, err = d.make(ctx, w, lock)
	}
	if err != nil {
		return nil, err
	}
	return &csipb.CreateVolumeResponse{Volume: d.describe(p, v, w.source)}, nil
}

func parseWish(r *csipb.CreateVolumeRequest) (*wish, error) {
	w := &wish{name: r.GetName(), own: ownName(r.GetName()), source: r.GetVolumeContentSource()}
	if w.name == "" {
		return nil, fmt.Errorf("%w: no name is given", ErrArgument)
	}
	var err error
	if w.kind, err = parseAccesses(r.GetVolumeCapabilities()); err != nil {
		return nil, err
	}
	if w.sizes, err = parseSizes(r.GetCapacityRange()); err != nil {
		return nil, err
	}
	if err := w.params.parse(r.GetParameters(), ParameterPool, ParameterInodes, ParameterWipe, ParameterUID, ParameterGID, ParameterMode); err != nil {
		return nil, err
	}
	// What is mutable comes after: it may say otherwise (CSI spec, CreateVolumeRequest).
	if err := w.params.parse(r.GetMutableParameters(), ParameterInodes); err != nil {
		return nil, err
	}
	p := w.params
	switch {
	case w.kind == pool.KindBlock && (p.inodes != 0 || p.uid != 0 || p.gid != 0 || p.mode != 0):
		err = fmt.Errorf("%w: a block volume has no inodes, owner or mode", ErrArgument)
	case w.source != nil && (p.uid != 0 || p.gid != 0 || p.mode != 0):
		err = fmt.Errorf("%w: a volume that is made from another has its owner and mode: leave out %s, %s and %s", ErrArgument,
			ParameterUID, ParameterGID, ParameterMode)
	}
	return w, err
}

// findSource finds what the volume is to be made from.
func (d *Driver) findSource(ctx context.Context, w *wish) (err error) {
	var id string
	var kind pool.Kind
	switch {
	case w.source == nil:
		return nil
	case w.source.GetSnapshot() != nil:
		id = w.source.GetSnapshot().GetSnapshotId()
		if w.from, w.snap, err = d.locate(id, pool.ErrSnapshotNotFound); err == nil {
			w.sourceSnapshot, err = w.from.Snapshot(ctx, w.snap)
			kind = w.sourceSnapshot.Kind
		}
	case w.source.GetVolume() != nil:
		id = w.source.GetVolume().GetVolumeId()
		if w.from, w.sourceVolume, err = d.volume(ctx, id); err == nil {
			w.volume, kind = w.sourceVolume.Name, w.sourceVolume.Kind
		} else if _, name, ok := splitID(id); ok {
			w.volume = name
		}
	default:
		return fmt.Errorf("%w: volume content source: it is neither a snapshot nor a volume", ErrArgument)
	}
	w.sourceGone = errors.Is(err, pool.ErrNotFound) || errors.Is(err, pool.ErrSnapshotNotFound)
	switch {
	case errors.Is(err, ErrElsewhere):
		return fmt.Errorf("%q: %w", id, ErrSourceElsewhere)
	case err != nil:
		return err
	case kind != w.kind:
		return fmt.Errorf("%w: %q is a %s volume, and the new one is to be %s", ErrArgument, id, kind, w.kind)
	case w.params.pool != "" && d.poolOf(w.params.pool) != w.from:
		return fmt.Errorf("%w: %q is in pool %s: a volume that is made from it cannot be in %s", ErrArgument, id, d.nameOf(w.from), w.params.pool)
	}
	return nil
}

// make makes the volume. The name is free, and locked.
func (d *Driver) make(ctx context.Context, w *wish, lock *hold) (Pool, pool.Volume, error) {
	if w.source != nil {
		return d.clone(ctx, w, lock)
	}
	p, _, err := d.roomiest(ctx, w.params.pool)
	if err != nil {
		return nil, pool.Volume{}, err
	}
	bytes, err := w.sizes.choose(defaultBytes)
	if err != nil {
		return nil, pool.Volume{}, err
	}
	v, err := p.Create(ctx, w.own, pool.CreateOptions{
		Bytes: bytes, Inodes: w.params.inodes, Mode: w.params.mode, UID: w.params.uid, GID: w.params.gid,
		Kind: w.kind, Wipe: w.params.wipe, Labels: map[string]string{LabelName: w.name},
	})
	return p, v, err
}

func (d *Driver) clone(ctx context.Context, w *wish, lock *hold) (Pool, pool.Volume, error) {
	usual := w.sourceVolume.Limit.Bytes
	if w.snap != "" {
		usual = w.sourceSnapshot.Limit.Bytes
	}
	bytes, err := w.sizes.choose(usual)
	if err != nil {
		return nil, pool.Volume{}, err
	}
	o := pool.CloneOptions{Volume: w.volume, Snapshot: w.snap, Bytes: bytes, Inodes: w.params.inodes, Wipe: w.params.wipe,
		Labels: map[string]string{LabelName: w.name}}
	err = d.copies.do(ctx, lock, func(ctx context.Context) error {
		_, err := w.from.Clone(ctx, w.own, o)
		return err
	})
	if err != nil {
		return nil, pool.Volume{}, err
	}
	v, err := w.from.Volume(ctx, w.own)
	return w.from, v, err
}

// differs returns ErrDiffers when a volume is not what is wished for.
func (d *Driver) differs(w *wish, p Pool, v pool.Volume) error {
	var how string
	switch {
	case v.Labels[LabelName] != w.name:
		how = "it was not made by CSI under that name"
	case v.Kind != w.kind:
		how = fmt.Sprintf("it is a %s volume", v.Kind)
	case !w.sizes.has(v.Limit.Bytes):
		how = fmt.Sprintf("it has %d bytes", v.Limit.Bytes)
	case w.params.pool != "" && d.poolOf(w.params.pool) != p:
		how = "it is in pool " + d.nameOf(p)
	case w.params.inodes != 0 && w.params.inodes != v.Limit.Inodes:
		how = fmt.Sprintf("it has a limit of %d inodes", v.Limit.Inodes)
	case w.params.wipe && !v.Wipe:
		how = "it is not wiped when it is deleted"
	case !w.madeFromSource(v):
		how = "it was made from another source"
	default:
		return nil
	}
	return fmt.Errorf("volume %s %w: %s", w.name, ErrDiffers, how)
}

func (w *wish) madeFromSource(v pool.Volume) bool {
	s := v.Source
	switch {
	case s == nil || w.source == nil:
		return s == nil && w.source == nil
	case s.Snapshot != w.snap || s.Volume != w.volume:
		return false
	case w.snap != "":
		return w.sourceGone || s.Created.Equal(w.sourceSnapshot.Created)
	}
	return w.sourceGone || s.Created.Equal(w.sourceVolume.Created)
}

func (d *Driver) describe(p Pool, v pool.Volume, source *csipb.VolumeContentSource) *csipb.Volume {
	return &csipb.Volume{
		VolumeId:           d.idOfVolume(p, v),
		CapacityBytes:      int64(v.Limit.Bytes),
		ContentSource:      source,
		AccessibleTopology: d.topology(),
	}
}

// DeleteVolume deletes a volume. FAILED_PRECONDITION while it is published or in use, and for one whose pool is not
// here. What does not exist is deleted.
func (d *Driver) DeleteVolume(ctx context.Context, r *csipb.DeleteVolumeRequest) (*csipb.DeleteVolumeResponse, error) {
	p, name, err := d.locate(r.GetVolumeId(), pool.ErrNotFound)
	switch {
	case errors.Is(err, pool.ErrNotFound):
		return &csipb.DeleteVolumeResponse{}, nil
	case errors.Is(err, ErrElsewhere):
		return nil, fmt.Errorf("%w: %w", ErrNotDeleted, err)
	case err != nil:
		return nil, err
	}
	lock, err := d.lockVolume(name)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	if err := p.Delete(ctx, name, pool.DeleteOptions{}); err != nil && !errors.Is(err, pool.ErrNotFound) {
		return nil, err
	}
	return &csipb.DeleteVolumeResponse{}, nil
}

// ValidateVolumeCapabilities confirms what the volume can be used as.
func (d *Driver) ValidateVolumeCapabilities(ctx context.Context, r *csipb.ValidateVolumeCapabilitiesRequest) (*csipb.ValidateVolumeCapabilitiesResponse, error) {
	if len(r.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("%w: no volume capabilities are given", ErrArgument)
	}
	_, v, err := d.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	kind, err := parseAccesses(r.GetVolumeCapabilities())
	if err == nil && kind != v.Kind {
		err = fmt.Errorf("it is a %s volume", v.Kind)
	}
	if err == nil {
		var p parameters
		err = p.parse(r.GetParameters(), ParameterPool, ParameterInodes, ParameterWipe, ParameterUID, ParameterGID, ParameterMode)
	}
	if err == nil {
		var p parameters
		err = p.parse(r.GetMutableParameters(), ParameterInodes)
	}
	if err != nil {
		return &csipb.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csipb.ValidateVolumeCapabilitiesResponse{Confirmed: &csipb.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: r.GetVolumeContext(), VolumeCapabilities: r.GetVolumeCapabilities(),
		Parameters: r.GetParameters(), MutableParameters: r.GetMutableParameters(),
	}}, nil
}

// listed is an entry of a list of volumes.
type listed struct {
	pool   Pool
	volume pool.Volume
}

// key is what lists of volumes are in order by, and their token.
func (l listed) key() string { return idOf(l.pool.Info().ID, l.volume.Name) }

func (d *Driver) all(ctx context.Context) ([]listed, error) {
	var all []listed
	for _, p := range d.Pools {
		volumes, err := p.Pool.Volumes(ctx)
		if err != nil {
			return nil, err
		}
		for _, v := range volumes {
			all = append(all, listed{p.Pool, v})
		}
	}
	slices.SortFunc(all, func(a, b listed) int { return strings.Compare(a.key(), b.key()) })
	return all, nil
}

// ListVolumes lists the volumes of all pools, by id, also those that were not made by CSI.
func (d *Driver) ListVolumes(ctx context.Context, r *csipb.ListVolumesRequest) (*csipb.ListVolumesResponse, error) {
	all, err := d.all(ctx)
	if err != nil {
		return nil, err
	}
	part, next, err := page(all, listed.key, r.GetStartingToken(), r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	answer := &csipb.ListVolumesResponse{NextToken: next}
	for _, l := range part {
		answer.Entries = append(answer.Entries, &csipb.ListVolumesResponse_Entry{
			Volume: d.describe(l.pool, l.volume, nil), Status: &csipb.ListVolumesResponse_VolumeStatus{}})
	}
	return answer, nil
}

// ControllerGetVolume describes a volume.
func (d *Driver) ControllerGetVolume(ctx context.Context, r *csipb.ControllerGetVolumeRequest) (*csipb.ControllerGetVolumeResponse, error) {
	p, v, err := d.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csipb.ControllerGetVolumeResponse{Volume: d.describe(p, v, nil), Status: &csipb.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

// GetCapacity tells how many bytes can still be promised to volumes of this node, in the pool that the parameters
// name or in all of them; the largest volume is that of one pool. It is 0 for another node, and for a pool that is not here.
func (d *Driver) GetCapacity(ctx context.Context, r *csipb.GetCapacityRequest) (*csipb.GetCapacityResponse, error) {
	var params parameters
	if err := params.parse(r.GetParameters(), ParameterPool, ParameterInodes, ParameterWipe, ParameterUID, ParameterGID, ParameterMode); err != nil {
		return nil, err
	}
	if len(r.GetVolumeCapabilities()) > 0 {
		if _, err := parseAccesses(r.GetVolumeCapabilities()); err != nil {
			return nil, err
		}
	}
	var sum, most uint64
	for _, p := range d.Pools {
		if t := r.GetAccessibleTopology(); t != nil && !d.here(t) || params.pool != "" && d.poolOf(params.pool) != p.Pool {
			continue
		}
		room, err := roomIn(ctx, p.Pool)
		if err != nil {
			return nil, err
		}
		sum, most = sum+room, max(most, room)
	}
	return &csipb.GetCapacityResponse{AvailableCapacity: int64(sum), MaximumVolumeSize: wrapperspb.Int64(int64(most)),
		MinimumVolumeSize: wrapperspb.Int64(pool.MinBytes)}, nil
}

// Modify is ControllerModifyVolume for who speaks no gRPC: code and message are those of its status.
func (d *Driver) Modify(ctx context.Context, volume string, parameters map[string]string) (code uint32, message string) {
	defer func() {
		if fault := recover(); fault != nil { // one call's fault is not the end of every mount
			d.Logger.Error("panic", zap.String("method", "Modify"), zap.Any("fault", fault), zap.ByteString("stack", debug.Stack()))
			code, message = uint32(codes.Internal), errFault.Error()
		}
	}()
	_, err := d.ControllerModifyVolume(ctx, &csipb.ControllerModifyVolumeRequest{VolumeId: volume, MutableParameters: parameters})
	s := status.Convert(asStatus(err))
	return uint32(s.Code()), s.Message()
}

// ControllerModifyVolume changes the limit in inodes.
func (d *Driver) ControllerModifyVolume(ctx context.Context, r *csipb.ControllerModifyVolumeRequest) (*csipb.ControllerModifyVolumeResponse, error) {
	p, v, err := d.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	var params parameters
	if err := params.parse(r.GetMutableParameters(), ParameterInodes); err != nil {
		return nil, err
	}
	lock, err := d.lockVolume(v.Name)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	switch {
	case params.inodes == 0:
	case v.Kind == pool.KindBlock:
		return nil, fmt.Errorf("%w: %s: a block volume has no inodes", ErrArgument, ParameterInodes)
	default:
		if _, err := p.Resize(ctx, v.Name, pool.ResizeOptions{Inodes: params.inodes}); err != nil {
			return nil, err
		}
	}
	return &csipb.ControllerModifyVolumeResponse{}, nil
}
