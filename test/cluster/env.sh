# shellcheck shell=bash
# Paths, names and addresses that all scripts of this directory share; each can be set from outside. To be sourced.

: "${CLUSTER_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/croft-cluster}"
: "${CLUSTER_BIN:=$CLUSTER_CACHE/bin}" # what build.sh builds
: "${CLUSTER_DEB:=$CLUSTER_CACHE/deb}" # Debian packages, unpacked
: "${CLUSTER_RUN:=$CLUSTER_CACHE/run}" # the state of the running cluster
: "${CLUSTER_NODE:=node1}"
: "${CLUSTER_NODE_IP:=10.99.0.1}"
: "${CLUSTER_API_IP:=10.96.0.1}" # the first address of the services
: "${CLUSTER_PODS:=10.98.0.0/24}"
: "${CLUSTER_CGROUP:=croft-cluster}" # a directory below each cgroup hierarchy
: "${CLUSTER_KUBELET_PORT:=10250}"
: "${CLUSTER_POOL:=/var/lib/croft}" # where node.sh mounts $CLUSTER_RUN/pool.image, if there is one

PATH=$CLUSTER_BIN:$CLUSTER_DEB/usr/bin:$CLUSTER_DEB/usr/sbin:$CLUSTER_DEB/bin:$PATH:/usr/sbin:/sbin
export PATH CLUSTER_CACHE CLUSTER_BIN CLUSTER_DEB CLUSTER_RUN CLUSTER_NODE CLUSTER_NODE_IP CLUSTER_API_IP CLUSTER_PODS CLUSTER_CGROUP
export CLUSTER_KUBELET_PORT CLUSTER_POOL

# step says on stderr how far a script is.
step() { printf '[%4ss] %s\n' "$SECONDS" "$*" >&2; }

# inside COMMAND... runs it in the namespaces of the running cluster.
inside() { nsenter --target "$(cat "$CLUSTER_RUN/pid")" --mount --net --pid -- env -C "$PWD" "$@"; }

# k ARG... is kubectl against the cluster.
k() { inside kubectl --kubeconfig "$CLUSTER_RUN/kubeconfig" "$@"; }

# until_ok WHAT COMMAND... repeats it until it succeeds, as long as the cluster lives, for two minutes.
until_ok() {
	local what=$1
	shift
	local end=$((SECONDS + 120))
	until "$@" >/dev/null 2>&1; do
		if ((SECONDS > end)) || ! inside true; then
			echo "failed: $what" >&2
			tail -n 5 "$CLUSTER_RUN"/log/*.log "$CLUSTER_RUN"/nodes/*/log/*.log >&2 2>/dev/null
			exit 1
		fi
		sleep 0.2
	done
	step "$what"
}
