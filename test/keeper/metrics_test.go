package keeper_test

import (
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestMetricsAddress asks a daemon of two pools over TCP, before and after another one has taken over, and what it says
// when a mount does not answer. An address that is taken keeps no pool from being served.
func TestMetricsAddress(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	kit.OK(t, err)
	address := taken.Addr().String()
	kit.OK(t, taken.Close())
	at := filepath.Join(kit.TempDir(t), "second")
	p := kit.NewPool(t, "ext4")
	second := filepath.Join(p.Backing, "second")
	p.MustCroft("pool", "init", second)
	kit.OK(t, os.Mkdir(at, 0o755))
	p.Keeper = "auto"
	p.MountArgs = []string{"--metrics-address", address, "--pool", second, at}
	p.Mount()
	p.Create("v", 64*kit.Mi)

	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(method, path string) (code int, body string) {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), method, "http://"+address+path, nil)
		kit.OK(t, err)
		var answer *http.Response
		kit.Poll(t, "an answer on "+address, func() bool { // a daemon tries to listen every few seconds
			answer, err = client.Do(request)
			return err == nil
		})
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		kit.OK(t, err)
		return answer.StatusCode, string(text)
	}
	serves := func(when string) {
		t.Helper()
		code, text := ask("GET", "/metrics")
		for _, part := range []string{
			`croft_volume_limit_bytes{pool="` + p.Dir + `",volume="v"} 6.7108864e+07`,
			`croft_pool_total_bytes{pool="` + p.Dir + `"}`,
			`croft_pool_total_bytes{pool="` + second + `"}`,
			"\nprocess_resident_memory_bytes ",
		} {
			if code != http.StatusOK || strings.Count(text, part) != 1 {
				t.Errorf("%s: %d, and %q is there %d times, want once", when, code, part, strings.Count(text, part))
			}
		}
		if code, text := ask("GET", "/healthz"); code != http.StatusOK || text != "ok\n" {
			t.Errorf("%s: /healthz: %d %q", when, code, text)
		}
	}
	serves("the first daemon")
	pid := p.Serving()
	p.KillServing()
	p.AwaitNext(pid)
	serves("the next daemon")

	for _, test := range []struct {
		method, path string
		code         int
	}{{"GET", "/", 404}, {"GET", "/metrics/x", 404}, {"POST", "/metrics", 405}, {"DELETE", "/healthz", 405}} {
		if code, text := ask(test.method, test.path); code != test.code {
			t.Errorf("%s %s: %d %q, want %d", test.method, test.path, code, text, test.code)
		}
	}

	aside := kit.TempDir(t)
	kit.OK(t, unix.Mount(p.Mnt, aside, "", unix.MS_MOVE, ""))
	code, text := ask("GET", "/healthz")
	kit.OK(t, unix.Mount(aside, p.Mnt, "", unix.MS_MOVE, ""))
	if code != http.StatusServiceUnavailable || !strings.Contains(text, "no pool is mounted on "+p.Mnt) {
		t.Errorf("/healthz without the first pool's mount: %d %q", code, text)
	}
	serves("when it is back")

	p.Stop()
	taken, err = net.Listen("tcp", address)
	kit.OK(t, err)
	defer taken.Close()
	p.Mount()
	kit.Poll(t, "what the daemon says of an address that is taken", func() bool {
		return strings.Contains(p.Log(), "metrics are not served: trying again")
	})
	kit.OK(t, taken.Close())
	serves("an address that was taken")
	p.Stop()
}
