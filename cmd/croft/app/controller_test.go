package app

import (
	"path/filepath"
	"testing"
)

func TestController(t *testing.T) {
	h := newHost(t)
	socket := "--endpoint=unix://" + filepath.Join(t.TempDir(), "csi.sock")
	h.want(ExitUsage, "must be one of off, retain, delete", "controller", socket, "--dead-nodes", "forget")
	h.want(ExitUsage, "--dead-nodes-after 1s: it is 1m0s at least", "controller", socket, "--dead-nodes", "delete", "--dead-nodes-after", "1s")
	h.want(ExitUsage, "absolute path of a unix socket", "controller", "--endpoint", "csi.sock")
	// Not in a cluster there is nobody to ask.
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	h.want(ExitFailure, "the cluster's API server", "controller", socket, "--dead-nodes", "retain")
	h.want(ExitFailure, "the cluster's API server", "controller", socket, "--place-copies")
}
