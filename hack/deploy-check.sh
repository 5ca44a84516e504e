#!/usr/bin/env bash
# deploy-check.sh tests what is in deploy/. The tests run each time, for Go's cache of results does not see the files that
# Helm reads.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/../test/cluster/env.sh"
cd "$(dirname "$0")/../test/cluster"
./build.sh helm
export HELM=$CLUSTER_BIN/helm
# As build.sh builds, so that what both need is built once.
export CGO_ENABLED=0 GOFLAGS=-trimpath
go mod tidy -diff
go vet ./manifests
go test -count=1 -timeout 1h ./manifests
