package app

import "testing"

func TestMetrics(t *testing.T) {
	dir := poolDir(t, idA)
	h, f := newHost(t), newFakePool(dir, "a")
	h.want(ExitFailure, "the pool is not mounted", "metrics", "--pool", dir)
	h.want(ExitUsage, "which pool? None is mounted", "metrics")
	h.want(ExitUsage, "unknown command", "metrics", "x")
	h.serves(f)
	h.want(ExitOK, `croft_volume_limit_bytes{pool="`+dir+`",volume="a"} 1.073741824e+10`, "metrics")
	h.want(ExitOK, `croft_held_calls_total{pool="`+dir+`"} 2`, "metrics", "--pool", dir)
}

func TestMetricsAddress(t *testing.T) {
	h := newHost(t)
	for address, says := range map[string]string{
		"9808":          "missing port",
		"localhost:":    "invalid syntax",
		":0":            "port 0",
		":65536":        "out of range",
		"::1:9808":      "too many colons",
		"http://h:9808": "too many colons",
	} {
		h.want(ExitUsage, says, "mount", "--pool", "/a", "--metrics-address", address, "/b")
		h.want(ExitUsage, "127.0.0.1:9808", "node", "--pool", "a=/a", "--metrics-address", address)
	}
	for _, address := range []string{"", ":9808", "127.0.0.1:9808", "[::1]:9808", "localhost:65535"} {
		if err := checkMetricsAddress(address); err != nil {
			t.Errorf("%q: %v", address, err)
		}
	}
}
