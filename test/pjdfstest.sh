#!/bin/bash
# Runs pjdfstest on a mounted volume of each backing filesystem.
#
#   test/pjdfstest.sh DIR [FILESYSTEM...]     default: ext4; also xfs, btrfs
#
# DIR is a checkout of https://github.com/pjd/pjdfstest outside of this
# repository; it is built in a copy. Needs root, bin/croft (make build) and
# Debian's autoconf, automake, gcc, make and perl. Prints the test files that
# failed and ends with 1 when there are any.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
source=$(cd "$1" && pwd)
shift
[ -f "$source/pjdfstest.c" ] || { echo "$source is no checkout of pjdfstest" >&2; exit 2; }
[ $# -gt 0 ] || set -- ext4
root=$(cd "$(dirname "$0")/.." && pwd)
croft=$root/bin/croft
[ "$(id -u)" = 0 ] || { echo "pjdfstest needs root" >&2; exit 2; }
[ -x "$croft" ] || { echo "$croft is missing: make build" >&2; exit 2; }
for tool in autoreconf gcc make prove openssl; do
	command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install autoconf automake gcc make perl openssl" >&2; exit 2; }
done

work=$(mktemp -d)
chmod 755 "$work"
daemon=
export CROFT_RUN_DIR=$work/run

unmount() {
	if [ -n "$daemon" ]; then
		kill "$daemon" 2>/dev/null || true
		wait "$daemon" 2>/dev/null || true
		daemon=
	fi
	for dir in mnt backing; do
		if mountpoint -q "$work/$dir" 2>/dev/null; then
			umount "$work/$dir" 2>/dev/null || umount -l "$work/$dir" || true
		fi
	done
}
trap 'unmount; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

mkdir "$work/run" "$work/mnt" "$work/backing"
cp -r "$source" "$work/pjdfstest"
(
	cd "$work/pjdfstest"
	autoreconf -ifs
	./configure
	make pjdfstest
) >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 2; }

# prepare mounts a volume on a new filesystem. Its last command counts: bash has
# no -e in a function whose status is asked for.
prepare() { # FILESYSTEM
	local image=$work/image
	rm -f "$image"
	truncate -s 3G "$image" &&
		case $1 in
		ext4) mkfs.ext4 -q -F -E nodiscard "$image" ;;
		xfs) mkfs.xfs -q -f -K "$image" ;;
		btrfs) mkfs.btrfs -q -f -K "$image" ;;
		*) echo "no such filesystem: $1" >&2; false ;;
		esac &&
		mount -o loop,nodiscard "$image" "$work/backing" &&
		"$croft" pool init "$work/backing/pool" >/dev/null &&
		"$croft" volume create --pool "$work/backing/pool" --size 2Gi --inodes 100000 v >/dev/null || return
	"$croft" mount --pool "$work/backing/pool" "$work/mnt" >"$work/daemon.log" 2>&1 &
	daemon=$!
	until mountpoint -q "$work/mnt" && [ -d "$work/mnt/v" ]; do
		kill -0 "$daemon" 2>/dev/null || { cat "$work/daemon.log" >&2; return 1; }
	done
	mkdir "$work/mnt/v/run"
}

run() { # FILESYSTEM
	local status=0
	prepare "$1" || return
	# The suite makes what other users must reach, whatever this shell's umask.
	(cd "$work/mnt/v/run" && umask 022 && prove -r "$work/pjdfstest/tests") >"$work/prove.log" 2>&1 || status=$?
	echo "== $1"
	sed -n '/^Test Summary Report/,/^Files=/p' "$work/prove.log"
	grep -E '^(Files=|Result:|All tests)' "$work/prove.log" || true
	"$croft" check --pool "$work/backing/pool" || status=$?
	unmount
	return "$status"
}

failed=0
for filesystem; do
	run "$filesystem" || failed=1
done
exit "$failed"
