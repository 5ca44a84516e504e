package csi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"

	"github.com/croftfs/croft/fs/pool"
)

var nodeCapabilities = []csipb.NodeServiceCapability_RPC_Type{
	csipb.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csipb.NodeServiceCapability_RPC_EXPAND_VOLUME,
	csipb.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csipb.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
	csipb.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	csipb.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
}

func nodeCapability(t csipb.NodeServiceCapability_RPC_Type) *csipb.NodeServiceCapability {
	return &csipb.NodeServiceCapability{Type: &csipb.NodeServiceCapability_Rpc{Rpc: &csipb.NodeServiceCapability_RPC{Type: t}}}
}

// NodeGetCapabilities has no STAGE_UNSTAGE_VOLUME: a volume needs nothing done before it is published.
func (d *Driver) NodeGetCapabilities(context.Context, *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	r := &csipb.NodeGetCapabilitiesResponse{}
	for _, t := range nodeCapabilities {
		r.Capabilities = append(r.Capabilities, nodeCapability(t))
	}
	return r, nil
}

// NodeGetInfo tells the node's id and topology.
func (d *Driver) NodeGetInfo(context.Context, *csipb.NodeGetInfoRequest) (*csipb.NodeGetInfoResponse, error) {
	return &csipb.NodeGetInfoResponse{NodeId: d.NodeID, MaxVolumesPerNode: d.MaxVolumes, AccessibleTopology: d.topology()[0]}, nil
}

// NodePublishVolume mounts a volume on the target path, which it makes. An ephemeral inline volume is created first.
func (d *Driver) NodePublishVolume(ctx context.Context, r *csipb.NodePublishVolumeRequest) (*csipb.NodePublishVolumeResponse, error) {
	target, err := d.checkTarget(r.GetVolumeId(), r.GetTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := parseAccess(r.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	lock, err := d.lockTarget(r.GetVolumeId(), target)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	find := d.volume
	if r.GetVolumeContext()[kubernetesEphemeral] == "true" {
		find = func(ctx context.Context, _ string) (Pool, pool.Volume, error) { return d.makeEphemeral(ctx, r, a.kind) }
	}
	p, v, err := find(ctx, r.GetVolumeId())
	switch {
	case err != nil:
		return nil, err
	case v.Kind != a.kind:
		return nil, fmt.Errorf("volume %s: %w: it is a %s volume", v.Name, pool.ErrKind, v.Kind)
	}
	err = p.Publish(ctx, v.Name, pool.PublishOptions{
		Target: target, ReadOnly: r.GetReadonly() || a.readOnly(), Flags: a.flags, Exclusive: a.exclusive(), Group: a.group,
	})
	if err != nil {
		return nil, err
	}
	return &csipb.NodePublishVolumeResponse{}, nil
}

// checkTarget refuses what is no target path.
func (d *Driver) checkTarget(id, target string) (string, error) {
	switch {
	case id == "":
		return "", fmt.Errorf("%w: no volume_id is given", ErrArgument)
	case target == "":
		return "", fmt.Errorf("%w: no target_path is given", ErrArgument)
	case !filepath.IsAbs(target):
		return "", fmt.Errorf("%w: target_path %q is not absolute", ErrArgument, target)
	}
	target = filepath.Clean(target)
	if len(d.TargetRoots) > 0 {
		if err := d.checkRoots(target); err != nil {
			return "", err
		}
	}
	return target, nil
}

// checkRoots refuses a target that is not below one of TargetRoots, or is led elsewhere by a symlink.
func (d *Driver) checkRoots(target string) error {
	at, resolved := target, false
	below := func(root string) bool {
		root = filepath.Clean(root)
		if resolved {
			if real, err := filepath.EvalSymlinks(root); err == nil {
				root = real
			}
		}
		return strings.HasPrefix(at, strings.TrimSuffix(root, "/")+"/")
	}
	if slices.ContainsFunc(d.TargetRoots, below) {
		var err error
		if at, err = pool.ResolveTarget(target); err != nil {
			return err
		}
		resolved = true
		if slices.ContainsFunc(d.TargetRoots, below) {
			return nil
		}
	}
	return fmt.Errorf("%w: target_path %s is not below %s", ErrArgument, at, strings.Join(d.TargetRoots, " or "))
}

// lockTarget is for the calls that publish a volume there, or take it away.
func (d *Driver) lockTarget(id, target string) (*hold, error) {
	return d.locks.take("volume " + id + " on " + target)
}

// makeEphemeral returns the inline volume of a pod, which it creates when it is not there.
func (d *Driver) makeEphemeral(ctx context.Context, r *csipb.NodePublishVolumeRequest, kind pool.Kind) (Pool, pool.Volume, error) {
	id, none := r.GetVolumeId(), pool.Volume{}
	var params parameters
	attributes := maps.Clone(r.GetVolumeContext())
	err := params.parse(attributes, ParameterSize, ParameterPool, ParameterInodes, ParameterWipe, ParameterUID, ParameterGID, ParameterMode)
	switch {
	case err != nil:
		return nil, none, err
	case params.size == 0:
		return nil, none, fmt.Errorf("%w: an inline volume needs the attribute %s, such as %s: 1Gi", ErrArgument, ParameterSize, ParameterSize)
	case kind != pool.KindFilesystem:
		return nil, none, fmt.Errorf("%w: an inline volume is a filesystem", ErrArgument)
	}
	if p, v, err := d.ephemeral(ctx, id); !errors.Is(err, pool.ErrNotFound) {
		return p, v, err
	}
	if _, _, err := d.findVolume(ctx, ephemeralName(id)); err == nil {
		return nil, none, fmt.Errorf("volume %s %w: it is no inline volume", id, ErrDiffers)
	}
	p, _, err := d.roomiest(ctx, params.pool)
	if err != nil {
		return nil, none, err
	}
	v, err := p.Create(ctx, ephemeralName(id), pool.CreateOptions{
		Bytes: params.size, Inodes: params.inodes, Mode: params.mode, UID: params.uid, GID: params.gid, Wipe: params.wipe,
		Labels: map[string]string{LabelName: id, LabelEphemeral: r.GetTargetPath()},
	})
	return p, v, err
}

// NodeUnpublishVolume takes a mount and its target path away, and deletes an ephemeral inline volume. What is not
// there is no error.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, r *csipb.NodeUnpublishVolumeRequest) (*csipb.NodeUnpublishVolumeResponse, error) {
	id := r.GetVolumeId()
	target, err := d.checkTarget(id, r.GetTargetPath())
	if err != nil {
		return nil, err
	}
	lock, err := d.lockTarget(id, target)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	p, v, err := d.ephemeral(ctx, id)
	ephemeral := err == nil
	name := v.Name
	if errors.Is(err, pool.ErrNotFound) {
		p, name, err = d.locate(id, pool.ErrNotFound)
	}
	switch {
	case errors.Is(err, pool.ErrNotFound), errors.Is(err, ErrElsewhere):
		// Nothing of ours can be there. The target path is the CO's own.
		return &csipb.NodeUnpublishVolumeResponse{}, nil
	case err == nil:
		err = p.Unpublish(ctx, name, target)
	}
	if err == nil && ephemeral {
		err = d.deleteEphemeral(ctx, p, name)
	}
	if err != nil {
		return nil, err
	}
	return &csipb.NodeUnpublishVolumeResponse{}, nil
}

// deleteEphemeral deletes an inline volume that is published nowhere any more.
func (d *Driver) deleteEphemeral(ctx context.Context, p Pool, name string) error {
	if at, err := p.Publications(ctx, name); err != nil || len(at) > 0 {
		return err
	}
	if err := p.Delete(ctx, name, pool.DeleteOptions{}); !errors.Is(err, pool.ErrNotFound) {
		return err
	}
	return nil
}

// Sweep deletes the ephemeral inline volumes whose pods are gone: kubelet has removed the directory of the target, and
// will not call for it again. A target that is only not mounted, as after a start of the machine, is waited for.
func (d *Driver) Sweep(ctx context.Context) error {
	all, err := d.all(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range all {
		target := l.volume.Labels[LabelEphemeral]
		if target == "" {
			continue
		}
		if _, err := os.Lstat(filepath.Dir(target)); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		d.Logger.Info("the pod of an inline volume is gone", zap.String("volume", l.volume.Name), zap.String("target", target))
		_, err := d.NodeUnpublishVolume(ctx, &csipb.NodeUnpublishVolumeRequest{VolumeId: l.volume.Labels[LabelName], TargetPath: target})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// publishedOn returns ErrNotThere, wrapped, unless a volume is published on a path.
func publishedOn(ctx context.Context, p Pool, v pool.Volume, path string) error {
	at, err := p.Publications(ctx, v.Name)
	if err != nil {
		return err
	}
	path = filepath.Clean(path)
	resolved, err := pool.ResolveTarget(path)
	if err != nil {
		resolved = path
	}
	there := func(at pool.Publication) bool { return at.Target == path || at.Target == resolved }
	if !slices.ContainsFunc(at, there) {
		return fmt.Errorf("volume %s: %w: %s", v.Name, ErrNotThere, path)
	}
	return nil
}

// NodeGetVolumeStats tells the use and the limits of a volume that is published on a path. A recount under way gives the last that was known.
func (d *Driver) NodeGetVolumeStats(ctx context.Context, r *csipb.NodeGetVolumeStatsRequest) (*csipb.NodeGetVolumeStatsResponse, error) {
	if r.GetVolumePath() == "" {
		return nil, fmt.Errorf("%w: no volume_path is given", ErrArgument)
	}
	p, v, err := d.volume(ctx, r.GetVolumeId())
	if err == nil {
		err = publishedOn(ctx, p, v, r.GetVolumePath())
	}
	if err != nil {
		return nil, err
	}
	bytes := usage(csipb.VolumeUsage_BYTES, v.Limit.Bytes, v.Used.Bytes)
	if v.Kind == pool.KindBlock {
		return &csipb.NodeGetVolumeStatsResponse{Usage: []*csipb.VolumeUsage{{Unit: csipb.VolumeUsage_BYTES, Total: bytes.Total}}}, nil
	}
	return &csipb.NodeGetVolumeStatsResponse{Usage: []*csipb.VolumeUsage{
		bytes, usage(csipb.VolumeUsage_INODES, v.Limit.Inodes, v.Used.Inodes),
	}}, nil
}

func usage(unit csipb.VolumeUsage_Unit, limit, used uint64) *csipb.VolumeUsage {
	return &csipb.VolumeUsage{Unit: unit, Total: int64(limit), Used: int64(used), Available: int64(limit - min(used, limit))}
}

// NodeExpandVolume raises the limit of a volume at once, while it is in use. A size that it has, or more, is no error: it
// never shrinks. OUT_OF_RANGE when the limit is below what it has.
func (d *Driver) NodeExpandVolume(ctx context.Context, r *csipb.NodeExpandVolumeRequest) (*csipb.NodeExpandVolumeResponse, error) {
	if r.GetVolumePath() == "" {
		return nil, fmt.Errorf("%w: no volume_path is given", ErrArgument)
	}
	want, err := parseSizes(r.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	p, v, err := d.volume(ctx, r.GetVolumeId())
	if err == nil {
		err = publishedOn(ctx, p, v, r.GetVolumePath())
	}
	if err != nil {
		return nil, err
	}
	lock, err := d.lockVolume(v.Name)
	if err != nil {
		return nil, err
	}
	defer lock.release()
	switch {
	case v.Limit.Bytes >= want.least && want.most > 0 && v.Limit.Bytes > want.most:
		return nil, fmt.Errorf("volume %s: %w: it has %d bytes, and cannot shrink to %d", v.Name, ErrRange, v.Limit.Bytes, want.most)
	case v.Limit.Bytes < want.least || v.Kind == pool.KindBlock: // a device may have been left behind by a crash
		bytes, err := want.choose(v.Limit.Bytes)
		if err != nil {
			return nil, err
		}
		if v, err = p.Resize(ctx, v.Name, pool.ResizeOptions{Bytes: max(bytes, v.Limit.Bytes)}); err != nil {
			return nil, err
		}
	}
	return &csipb.NodeExpandVolumeResponse{CapacityBytes: int64(v.Limit.Bytes)}, nil
}
