package control

import (
	"context"
	"net/http"

	"github.com/croftfs/croft/fs/pool"
)

// Copies is what a Pool does with snapshots, clones and block devices.
type Copies interface {
	CreateSnapshot(ctx context.Context, name string, o pool.SnapshotOptions) (pool.Snapshot, error)
	DeleteSnapshot(ctx context.Context, name string) error
	Snapshot(ctx context.Context, name string) (pool.Snapshot, error)
	Snapshots(ctx context.Context) ([]pool.Snapshot, error)
	Clone(ctx context.Context, name string, o pool.CloneOptions) (pool.Volume, error)
	Attach(ctx context.Context, name string, o pool.AttachOptions) (pool.Attachment, error)
	Detach(ctx context.Context, name string) error
	Capacity(ctx context.Context) (pool.Capacity, error)
	Operations(ctx context.Context) ([]pool.Operation, error)
}

// routeCopies adds the routes of Copies.
func (s *Server) routeCopies(route func(pattern string, serve func(r *http.Request) (any, error))) {
	route("GET /v1/capacity", func(r *http.Request) (any, error) { return s.pool.Capacity(r.Context()) })
	route("GET /v1/operations", func(r *http.Request) (any, error) { return s.pool.Operations(r.Context()) })
	route("GET /v1/snapshots", func(r *http.Request) (any, error) { return s.pool.Snapshots(r.Context()) })
	route("GET /v1/snapshots/{name}", func(r *http.Request) (any, error) {
		return s.pool.Snapshot(r.Context(), r.PathValue("name"))
	})
	route("POST /v1/snapshots/{name}", withBody(func(r *http.Request, o pool.SnapshotOptions) (any, error) {
		return s.pool.CreateSnapshot(r.Context(), r.PathValue("name"), o)
	}))
	route("DELETE /v1/snapshots/{name}", func(r *http.Request) (any, error) {
		return struct{}{}, s.pool.DeleteSnapshot(r.Context(), r.PathValue("name"))
	})
	route("POST /v1/volumes/{name}/clone", withBody(func(r *http.Request, o pool.CloneOptions) (any, error) {
		return s.pool.Clone(r.Context(), r.PathValue("name"), o)
	}))
	route("POST /v1/volumes/{name}/device", withBody(func(r *http.Request, o pool.AttachOptions) (any, error) {
		return s.pool.Attach(r.Context(), r.PathValue("name"), o)
	}))
	route("DELETE /v1/volumes/{name}/device", func(r *http.Request) (any, error) {
		return struct{}{}, s.pool.Detach(r.Context(), r.PathValue("name"))
	})
}
