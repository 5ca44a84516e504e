package app

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"github.com/croftfs/croft/fs/pool/control"
)

const (
	// metricsRetry is after how long an address that cannot be had is tried again.
	metricsRetry = 5 * time.Second
	// metricsTimeout bounds how long somebody may take to ask, and a connection may be idle.
	metricsTimeout = time.Minute
	// metricsAtOnce is how many may ask for metrics at the same time.
	metricsAtOnce = 4
)

// checkMetricsAddress refuses what is no address to listen on.
func checkMetricsAddress(address string) error {
	if address == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		var n uint64
		if n, err = strconv.ParseUint(port, 10, 16); err == nil && n == 0 {
			err = errors.New("port 0")
		}
	}
	if err != nil {
		return usage("--metrics-address %q: %w: it is a host, or none for all, and a port: :9808, 127.0.0.1:9808, [::1]:9808", address, err)
	}
	return nil
}

// serveMetrics answers Prometheus, and whoever asks for health, until stop is called. That the address cannot be had
// keeps no pool from being served: it is tried again.
func (d *server) serveMetrics(address string) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	log := d.log.With(zap.String("address", address))
	s := &http.Server{Handler: d.metricsHandler(ctx), ReadTimeout: metricsTimeout, IdleTimeout: metricsTimeout, MaxHeaderBytes: 16 << 10}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for said := false; ; {
			l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
			if err == nil {
				log.Info("serving metrics")
				err = s.Serve(l)
			}
			switch {
			case ctx.Err() != nil:
				return
			case !said:
				log.Error("metrics are not served: trying again", zap.Error(err))
				said = true
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(metricsRetry):
			}
		}
	}()
	return func() {
		cancel()
		// Nobody depends on an answer: the next daemon gives one.
		_ = s.Close()
		<-ended
	}
}

// metricsHandler answers GET /metrics, of all pools, and GET /healthz: 200 when their mounts answer, else 503.
func (d *server) metricsHandler(ctx context.Context) http.Handler {
	all := prometheus.Gatherers{control.ProcessMetrics(), d.metrics}
	var mountpoints []string
	for _, s := range d.seats {
		all = append(all, s.control.Metrics())
		mountpoints = append(mountpoints, s.mountpoint)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(all, promhttp.HandlerOpts{MaxRequestsInFlight: metricsAtOnce}))
	// A question is a process: who asks while one is under way gets its answer.
	var asking singleflight.Group
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, err, _ := asking.Do("", func() (any, error) { return nil, alive(ctx, mountpoints) })
		if err != nil {
			http.Error(w, "the mounts do not answer: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n")) // who has gone meanwhile does not want it
	})
	return mux
}
