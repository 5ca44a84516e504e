package control

import (
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/croftfs/croft/fs/pool"
)

// TestMetricsLint wants names and types as Prometheus has them.
func TestMetricsLint(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(collector{newFake(), func() bool { return true }})
	problems, err := testutil.GatherAndLint(registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

func TestMetrics(t *testing.T) {
	var kept atomic.Bool
	c, s := start(t, newFake(), Options{Kept: kept.Load})
	if got := metric(t, c, `croft_keeper_up{pool="/srv/croft"}`); got != "0" {
		t.Errorf("kept by nobody: %s", got)
	}
	kept.Store(true)
	text, err := c.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`croft_requests_total{opcode="INIT",pool="/srv/croft"} 1`,
		`croft_held_calls{pool="/srv/croft"} 3`,
		`croft_held_calls_total{pool="/srv/croft"} 4`,
		`croft_pool_committed_bytes{pool="/srv/croft"} 3`,
		`croft_snapshot_used_bytes{pool="/srv/croft",snapshot="s"} 9.223372036854776e+18`,
		`croft_volume_limit_inodes{pool="/srv/croft",volume="web-0"} 1000`,
		`croft_volume_used_bytes{pool="/srv/croft",volume="web-0"} 9.223372036854776e+18`,
		`croft_take_overs_total{pool="/srv/croft"} 3`,
		`croft_take_over_seconds{pool="/srv/croft"} 0.065`,
		`croft_keeper_up{pool="/srv/croft"} 1`,
		"# TYPE process_resident_memory_bytes gauge",
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no %s in\n%s", line, text)
		}
	}
	// As Prometheus asks, through something that forwards to the socket.
	resp, err := NewClient(s.Path()).http.Get("http://croft/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if kind := resp.Header.Get("Content-Type"); err != nil || resp.StatusCode != http.StatusOK || !strings.HasPrefix(kind, "text/plain; version=0.0.4") || len(body) == 0 {
		t.Errorf("%s, %q, %d bytes, %v", resp.Status, kind, len(body), err)
	}
}

// metric returns what follows a metric's name and labels.
func metric(t *testing.T, c *Client, name string) string {
	t.Helper()
	text, err := c.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return "missing"
}

// TestMetricsOfMount fills a volume of a real mount.
func TestMetricsOfMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("it mounts")
	}
	dir, mnt := filepath.Join(t.TempDir(), "pool"), t.TempDir()
	if _, err := pool.Init(dir); err != nil {
		t.Fatal(err)
	}
	p, err := pool.Open(pool.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	s, err := Listen(p, Options{RunDir: filepath.Join(t.TempDir(), "run")})
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(s.Path())
	defer func() {
		c.Close()
		s.Shutdown(context.Background())
	}()
	if _, err := p.Create(t.Context(), "v", pool.CreateOptions{Bytes: 200 << 20}); err != nil {
		t.Fatal(err)
	}
	of := func(name, labels string) string {
		if labels != "" {
			labels += ","
		}
		return "croft_" + name + "{" + labels + `pool="` + dir + `"}`
	}
	ofVolume := func(name string) string { return "croft_" + name + `{pool="` + dir + `",volume="v"}` }
	if got := metric(t, c, of("held_calls_total", "")); got != "0" {
		t.Errorf("held before it was mounted: %s", got)
	}
	if err := p.Mount(pool.MountOptions{Mountpoint: mnt}); err != nil {
		t.Fatal(err)
	}
	info, err := c.Info(t.Context())
	if err != nil || info.Tier == "" || (info.Tier == "gate") != (info.WhyNotBetter == "") {
		t.Errorf("%+v, %v", info, err)
	}
	text, err := c.Metrics(t.Context())
	if want := `croft_tier{pool="` + dir + `",tier="` + info.Tier + `",`; err != nil || !strings.Contains(text, want) {
		t.Errorf("no %s in\n%s", want, text)
	}

	// A writer that has 20 MiB of 200 left, and waits.
	writer := exec.Command("sh", "-ec", `exec 3>"$0"/v/f; head -c 180M /dev/zero >&3; head -c 1M /dev/zero >&3; echo; read x`, mnt)
	in, err := writer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := writer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	v, err := c.Volume(t.Context(), "v")
	if err != nil || v.Used.Bytes != 181<<20 || v.Open != 1 {
		t.Errorf("%+v, %v", v, err)
	}
	want := "0"
	if info.Tier == "gate" {
		if want = "1"; !v.Gated || v.Gatings == 0 {
			t.Errorf("with 19 MiB of room: %+v", v)
		}
		if got := metric(t, c, of("held_calls_total", "")); got == "0" || got == "missing" {
			t.Errorf("held: %s", got)
		}
	}
	for name, want := range map[string]string{
		ofVolume("gated"):                     want,
		ofVolume("volume_limit_bytes"):        "2.097152e+08",
		ofVolume("volume_used_bytes"):         "1.89792256e+08",
		ofVolume("volume_used_inodes"):        "1",
		ofVolume("volume_open_files"):         "1",
		of("held_calls", ""):                  "0",
		of("requests_total", `opcode="INIT"`): "1",
	} {
		if got := metric(t, c, name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	if err := writer.Wait(); err != nil {
		t.Error(err)
	}
}
