package csi

import (
	"context"
	"fmt"
	"slices"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/croftfs/croft/fs/pool"
)

// conditions are the states of a volume that say that something is wrong with it.
var conditions = map[pool.State]struct {
	status  csipb.VolumeHealthErrorType
	reason  string
	message string
}{
	pool.StateMissing:   {csipb.VolumeHealthErrorType_DATA_LOSS, "DirectoryMissing", "its directory is gone from the pool"},
	pool.StateFailed:    {csipb.VolumeHealthErrorType_INACCESSIBLE, "RecountFailed", "it could not be recounted after a crash: changes are refused"},
	pool.StateOverLimit: {csipb.VolumeHealthErrorType_DEGRADED, "OverLimit", "it holds more than its limit: something was put into it behind Croft's back"},
}

// health describes the condition of a volume.
func health(id string, v pool.Volume) *csipb.VolumeHealth {
	h := &csipb.VolumeHealth{VolumeId: id}
	if c, bad := conditions[v.State]; bad {
		h.HealthStatuses = append(h.HealthStatuses, &csipb.VolumeHealth_VolumeHealthEntry{Status: c.status, Reason: c.reason, Message: c.message})
	}
	return h
}

// ControllerGetVolumeHealth describes the condition of a volume.
func (d *Driver) ControllerGetVolumeHealth(ctx context.Context, r *csipb.ControllerGetVolumeHealthRequest) (*csipb.ControllerGetVolumeHealthResponse, error) {
	_, v, err := d.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csipb.ControllerGetVolumeHealthResponse{VolumeHealth: health(r.GetVolumeId(), v)}, nil
}

// ControllerListVolumeHealth lists the volumes that something is wrong with.
func (d *Driver) ControllerListVolumeHealth(ctx context.Context, r *csipb.ControllerListVolumeHealthRequest) (*csipb.ControllerListVolumeHealthResponse, error) {
	all, err := d.all(ctx)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(l listed) bool { _, bad := conditions[l.volume.State]; return !bad })
	part, next, err := page(all, listed.key, r.GetStartingToken(), r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	answer := &csipb.ControllerListVolumeHealthResponse{NextToken: next}
	for _, l := range part {
		answer.Entries = append(answer.Entries, health(d.idOfVolume(l.pool, l.volume), l.volume))
	}
	return answer, nil
}

// NodeGetVolumeHealth describes the condition of a volume, and of its mount on a path where one is given.
func (d *Driver) NodeGetVolumeHealth(ctx context.Context, r *csipb.NodeGetVolumeHealthRequest) (*csipb.NodeGetVolumeHealthResponse, error) {
	p, v, err := d.volume(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	h := health(r.GetVolumeId(), v)
	inaccessible := func(reason, message string) {
		h.HealthStatuses = append(h.HealthStatuses, &csipb.VolumeHealth_VolumeHealthEntry{
			Status: csipb.VolumeHealthErrorType_INACCESSIBLE, Reason: reason, Message: message})
	}
	if path := r.GetVolumePublishPath(); path != "" {
		if err := publishedOn(ctx, p, v, path); err != nil {
			inaccessible("NotMounted", err.Error())
		}
	}
	if err := d.Alive(ctx); err != nil {
		inaccessible("MountHangs", fmt.Sprintf("the mounts do not answer: %s", err))
	}
	return &csipb.NodeGetVolumeHealthResponse{VolumeHealth: h}, nil
}

// NodeGetStorageHealth tells whether the mounts of this node's pools answer.
func (d *Driver) NodeGetStorageHealth(ctx context.Context, _ *csipb.NodeGetStorageHealthRequest) (*csipb.NodeGetStorageHealthResponse, error) {
	r := &csipb.NodeGetStorageHealthResponse{}
	if err := d.Alive(ctx); err != nil {
		r.BackendHealth = append(r.BackendHealth, &csipb.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: csipb.StorageHealthErrorType_STORAGE_UNREACHABLE, Reason: "MountHangs", Message: err.Error()})
	}
	return r, nil
}
