#!/usr/bin/env bash
# up.sh starts the cluster in namespaces of its own (mounts, network, processes) and waits until its node is Ready.
# $CLUSTER_RUN/images/*.tar are the images that it has; it pulls none.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"

if [[ -e $CLUSTER_RUN/pid ]] && kill -0 "$(cat "$CLUSTER_RUN/pid")" 2>/dev/null; then
	echo "up: a cluster runs in $CLUSTER_RUN: ./down.sh ends it" >&2
	exit 1
fi

run=$CLUSTER_RUN
mkdir -p "$run"/{cni,containerd,etcd,images,kubelet,log,pids,pki,pool,sysctl}
chmod 700 "$run"
openssl genrsa -out "$run/pki/sa.key" 2048 2>/dev/null
token=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
echo "$token,admin,admin,system:masters" >"$run/pki/tokens.csv"
cat >"$run/kubeconfig" <<END
apiVersion: v1
kind: Config
current-context: test
clusters: [{name: test, cluster: {server: "https://$CLUSTER_API_IP:443", certificate-authority: $run/pki/apiserver.crt}}]
users: [{name: admin, user: {token: $token}}]
contexts: [{name: test, context: {cluster: test, user: admin}}]
END
cat >"$run/cni/10-test.conflist" <<END
{"cniVersion": "0.4.0", "name": "test", "plugins": [{"type": "ptp", "ipMasq": false, "ipam": {
	"type": "host-local", "dataDir": "/run/cni", "ranges": [[{"subnet": "$CLUSTER_PODS"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
END
# A process's oom_score_adj cannot be lowered without CAP_SYS_RESOURCE, which not every machine gives.
cat >"$run/containerd.toml" <<END
version = 3
root = "$run/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "test.local/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "$CLUSTER_BIN/runc"
        SystemdCgroup = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["$CLUSTER_DEB/usr/lib/cni"]
    conf_dir = "$run/cni"
END
cat >"$run/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$CLUSTER_CGROUP
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
protectKernelDefaults: true
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
failSwapOn: false
volumeStatsAggPeriod: 10s
syncFrequency: 10s
shutdownGracePeriod: 0s
maxPods: 100
clusterDNS: ["${CLUSTER_API_IP%.*}.10"]
clusterDomain: cluster.local
END

setsid unshare --mount --net --pid --fork --mount-proc --propagation private \
	bash "$(dirname "$0")/node.sh" >"$run/log/node.log" 2>&1 </dev/null &
unshare=$!
for ((i = 0; i < 300; i++)); do
	# The child of unshare is process 1 of the namespaces.
	pid=$(tr -d ' ' <"/proc/$unshare/task/$unshare/children" || true)
	[[ -z $pid || ! -e $run/ready ]] || break
	sleep 0.1
done
echo "$pid" >"$run/pid"

# until_ok WHAT COMMAND... repeats it until it succeeds, as long as the cluster lives, for two minutes.
until_ok() {
	local what=$1
	shift
	local end=$((SECONDS + 120))
	until "$@" >/dev/null 2>&1; do
		if ((SECONDS > end)) || ! kill -0 "$pid" 2>/dev/null; then
			echo "up: failed: $what" >&2
			tail -n 5 "$run"/log/*.log >&2
			exit 1
		fi
		sleep 0.2
	done
	step "up: $what"
}
ctr() { inside ctr --address /run/containerd/containerd.sock --namespace k8s.io "$@"; }
until_ok "containerd answers" ctr version
for tar in "$run"/images/*.tar; do
	ctr images import --digests=false "$tar" >>"$run/log/images.log" 2>&1
done
step "up: images imported"
until_ok "API server ready" k get --raw /readyz
until_ok "node Ready" k wait --for=condition=Ready "node/$CLUSTER_NODE" --timeout=1s
until_ok "service account" k -n default get serviceaccount default
