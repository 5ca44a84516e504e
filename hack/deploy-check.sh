#!/usr/bin/env bash
# deploy-check.sh tests what is in deploy/; with --build it only builds Helm, once for each version of it. The tests run each
# time, for Go's cache of results does not see the files that Helm reads.
set -euo pipefail
cd "$(dirname "$0")/../deploy/check"
version=$(go list -m -f '{{.Version}}' helm.sh/helm/v4)
export HELM=${XDG_CACHE_HOME:-$HOME/.cache}/croft-helm/helm-$version
if [[ ! -x $HELM ]]; then
	mkdir -p "$(dirname "$HELM")"
	CGO_ENABLED=0 go build -trimpath -o "$HELM.$$" helm.sh/helm/v4/cmd/helm
	mv "$HELM.$$" "$HELM"
fi
[[ ${1:-} != --build ]] || exit 0
go mod tidy -diff
go vet ./...
go test -count=1 -timeout 1h ./...
