#!/usr/bin/env bash
# join.sh NAME NUMBER adds a node to the running cluster, in mount and process namespaces of its own, and waits until it is
# Ready. $CLUSTER_RUN/nodes/NAME/pool.image is its pool's filesystem. join.sh --leave NAME ends it all at once, as a power
# cut would; its Node stays.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"

if [[ $1 == --leave ]]; then
	file=$CLUSTER_RUN/nodes/$2/pid
	inside kill -KILL "$(cat "$file")"
	rm "$file"
	# Its mounts end with its processes, and its disk is free then.
	while [[ -n $(losetup --associated "$CLUSTER_RUN/nodes/$2/pool.image") ]]; do
		sleep 0.1
	done
	exit
fi

name=$1 number=$2 first=$CLUSTER_RUN run=$CLUSTER_RUN/nodes/$1
mkdir -p "$run"
cp "$first/kubeconfig" "$run/kubeconfig"
settings=(CLUSTER_RUN="$run" CLUSTER_NODE="$name" CLUSTER_NODE_IP="10.99.0.$number" CLUSTER_PODS="10.98.$number.0/24"
	CLUSTER_CGROUP="$CLUSTER_CGROUP/$name" CLUSTER_KUBELET_PORT=$((10250 + 10 * number)))
env "${settings[@]}" "$(dirname "$0")/config.sh"
# shellcheck disable=SC2016 # it is another script
setsid nsenter --target "$(cat "$first/pid")" --mount --net --pid -- env -C "$PWD" "${settings[@]}" \
	bash -c 'echo $$ >"$CLUSTER_RUN/pid"; exec unshare --mount --pid --fork --kill-child --mount-proc --propagation private bash "$0" --join' \
	"$(dirname "$0")/node.sh" >"$run/log/node.log" 2>&1 </dev/null &

# below COMMAND... runs it in the node's namespaces.
below() {
	# shellcheck disable=SC2016 # it is another script
	inside bash -c 'pid=$(tr -d " " <"/proc/$1/task/$1/children"); exec nsenter --target "$pid" --mount --pid -- "${@:2}"' - "$(cat "$run/pid")" "$@"
}
ctr() { below ctr --address /run/containerd/containerd.sock --namespace k8s.io "$@"; }
until_ok "containerd of $name answers" ctr version
for tar in "$first"/images/*.tar; do
	ctr images import --digests=false "$tar" >>"$run/log/images.log" 2>&1
done
step "$name: images imported"
until_ok "$name Ready" k wait --for=condition=Ready "node/$name" --timeout=1s
