package csi

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/croftfs/croft/fs/pool"
)

var (
	// ErrArgument is returned for a request that lacks something, or asks for what cannot be.
	ErrArgument = errors.New("invalid request")
	// ErrRange is returned for a capacity range that cannot be met.
	ErrRange = errors.New("capacity is out of range")
	// ErrElsewhere is returned for a volume or a snapshot of a pool that is not on this node.
	ErrElsewhere = errors.New("its pool is not on this node")
	// ErrSourceElsewhere is returned when what a volume is to be made from is of a pool that is not on this node.
	ErrSourceElsewhere = errors.New("its source is on another node")
	// ErrNotDeleted is returned when a pool would have to be here to delete something of it.
	ErrNotDeleted = errors.New("it is not deleted, and only its own node can do that")
	// ErrDiffers is returned when there is a volume or a snapshot of that name, made in another way.
	ErrDiffers = errors.New("exists already, and differs")
	// ErrPending is returned when another call about the same thing is under way.
	ErrPending = errors.New("another call about it is under way")
	// ErrToken is returned for a token that no list was cut off with.
	ErrToken = errors.New("invalid starting_token")
	// ErrNoPool is returned when this node has no pool of that name.
	ErrNoPool = errors.New("no such pool on this node")
	// ErrNotThere is returned when a volume is not published on a path.
	ErrNotThere = errors.New("volume is not published there")
)

// codesOf is the table by which errors become codes: the first that errors.Is finds. The spec's tables of errors, RPC
// by RPC, are where each comes from.
var codesOf = []struct {
	err  error
	code codes.Code
}{
	{ErrArgument, codes.InvalidArgument},
	{ErrRange, codes.OutOfRange},
	{ErrSourceElsewhere, codes.ResourceExhausted}, // Kubernetes then looks for another node
	{ErrNotDeleted, codes.FailedPrecondition},
	{ErrElsewhere, codes.NotFound},
	{ErrNoPool, codes.ResourceExhausted},
	{ErrDiffers, codes.AlreadyExists},
	{ErrPending, codes.Aborted},
	{ErrToken, codes.Aborted},
	{ErrNotThere, codes.NotFound},

	{pool.ErrNotFound, codes.NotFound},
	{pool.ErrSnapshotNotFound, codes.NotFound},
	{pool.ErrExists, codes.AlreadyExists},
	{pool.ErrSnapshotExists, codes.AlreadyExists},
	{pool.ErrPublished, codes.AlreadyExists},
	{pool.ErrExclusive, codes.FailedPrecondition},
	{pool.ErrBusy, codes.FailedPrecondition},
	{pool.ErrMissing, codes.FailedPrecondition},
	{pool.ErrKind, codes.FailedPrecondition},
	{pool.ErrTarget, codes.InvalidArgument},
	{pool.ErrInvalid, codes.InvalidArgument},
	{pool.ErrBelowUse, codes.OutOfRange},
	{pool.ErrNoRoom, codes.ResourceExhausted},
	{pool.ErrNotMounted, codes.Unavailable},
	{pool.ErrClosed, codes.Unavailable},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// asStatus returns the status that goes out for an error; what is not in the table is Internal.
func asStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err // gRPC's own, such as Unimplemented
	}
	for _, c := range codesOf {
		if errors.Is(err, c.err) {
			return status.Error(c.code, message(err))
		}
	}
	return status.Error(codes.Internal, message(err))
}

// maxMessage is how long a status' message may be, in bytes. It goes out as a header, where a byte may need three, and
// gRPC in C takes 8 KiB of headers.
const maxMessage = 2 << 10

// message is the text of an error, cut off where it is too long: a request's own words may be in it.
func message(err error) string {
	const more = "…"
	m := err.Error()
	if len(m) > maxMessage {
		m = strings.ToValidUTF8(m[:maxMessage-len(more)], "") + more
	}
	return m
}
