#!/usr/bin/env bash
# deploy-check.sh tests what is in deploy/. Helm is built once, for each version of it; the tests run each time, for Go's cache
# of results does not see the files that helm reads.
set -euo pipefail
cd "$(dirname "$0")/../deploy/check"
version=$(go list -m -f '{{.Version}}' helm.sh/helm/v4)
export HELM=${XDG_CACHE_HOME:-$HOME/.cache}/croft-helm/helm-$version
if [[ ! -x $HELM ]]; then
	mkdir -p "$(dirname "$HELM")"
	CGO_ENABLED=0 go build -trimpath -o "$HELM.new" helm.sh/helm/v4/cmd/helm
	mv "$HELM.new" "$HELM"
fi
go mod tidy -diff
go vet ./...
go test -count=1 -timeout 1h ./...
