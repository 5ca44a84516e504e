package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"runtime/debug"
	"strings"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Plugin is what a Server serves: a Driver or a ControllerOnly.
type Plugin interface {
	csipb.IdentityServer
	csipb.ControllerServer
	csipb.NodeServer
}

// Server serves a plugin on a unix socket.
type Server struct {
	socket string
	log    *zap.Logger
	grpc   *grpc.Server
	ended  chan struct{}
	calls  *prometheus.HistogramVec
}

// newCalls makes the metric of calls. The buckets are from what a call without work takes to a sidecar's patience.
func newCalls() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "croft_csi_call_seconds",
		Help:    "How long CSI calls took, by method and by the status code of the answer.",
		Buckets: []float64{0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100},
	}, []string{"method", "code"})
}

// SocketPath returns the path of an endpoint as COs write it: unix:///run/csi.sock, unix:/run/csi.sock or the path itself.
func SocketPath(endpoint string) (string, error) {
	at := strings.TrimPrefix(strings.TrimPrefix(endpoint, "unix://"), "unix:")
	if !path.IsAbs(at) {
		return "", fmt.Errorf("endpoint %q: it is the absolute path of a unix socket, such as unix:///run/croft/csi.sock", endpoint)
	}
	return at, nil
}

// Calls is the metric of all calls.
func (s *Server) Calls() prometheus.Collector { return s.calls }

// Listen serves a plugin on a socket in the background. The socket's directory is made, 0700, when it is absent. A
// socket that nobody listens on is replaced.
func Listen(p Plugin, socket string, log *zap.Logger) (*Server, error) {
	if err := os.MkdirAll(path.Dir(socket), 0o700); err != nil {
		return nil, fmt.Errorf("CSI socket: %w", err)
	}
	l, err := listen(socket)
	if err != nil {
		return nil, fmt.Errorf("CSI socket %s: %w", socket, err)
	}
	s := &Server{socket: socket, log: log, ended: make(chan struct{}), calls: newCalls()}
	s.grpc = grpc.NewServer(grpc.UnaryInterceptor(s.intercept))
	csipb.RegisterIdentityServer(s.grpc, p)
	csipb.RegisterControllerServer(s.grpc, p)
	csipb.RegisterNodeServer(s.grpc, p)
	go func() {
		defer close(s.ended)
		if err := s.grpc.Serve(l); err != nil {
			log.Error("CSI socket", zap.String("socket", socket), zap.Error(err))
		}
	}()
	return s, nil
}

func listen(socket string) (net.Listener, error) {
	l, err := net.Listen("unix", socket)
	if errors.Is(err, unix.EADDRINUSE) {
		conn, dialErr := net.Dial("unix", socket)
		if dialErr == nil {
			conn.Close()
			return nil, fmt.Errorf("another process listens there: %w", err)
		}
		if !errors.Is(dialErr, unix.ECONNREFUSED) {
			return nil, errors.Join(err, dialErr)
		}
		// A file that is no socket refuses connections likewise.
		if fi, err := os.Lstat(socket); err != nil {
			return nil, err
		} else if fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("it is a file, and no socket")
		}
		if err := os.Remove(socket); err != nil {
			return nil, err
		}
		l, err = net.Listen("unix", socket)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Shutdown takes no more calls and waits for those under way; when ctx ends first, theirs ends as well.
func (s *Server) Shutdown(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.grpc.Stop)
	defer stop()
	s.grpc.GracefulStop()
	<-s.ended
}

// intercept makes errors statuses, measures and logs calls: never what is in them, where there may be secrets, but for
// what they are about.
func (s *Server) intercept(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (answer any, err error) {
	method := path.Base(info.FullMethod)
	begun := time.Now()
	defer func() {
		if fault := recover(); fault != nil { // one call's fault is not the end of every mount
			s.log.Error("panic", zap.String("method", method), zap.Any("fault", fault), zap.ByteString("stack", debug.Stack()))
			answer, err = nil, status.Errorf(codes.Internal, "%s: %s", method, errFault)
		}
		took, code := time.Since(begun), status.Code(err)
		s.calls.WithLabelValues(method, code.String()).Observe(took.Seconds())
		log := s.log.Debug
		if code == codes.Internal || code == codes.Unknown {
			log = s.log.Error
		}
		log("call", append(subject(request), zap.String("method", method), zap.Stringer("code", code), zap.Duration("took", took), zap.Error(err))...)
	}()
	answer, err = handle(ctx, request)
	return answer, asStatus(err)
}

// subject is what a request is about.
func subject(request any) []zap.Field {
	var fields []zap.Field
	add := func(key, value string) {
		if value != "" {
			fields = append(fields, zap.String(key, value))
		}
	}
	if r, ok := request.(interface{ GetVolumeId() string }); ok {
		add("volume", r.GetVolumeId())
	}
	if r, ok := request.(interface{ GetName() string }); ok {
		add("name", r.GetName())
	}
	if r, ok := request.(interface{ GetSourceVolumeId() string }); ok {
		add("source_volume", r.GetSourceVolumeId())
	}
	if r, ok := request.(interface{ GetSnapshotId() string }); ok {
		add("snapshot", r.GetSnapshotId())
	}
	if r, ok := request.(interface{ GetTargetPath() string }); ok {
		add("target", r.GetTargetPath())
	}
	return fields
}
