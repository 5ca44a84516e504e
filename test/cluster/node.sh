#!/usr/bin/env bash
# node.sh is process 1 of the cluster's namespaces: it prepares them, and keeps the cluster's programs running as systemd
# would. Everything ends with it. up.sh starts it. As node.sh --join it is that of another node, in namespaces below, for
# join.sh: their network is the cluster's.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"
run=$CLUSTER_RUN log=$CLUSTER_RUN/log

# What the first node has mounted meanwhile is not the other's.
[[ ${1:-} != --join ]] || umount --recursive --lazy /run /var/lib /var/log
mount --make-rshared /
# Directories with fixed names, the cluster's own.
for dir in /run /var/lib /var/log; do
	mount -t tmpfs -o mode=755 tmpfs "$dir"
done
mkdir -p /var/lib/kubelet /var/log/pods /run/containerd /run/lock
mount --bind "$run/kubelet" /var/lib/kubelet
mount --make-rshared /var/lib/kubelet

for hierarchy in /sys/fs/cgroup/*/ /sys/fs/cgroup/; do
	case $(stat -f -c %T "$hierarchy") in
	cgroupfs | cgroup2fs) ;;
	*) continue ;;
	esac
	mkdir -p "$hierarchy$CLUSTER_CGROUP"
	for file in cpuset.cpus cpuset.mems; do
		[[ ! -e $hierarchy$file ]] || cat "$hierarchy$file" >"$hierarchy$CLUSTER_CGROUP/$file"
	done
done

[[ ${1:-} == --join ]] || ip link set lo up
ip addr replace "$CLUSTER_NODE_IP/32" dev lo
if [[ ${1:-} != --join ]]; then
	ip addr add "$CLUSTER_API_IP/32" dev lo
	echo 1 >/proc/sys/net/ipv4/ip_forward
	ip route add default dev lo
fi

# The pool has a filesystem of its own, made by up.sh's caller.
if [[ -e $run/pool.image ]]; then
	mkdir -p "$CLUSTER_POOL"
	mount -o loop,nodiscard "$run/pool.image" "$CLUSTER_POOL"
fi

# kubelet insists on settings of the kernel that are the machine's: it is shown files with those values. It alone, or no
# container with a user namespace could mount /proc; but what it mounts elsewhere is to be seen.
kubelet() {
	# shellcheck disable=SC2016 # it is another script
	exec unshare --mount --propagation unchanged bash -euc '
		mount --make-rprivate /proc
		shown() {
			echo "$2" >"$CLUSTER_RUN/sysctl/${1//\//_}"
			mount --bind "$CLUSTER_RUN/sysctl/${1//\//_}" "/proc/sys/$1"
		}
		shown vm/overcommit_memory 1
		shown vm/panic_on_oom 0
		shown kernel/panic 10
		shown kernel/panic_on_oops 1
		shown kernel/keys/root_maxkeys 1000000
		shown kernel/keys/root_maxbytes 25000000
		exec kube kubelet "$@"' kubelet "$@"
}

# service NAME COMMAND... runs it again whenever it ends; its process is in pids/NAME.
service() {
	local name=$1
	shift
	while :; do
		"$@" >>"$log/$name.log" 2>&1 &
		echo $! >"$run/pids/$name"
		wait $! || true
		echo "node: $name ended: starting it again"
		sleep 1
	done
}

# control_plane starts what a cluster has once, and waits for its API server.
control_plane() {
	service etcd kube etcd --name test --data-dir "$run/etcd" --unsafe-no-fsync --log-level warn \
		--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
		--listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
		--initial-cluster test=http://127.0.0.1:2380 &
	service apiserver kube kube-apiserver --etcd-servers http://127.0.0.1:2379 \
		--secure-port 443 --advertise-address "$CLUSTER_NODE_IP" --cert-dir "$run/pki" \
		--service-cluster-ip-range "${CLUSTER_API_IP%.*}.0/24" --authorization-mode Node,RBAC \
		--token-auth-file "$run/pki/tokens.csv" --service-account-issuer https://kubernetes.default.svc \
		--service-account-key-file "$run/pki/sa.key" --service-account-signing-key-file "$run/pki/sa.key" \
		--allow-privileged --kubelet-preferred-address-types InternalIP &
	until kube kubectl --kubeconfig "$run/kubeconfig" get --raw /readyz >/dev/null 2>&1; do
		sleep 0.3
	done
	service controller-manager kube kube-controller-manager --kubeconfig "$run/kubeconfig" --leader-elect=false \
		--root-ca-file "$run/pki/apiserver.crt" --service-account-private-key-file "$run/pki/sa.key" \
		--use-service-account-credentials=false --kube-api-qps 200 --kube-api-burst 400 &
	service scheduler kube kube-scheduler --kubeconfig "$run/kubeconfig" --leader-elect=false &
}

touch "$run/ready"
service containerd containerd -c "$run/containerd.toml" &
if [[ ${1:-} != --join ]]; then
	control_plane
fi
service kubelet kubelet --kubeconfig "$run/kubeconfig" --config "$run/kubelet.yaml" \
	--hostname-override "$CLUSTER_NODE" --node-ip "$CLUSTER_NODE_IP" &
wait
