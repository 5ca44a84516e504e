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
