#!/usr/bin/env bash
# build.sh [kube runtime sidecars node agnhost helm e2e]... builds programs from the Go module proxy: those that are named, or
# those of a cluster, all but Helm and Kubernetes' own tests. Cold it takes some ten minutes on two processors; what was
# built from the same sources by the same Go is left as it is. Two of it wait for each other, so that a build can be
# started early in the background.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"
cd "$(dirname "$0")"

mkdir -p "$CLUSTER_BIN/share" "$CLUSTER_BIN/built"
exec 9>"$CLUSTER_BIN.lock"
flock 9

key=$({ go version; sha256sum go.mod go.sum build.sh kube/* csi-node-driver-registrar/* livenessprobe/* e2e/*; } | sha256sum | cut -d ' ' -f 1)
export CGO_ENABLED=0
csi=github.com/kubernetes-csi

# linked prints the linker's flags; Kubernetes' programs compare their own versions.
linked() {
	local version component=k8s.io/component-base/version
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	echo "-s -w -X $component.gitVersion=$version -X $component.gitMajor=1 -X $component.gitMinor=$(cut -d . -f 2 <<<"$version") -X $component.gitTreeState=clean"
}
build() { go build -trimpath -ldflags "$(linked)" -o "$CLUSTER_BIN/" "$@"; }
# sources MODULE prints where its files are.
sources() { go list -m -f '{{.Dir}}' "$csi/$1"; }

# shared leaves the CRDs of snapshots, which every distribution has, beside the programs.
shared() {
	rm -rf "$CLUSTER_BIN/share"
	mkdir -p "$CLUSTER_BIN/share/snapshots"
	cp "$(sources external-snapshotter/client/v8)"/config/crd/snapshot.storage*.yaml "$CLUSTER_BIN/share/snapshots/"
	chmod -R u+w "$CLUSTER_BIN/share"
}

make_kube() {
	build ./kube
	ln -sf kube "$CLUSTER_BIN/kubectl"
}
make_runtime() {
	build github.com/containerd/containerd/v2/cmd/{containerd,containerd-shim-runc-v2,ctr}
	# It enters namespaces in C, before Go's threads are there.
	CGO_ENABLED=1 build -tags seccomp github.com/opencontainers/runc
}
make_sidecars() {
	build "$csi/external-provisioner/v6/cmd/csi-provisioner" "$csi/external-resizer/v2/cmd/csi-resizer" \
		"$csi/external-snapshotter/v8/cmd/csi-snapshotter" "$csi/external-snapshotter/v8/cmd/snapshot-controller"
	shared
}
make_node() { build ./csi-node-driver-registrar ./livenessprobe; }
make_helm() { build helm.sh/helm/v4/cmd/helm; }
make_agnhost() { build k8s.io/kubernetes/test/images/agnhost; }
make_e2e() {
	go test -c -trimpath -ldflags "$(linked)" -o "$CLUSTER_BIN/e2e.test" ./e2e
	build github.com/onsi/ginkgo/v2/ginkgo
}

(($#)) || set -- kube runtime sidecars node agnhost
for what in "$@"; do
	if [[ $(type -t "make_$what") != function ]]; then
		echo "build: $what: want kube, runtime, sidecars, node, agnhost, helm or e2e" >&2
		exit 2
	fi
	stamp=$CLUSTER_BIN/built/$what
	[[ ! -e $stamp || $(cat "$stamp") != "$key" ]] || continue
	step "build: $what"
	"make_$what"
	echo "$key" >"$stamp"
done
step "build: all there"
