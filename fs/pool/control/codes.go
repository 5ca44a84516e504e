package control

import (
	"context"
	"errors"
	"net/http"

	"github.com/croftfs/croft/fs/pool"
)

var (
	// ErrNoServer is returned by a Client when nobody listens on its socket. Nothing was asked then.
	ErrNoServer = errors.New("no daemon listens on the control socket")
	// ErrRequest is returned when the server does not understand a request: client and server differ in version.
	ErrRequest = errors.New("request not understood")
	// ErrForbidden is returned when the caller is not root.
	ErrForbidden = errors.New("only root may manage a pool")
)

const codeInternal = "internal"

// codes is the table by which errors cross, in both directions. The first entry
// that errors.Is finds is taken; what is not in it is codeInternal.
var codes = []struct {
	code   string
	err    error
	status int
}{
	{"not_found", pool.ErrNotFound, http.StatusNotFound},
	{"exists_same", pool.ErrExistsSame, http.StatusConflict}, // before what it wraps
	{"exists", pool.ErrExists, http.StatusConflict},
	{"snapshot_not_found", pool.ErrSnapshotNotFound, http.StatusNotFound},
	{"snapshot_exists_same", pool.ErrSnapshotExistsSame, http.StatusConflict},
	{"snapshot_exists", pool.ErrSnapshotExists, http.StatusConflict},
	{"kind", pool.ErrKind, http.StatusConflict},
	{"busy", pool.ErrBusy, http.StatusConflict},
	{"below_use", pool.ErrBelowUse, http.StatusConflict},
	{"invalid", pool.ErrInvalid, http.StatusBadRequest},
	{"no_room", pool.ErrNoRoom, http.StatusInsufficientStorage},
	{"missing", pool.ErrMissing, http.StatusConflict},
	{"closed", pool.ErrClosed, http.StatusServiceUnavailable},
	{"not_pool", pool.ErrNotPool, http.StatusConflict},
	{"is_pool", pool.ErrIsPool, http.StatusConflict},
	{"not_empty", pool.ErrNotEmpty, http.StatusConflict},
	{"unsuitable", pool.ErrUnsuitable, http.StatusConflict},
	{"newer_format", pool.ErrNewerFormat, http.StatusConflict},
	{"in_use", pool.ErrInUse, http.StatusConflict},
	{"bad_request", ErrRequest, http.StatusBadRequest},
	{"forbidden", ErrForbidden, http.StatusForbidden},
	{"canceled", context.Canceled, http.StatusServiceUnavailable},
	{"deadline", context.DeadlineExceeded, http.StatusGatewayTimeout},
}

// failure is an error on the wire.
type failure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// encode returns what crosses for err, and the HTTP status.
func encode(err error) (failure, int) {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return failure{Code: c.code, Message: err.Error()}, c.status
		}
	}
	return failure{Code: codeInternal, Message: err.Error()}, http.StatusInternalServerError
}

// decode is the reverse of encode.
func decode(f failure) error {
	e := &remoteError{message: f.Message}
	for _, c := range codes {
		if c.code == f.Code {
			e.sentinel = c.err
		}
	}
	return e
}

// remoteError is an error that happened in the daemon.
type remoteError struct {
	message  string
	sentinel error // nil when the code is unknown
}

func (e *remoteError) Error() string { return e.message }

func (e *remoteError) Unwrap() error { return e.sentinel }
