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
mkdir -p "$run"/{etcd,images,pki}
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
"$(dirname "$0")/config.sh"

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

ctr() { inside ctr --address /run/containerd/containerd.sock --namespace k8s.io "$@"; }
until_ok "containerd answers" ctr version
for tar in "$run"/images/*.tar; do
	ctr images import --digests=false "$tar" >>"$run/log/images.log" 2>&1
done
step "images imported"
until_ok "API server ready" k get --raw /readyz
until_ok "node Ready" k wait --for=condition=Ready "node/$CLUSTER_NODE" --timeout=1s
until_ok "service account" k -n default get serviceaccount default
