#!/usr/bin/env bash
# config.sh writes what containerd, the CNI plugin and kubelet of a node are told, to $CLUSTER_RUN.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"

run=$CLUSTER_RUN
mkdir -p "$run"/{cni,containerd,kubelet,log,pids,sysctl}
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
port: $CLUSTER_KUBELET_PORT
healthzPort: $((CLUSTER_KUBELET_PORT - 2))
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
