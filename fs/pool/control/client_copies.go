package control

import (
	"context"
	"net/http"

	"github.com/croftfs/croft/fs/pool"
)

// CreateSnapshot makes a snapshot of a volume.
func (c *Client) CreateSnapshot(ctx context.Context, name string, o pool.SnapshotOptions) (pool.Snapshot, error) {
	var s pool.Snapshot
	return s, c.callSnapshot(ctx, http.MethodPost, name, o, &s)
}

// DeleteSnapshot deletes a snapshot.
func (c *Client) DeleteSnapshot(ctx context.Context, name string) error {
	return c.callSnapshot(ctx, http.MethodDelete, name, nil, nil)
}

// Snapshot returns one snapshot.
func (c *Client) Snapshot(ctx context.Context, name string) (pool.Snapshot, error) {
	var s pool.Snapshot
	return s, c.callSnapshot(ctx, http.MethodGet, name, nil, &s)
}

// Snapshots lists the snapshots by name.
func (c *Client) Snapshots(ctx context.Context) ([]pool.Snapshot, error) {
	var list []pool.Snapshot
	return list, c.call(ctx, http.MethodGet, "/v1/snapshots", nil, &list)
}

// Clone makes a volume from a snapshot or from another volume.
func (c *Client) Clone(ctx context.Context, name string, o pool.CloneOptions) (pool.Volume, error) {
	var v pool.Volume
	return v, c.callBelow(ctx, http.MethodPost, name, "/clone", o, &v)
}

// Attach makes a block volume a block device.
func (c *Client) Attach(ctx context.Context, name string, o pool.AttachOptions) (pool.Attachment, error) {
	var a pool.Attachment
	return a, c.callBelow(ctx, http.MethodPost, name, "/device", o, &a)
}

// Detach takes a block volume's device away.
func (c *Client) Detach(ctx context.Context, name string) error {
	return c.callBelow(ctx, http.MethodDelete, name, "/device", nil, nil)
}

// Capacity tells how much the pool's disk has and how much of it is promised.
func (c *Client) Capacity(ctx context.Context) (pool.Capacity, error) {
	var capacity pool.Capacity
	return capacity, c.call(ctx, http.MethodGet, "/v1/capacity", nil, &capacity)
}

// Operations lists what is being copied now.
func (c *Client) Operations(ctx context.Context) ([]pool.Operation, error) {
	var list []pool.Operation
	return list, c.call(ctx, http.MethodGet, "/v1/operations", nil, &list)
}

// callBelow is callVolume for something that a volume has.
func (c *Client) callBelow(ctx context.Context, method, name, below string, in, out any) error {
	path, err := volumePath(name)
	if err != nil {
		return err
	}
	return c.call(ctx, method, path+below, in, out)
}

func (c *Client) callSnapshot(ctx context.Context, method, name string, in, out any) error {
	path, err := namePath("/v1/snapshots/", name)
	if err != nil {
		return err
	}
	return c.call(ctx, method, path, in, out)
}
