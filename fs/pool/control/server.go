package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/croftfs/croft/fs/pool"
)

const (
	// maxBody bounds a request's body in bytes: a check may name many volumes.
	maxBody = 16 << 20
	// headerTimeout is how long a caller may take to say what it wants.
	headerTimeout = 10 * time.Second
)

// Pool is what a Server serves; *pool.Pool is one. Its methods are called concurrently, each on
// the goroutine of its request, and their contexts end when the caller goes away.
type Pool interface {
	Info() pool.Info
	Requests() map[string]uint64
	Gate() pool.GateStats
	Create(ctx context.Context, name string, o pool.CreateOptions) (pool.Volume, error)
	Resize(ctx context.Context, name string, o pool.ResizeOptions) (pool.Volume, error)
	Delete(ctx context.Context, name string, o pool.DeleteOptions) error
	Volume(ctx context.Context, name string) (pool.Volume, error)
	Volumes(ctx context.Context) ([]pool.Volume, error)
	Check(ctx context.Context, o pool.CheckOptions) (pool.CheckResult, error)
	Copies
}

// Options configure a Server.
type Options struct {
	// RunDir is where the socket is made. It is created, 0700, when absent. Default RunDir().
	RunDir string
	// Logger takes what goes wrong, and at debug level each request. Default none.
	Logger *zap.Logger
	// Kept tells whether somebody keeps the mount should the daemon die. Default: nobody does.
	Kept func() bool
	// Metrics are served beside the pool's. Default: none.
	Metrics prometheus.Gatherer

	peerUID func(net.Conn) (uint32, error) // default peerUID
}

// Server serves one pool on its socket until Shutdown.
type Server struct {
	pool   Pool
	log    *zap.Logger
	kept   func() bool
	also   prometheus.Gatherer
	path   string
	http   *http.Server
	ended  chan struct{}
	cancel context.CancelFunc // ends the contexts of all requests
}

// Listen makes the pool's socket and serves it in the background. The caller holds the pool's
// lock: a socket that nobody listens on is taken for stale and replaced.
func Listen(p Pool, o Options) (*Server, error) {
	if o.RunDir == "" {
		o.RunDir = RunDir()
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Kept == nil {
		o.Kept = func() bool { return false }
	}
	if o.Metrics == nil {
		o.Metrics = prometheus.Gatherers{}
	}
	if o.peerUID == nil {
		o.peerUID = peerUID
	}
	if err := prepareRunDir(o.RunDir); err != nil {
		return nil, err
	}
	path := SocketPath(o.RunDir, p.Info().ID)
	l, err := listen(path)
	if err != nil {
		return nil, err
	}
	errorLog, err := zap.NewStdLogAt(o.Logger.Named("http"), zap.WarnLevel)
	if err != nil {
		l.Close()
		return nil, err
	}
	base, cancel := context.WithCancel(context.Background())
	s := &Server{pool: p, log: o.Logger, kept: o.Kept, also: o.Metrics, path: path, ended: make(chan struct{}), cancel: cancel}
	s.http = &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          errorLog,
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, callerError(o.peerUID(conn)))
		},
	}
	go func() {
		defer close(s.ended)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("control socket", zap.String("socket", path), zap.Error(err))
		}
	}()
	return s, nil
}

// Path returns the socket's path.
func (s *Server) Path() string { return s.path }

// Shutdown removes the socket and waits for the requests under way. When ctx
// ends first, their contexts are canceled and their connections closed.
// It may be called more than once.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	s.cancel()
	if err != nil {
		err = errors.Join(fmt.Errorf("control socket %s: %w", s.path, err), s.http.Close())
	}
	<-s.ended
	return err
}

// callerKey is the context key of a connection's callerError.
type callerKey struct{}

func callerError(uid uint32, err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	if uid != 0 {
		return fmt.Errorf("%w: you are user %d", ErrForbidden, uid)
	}
	return nil
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	route := func(pattern string, serve func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			body, err := serve(r)
			s.reply(w, r, body, err)
		})
	}
	route("GET /v1/info", func(*http.Request) (any, error) { return s.pool.Info(), nil })
	route("GET /v1/requests", func(*http.Request) (any, error) { return s.pool.Requests(), nil })
	route("GET /v1/volumes", func(r *http.Request) (any, error) {
		volumes, err := s.pool.Volumes(r.Context())
		if volumes == nil {
			volumes = []pool.Volume{}
		}
		return volumes, err
	})
	route("GET /v1/volumes/{name}", func(r *http.Request) (any, error) {
		return s.pool.Volume(r.Context(), r.PathValue("name"))
	})
	route("POST /v1/volumes/{name}", withBody(func(r *http.Request, o pool.CreateOptions) (any, error) {
		return s.pool.Create(r.Context(), r.PathValue("name"), o)
	}))
	route("PATCH /v1/volumes/{name}", withBody(func(r *http.Request, o pool.ResizeOptions) (any, error) {
		return s.pool.Resize(r.Context(), r.PathValue("name"), o)
	}))
	route("DELETE /v1/volumes/{name}", withBody(func(r *http.Request, o pool.DeleteOptions) (any, error) {
		return struct{}{}, s.pool.Delete(r.Context(), r.PathValue("name"), o)
	}))
	route("POST /v1/check", withBody(func(r *http.Request, o pool.CheckOptions) (any, error) {
		return s.pool.Check(r.Context(), o)
	}))
	s.routeCopies(route)
	mux.Handle("GET "+metricsPath, s.metrics())
	route("/", func(r *http.Request) (any, error) {
		return nil, fmt.Errorf("%w: %s %s is unknown to this daemon", ErrRequest, r.Method, r.URL.EscapedPath())
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err, _ := r.Context().Value(callerKey{}).(error); err != nil {
			s.reply(w, r, nil, err)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		mux.ServeHTTP(w, r)
	})
}

// withBody decodes a request's body, strictly, before serve. An empty body is the zero value.
func withBody[T any](serve func(*http.Request, T) (any, error)) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		var body T
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&body); err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: %w", ErrRequest, err)
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: something follows the JSON value", ErrRequest)
		}
		return serve(r, body)
	}
}

func (s *Server) reply(w http.ResponseWriter, r *http.Request, body any, err error) {
	status := http.StatusOK
	if err != nil {
		body, status = encode(err)
		log := s.log.Debug
		if status == http.StatusInternalServerError {
			log = s.log.Error
		}
		log("request failed", zap.String("method", r.Method), zap.String("path", r.URL.EscapedPath()), zap.Error(err))
	} else {
		s.log.Debug("request", zap.String("method", r.Method), zap.String("path", r.URL.EscapedPath()))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		s.log.Debug("the caller has gone", zap.Error(err))
	}
}
