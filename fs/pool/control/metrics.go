package control

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/croftfs/croft/fs/pool"
)

// metricsPath is where Prometheus looks for metrics.
const metricsPath = "/metrics"

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("croft_"+name, help, append([]string{"pool"}, labels...), nil)
}

var (
	tierDesc       = describe("tier", "1 for the tier of the pool's mount.", "tier", "why_not_better")
	requestsDesc   = describe("requests_total", "FUSE requests since the pool was mounted.", "opcode")
	heldDesc       = describe("held_calls", "System calls that are held at this moment.")
	heldTotalDesc  = describe("held_calls_total", "System calls that were held since the pool was mounted.")
	gatedDesc      = describe("gated", "1 while the volume has so little room that all system calls on its written files are held.", "volume")
	gatingsDesc    = describe("gatings_total", "How often the volume has become gated since it is served.", "volume")
	limitDesc      = describe("volume_limit_bytes", "The volume's limit.", "volume")
	usedDesc       = describe("volume_used_bytes", "What is in use of the volume's limit.", "volume")
	limitInodeDesc = describe("volume_limit_inodes", "The volume's limit.", "volume")
	usedInodeDesc  = describe("volume_used_inodes", "What is in use of the volume's limit.", "volume")
	totalDesc      = describe("pool_total_bytes", "The size of the pool's backing filesystem.")
	freeDesc       = describe("pool_free_bytes", "What is free on the pool's backing filesystem.")
	committedDesc  = describe("pool_committed_bytes", "The sum of the limits of all volumes and of what all snapshots use.")
	usableDesc     = describe("pool_usable_bytes", "What the pool can hold: what is free and what its volumes have, without what is kept back.")
	availableDesc  = describe("pool_available_bytes", "What may still be promised to volumes.")
	snapshotDesc   = describe("snapshot_used_bytes", "What the snapshot is charged.", "snapshot")
	openDesc       = describe("volume_open_files", "Open files and directories of the volume.", "volume")
	takeOversDesc  = describe("take_overs_total", "How often a daemon has taken the mount over from the one before it.")
	takeOverDesc   = describe("take_over_seconds", "How long the last of these took, until it served.")
	keeperDesc     = describe("keeper_up", "1 while somebody keeps the mount should the daemon die.")
)

// collector reads the pool when it is asked.
type collector struct {
	pool Pool
	kept func() bool
}

// Describe is part of prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		tierDesc, requestsDesc, heldDesc, heldTotalDesc, gatedDesc, gatingsDesc,
		limitDesc, usedDesc, limitInodeDesc, usedInodeDesc, openDesc,
		takeOversDesc, takeOverDesc, keeperDesc,
		totalDesc, freeDesc, usableDesc, committedDesc, availableDesc, snapshotDesc,
	} {
		ch <- d
	}
}

// Collect is part of prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	info := c.pool.Info()
	send := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, value, append([]string{info.Dir}, labels...)...)
	}
	if info.Tier != "" {
		send(tierDesc, prometheus.GaugeValue, 1, info.Tier, info.WhyNotBetter)
	}
	send(takeOversDesc, prometheus.CounterValue, float64(info.TakeOvers))
	if info.TakeOvers > 0 {
		send(takeOverDesc, prometheus.GaugeValue, info.TakeOver.Seconds())
	}
	send(keeperDesc, prometheus.GaugeValue, map[bool]float64{true: 1}[c.kept()])
	for opcode, n := range c.pool.Requests() {
		send(requestsDesc, prometheus.CounterValue, float64(n), opcode)
	}
	gate := c.pool.Gate()
	send(heldDesc, prometheus.GaugeValue, float64(gate.Held))
	send(heldTotalDesc, prometheus.CounterValue, float64(gate.HeldTotal))
	if capacity, err := c.pool.Capacity(context.Background()); err != nil {
		ch <- prometheus.NewInvalidMetric(totalDesc, err)
	} else {
		send(totalDesc, prometheus.GaugeValue, float64(capacity.Total))
		send(freeDesc, prometheus.GaugeValue, float64(capacity.Free))
		send(usableDesc, prometheus.GaugeValue, float64(capacity.Usable))
		send(availableDesc, prometheus.GaugeValue, float64(capacity.Available))
		send(committedDesc, prometheus.GaugeValue, float64(capacity.Committed))
	}
	snapshots, err := c.pool.Snapshots(context.Background())
	if err != nil {
		ch <- prometheus.NewInvalidMetric(snapshotDesc, err)
	}
	for _, s := range snapshots {
		send(snapshotDesc, prometheus.GaugeValue, float64(s.Used.Bytes), s.Name)
	}
	volumes, err := c.pool.Volumes(context.Background())
	if err != nil {
		ch <- prometheus.NewInvalidMetric(usedDesc, err)
	}
	for _, v := range volumes {
		send(gatedDesc, prometheus.GaugeValue, map[bool]float64{true: 1}[v.Gated], v.Name)
		send(gatingsDesc, prometheus.CounterValue, float64(v.Gatings), v.Name)
		send(limitDesc, prometheus.GaugeValue, float64(v.Limit.Bytes), v.Name)
		send(limitInodeDesc, prometheus.GaugeValue, float64(v.Limit.Inodes), v.Name)
		send(openDesc, prometheus.GaugeValue, float64(v.Open), v.Name)
		if v.State != pool.StateMissing {
			send(usedDesc, prometheus.GaugeValue, float64(v.Used.Bytes), v.Name)
			send(usedInodeDesc, prometheus.GaugeValue, float64(v.Used.Inodes), v.Name)
		}
	}
}

// Metrics are the pool's, without what Options adds.
func (s *Server) Metrics() prometheus.Gatherer {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{s.pool, s.kept})
	return registry
}

// ProcessMetrics are those of this process.
func ProcessMetrics() prometheus.Gatherer {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// metrics answers in the text form of Prometheus: of the pool, of the process, and what Options adds.
func (s *Server) metrics() http.Handler {
	return promhttp.HandlerFor(prometheus.Gatherers{s.Metrics(), ProcessMetrics(), s.also}, promhttp.HandlerOpts{})
}
