#!/usr/bin/env bash
# with-scratch.sh COMMAND... runs COMMAND with TMPDIR on a filesystem of its own: a
# sparse ext4 image of 20 GiB ($SCRATCH_SIZE), mounted without discard. What COMMAND
# leaves there, processes, mounts, loop devices, is taken away, and is a failure. After
# 75 minutes ($SCRATCH_TIMEOUT, in seconds) COMMAND is ended.
set -euo pipefail
# shellcheck source=hack/scratch.sh
. "$(dirname "$0")/scratch.sh"

if ((EUID != 0)); then
	echo "with-scratch: run as root: the tests mount" >&2
	exit 1
fi

dir=$(mktemp -d --tmpdir croft-scratch.XXXXXXXX)
finish() {
	local status=$? pid left=()
	trap - EXIT
	trap '' INT TERM HUP PIPE
	[[ -z ${watchdog:-} ]] || kill "$watchdog" 2>/dev/null || true
	if ! gone processes_of "$dir/mnt"; then
		for pid in $(processes_of "$dir/mnt"); do
			left+=("process $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)")
		done
	fi
	while read -r mount; do
		[[ $mount == "$dir/mnt" ]] || left+=("mount $mount")
	done < <(mounts_below "$dir")
	while read -r loop; do
		left+=("loop device $loop")
	done < <(loops_below "$dir/mnt")
	if ((${#left[@]})); then
		printf 'with-scratch: left behind: %s\n' "${left[@]}" >&2
	fi
	if ! sweep "$dir" || { ((${#left[@]})) && ((status == 0)); }; then
		status=1
	fi
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM HUP

mkdir "$dir/mnt"
make_image "$dir/image" "${SCRATCH_SIZE:-20G}" "$dir/mnt"
# Tests that act as other users must be able to reach it.
chmod 755 "$dir"
chmod 1777 "$dir/mnt"

# A test that waits for its own mount outlives go test's timeout, and so does go test.
(
	trap - EXIT
	while ((SECONDS < ${SCRATCH_TIMEOUT:-4500})); do
		sleep 1 >/dev/null 2>&1
	done
	echo "with-scratch: still running after $SECONDS s: ending it" >&2
	abort_fuse "$dir"
	for pid in $(processes_of "$dir/mnt"); do
		kill -s KILL "$pid" || true
	done
) &
watchdog=$!

# testing.T.TempDir goes by GOTMPDIR, everything else by TMPDIR.
TMPDIR=$dir/mnt GOTMPDIR=$dir/mnt "$@"
