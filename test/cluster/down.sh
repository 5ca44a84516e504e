#!/usr/bin/env bash
# down.sh ends the cluster and removes what it left, but for its logs where $CLUSTER_LOGS names a directory for them. Its
# processes end with process 1 of their namespace, its mounts with their namespace.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"

if [[ -n ${CLUSTER_LOGS:-} && -d $CLUSTER_RUN/log ]]; then
	rm -rf "$CLUSTER_LOGS"
	cp -r "$CLUSTER_RUN/log" "$CLUSTER_LOGS"
fi
if [[ -e $CLUSTER_RUN/pid ]]; then
	pid=$(cat "$CLUSTER_RUN/pid")
	if grep -qs node.sh "/proc/$pid/cmdline"; then
		# Loop devices of block volumes outlive their processes. From outside the kernel names their files otherwise.
		inside losetup --list --noheadings --output NAME,BACK-FILE |
			awk -v pool="$CLUSTER_POOL/" 'index($2, pool) == 1 { print $1 }' | xargs -r -n 1 losetup --detach || true
		kill -KILL "$pid"
		while kill -0 "$pid" 2>/dev/null; do
			sleep 0.1
		done
	fi
fi
# The kernel lets go of a process's cgroup a moment after its end.
for hierarchy in /sys/fs/cgroup/*/ /sys/fs/cgroup/; do
	for ((i = 0; i < 100; i++)); do
		[[ -d $hierarchy$CLUSTER_CGROUP ]] || break
		find "$hierarchy$CLUSTER_CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
	done
	if [[ -d $hierarchy$CLUSTER_CGROUP ]]; then
		echo "down: $hierarchy$CLUSTER_CGROUP is in use" >&2
		exit 1
	fi
done
rm -rf --one-file-system "$CLUSTER_RUN"
step "down"
