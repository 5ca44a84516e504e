#!/usr/bin/env bash
# demo.sh shows what a volume is: its limit, df inside, its neighbour, a resize while
# it is written to, the gate, and fio beside the native directory. `make demo` builds what it
# needs first. Everything happens in a temporary directory, which is gone afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=hack/scratch.sh
. hack/scratch.sh

if ((EUID != 0)); then
	echo "demo: run as root: it mounts" >&2
	exit 1
fi
[[ -e /dev/fuse ]] || modprobe fuse || { echo "demo: this kernel has no FUSE" >&2; exit 1; }

dir=$(mktemp -d --tmpdir croft-demo.XXXXXXXX)
finish() {
	local status=$?
	trap - EXIT
	trap '' INT TERM HUP PIPE
	exec 9>&-
	sweep "$dir" || status=1
	((status == 0)) || echo "demo: failed (status $status); everything was taken away" >&2
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM HUP

export TMPDIR=$dir # by which sweep knows the daemon
export PATH=$PWD/bin:$PATH:/usr/sbin:/sbin

bold='' plain=''
if [[ -t 1 ]]; then
	bold=$'\e[1m' plain=$'\e[0m'
fi
say() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }

# run COMMAND shows a command line and runs it in this shell.
run() {
	printf '$ %s\n' "$1"
	eval "$1"
}
# refused COMMAND is run, for a command that must fail.
refused() {
	printf '$ %s\n' "$1"
	if eval "$1" 2>&1; then
		echo "demo: that should have been refused" >&2
		return 1
	fi
}

cd "$dir"

say "An ordinary filesystem in an image; the pool is a directory in it."
run "truncate -s 12G disk.img && mkfs.ext4 -q -E nodiscard disk.img"
run "mkdir disk mnt && mount -o loop,nodiscard disk.img disk"
run "croft pool init disk/croft"
run "export CROFT_POOL=$dir/disk/croft"

say "Two volumes with limits, and one mount that has them both."
run "croft volume create --size 64Mi small"
run "croft volume create --size 8Gi web-0"
run "croft mount --daemon mnt"
run "croft doctor | sed '/^$/,\$d'   # the tier, and why not a better one"
run "croft volume list"
run "df -h --output=file,size,used,avail,pcent disk mnt/small mnt/web-0"
run "df --output=file,itotal,iused,iavail,ipcent mnt/small mnt/web-0"

say "The small one is filled: its limit is a disk's end."
refused "dd if=/dev/zero of=mnt/small/fill bs=1M"
run "df -h --output=file,size,used,avail,pcent mnt/small mnt/web-0"
run "croft volume list"
refused "croft volume resize small --size 32Mi"

say "The neighbour does not notice."
run "dd if=/dev/zero of=mnt/web-0/data bs=1M count=128 conv=fsync"

say "Grown while a file in it is open, which then goes on."
run "exec 9>>mnt/small/fill"
refused "head -c 1M /dev/zero >&9"
run "croft volume resize small --size 96Mi"
run "head -c 32M /dev/zero >&9"
refused "head -c 1M /dev/zero >&9"
run "exec 9>&-"
run "df -h --output=file,size,used,avail,pcent mnt/small"
run "ls -l disk/croft/volumes/small   # plain files, under their own names"

say "In the tier gate the kernel reads and writes by itself. Where room is short, calls are held."
run "croft volume create --size 1Gi mid"
metrics="croft metrics | grep -E '^croft_(tier|held_calls_total|gated.*\"mid\")'"
run "exec 9>mnt/mid/fill"
run "head -c 800M /dev/zero >&9"
run "$metrics"
run "head -c 200M /dev/zero >&9"
refused "head -c 100M /dev/zero >&9"
run "$metrics"
run "df -h --output=file,size,used,avail,pcent mnt/mid"
run "exec 9>&- && croft volume delete mid"

say "fio in a volume with room, and beside it in a native directory of the same filesystem."
run "mkdir disk/native"
fio_options="--ioengine=psync --invalidate=0 --fallocate=none --overwrite=1 --time_based --runtime=5"
# fio_run NAME OPTIONS leaves its terse result for both places in $dir.
fio_run() {
	local where
	for where in native croft; do
		local target=disk/native
		[[ $where == native ]] || target=mnt/web-0
		printf '$ fio --name=%s --directory=%s %s\n' "$1" "$target" "$2 $fio_options"
		# shellcheck disable=SC2086 # options are words
		fio --name="$1" --directory="$target" --filename=fio $2 $fio_options \
			--output-format=terse --terse-version=3 --output="$1.$where" </dev/null
		sync -f "$target" # what is left to write shall not slow the next
	done
}
fio_run random-write "--rw=randwrite --bs=4k --size=256m"
fio_run small-write "--rw=write --bs=4k --size=256m"
fio_run seq-write "--rw=write --bs=1m --size=512m"
fio_run seq-read "--rw=read --bs=1m --size=512m"

# Terse version 3: a job's name is field 3, read bandwidth (KiB/s) and IOPS are 7
# and 8, write 48 and 49.
printf '\n%-28s %12s %12s %8s\n' "" native croft ratio
for job in "random-write 49 4 KiB random write, IOPS" "small-write 49 4 KiB write, IOPS" "seq-write 48 1 MiB write, MiB/s" "seq-read 7 1 MiB read, MiB/s"; do
	read -r name field title <<<"$job"
	awk -F ';' -v field="$field" -v title="$title" '
		$1 == 3 { value[FILENAME ~ /native$/ ? "native" : "croft"] = $field / (field == 49 ? 1 : 1024) }
		END {
			if (!value["native"] || !value["croft"]) { print "no figure of fio for " title; exit 1 }
			printf "%-28s %12.0f %12.0f %7.2fx\n", title, value["native"], value["croft"], value["croft"] / value["native"]
		}' "$name.native" "$name.croft"
done
echo "(page cache on both sides; this disk and moment: the ratio is what counts)"

say "The disk is recounted against the ledger; then all goes."
run "croft check"
run "croft volume delete small"
run "croft volume list"
run "umount mnt"
