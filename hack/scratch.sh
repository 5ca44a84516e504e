# shellcheck shell=bash
# Functions for scripts that work in a directory with mounts, loop devices and
# daemons of its own. To be sourced.

export PATH=$PATH:/usr/sbin:/sbin

# make_image FILE SIZE DIR makes a sparse ext4 image and mounts it at DIR. It never
# discards: discards of a loop device punch holes in its file, under which many
# disks stall.
make_image() {
	truncate -s "$2" "$1"
	mkfs.ext4 -q -F -E nodiscard "$1"
	mount -o loop,nodiscard "$1" "$3"
}

# mounts_below DIR prints the mount points below DIR, newest first.
mounts_below() {
	local point
	while read -r point; do
		point=$(printf '%b' "$point") # mountinfo writes a blank as \040
		[[ $point != "$1"/* ]] || printf '%s\n' "$point"
	done < <(awk '{ print $5 }' /proc/self/mountinfo | tac)
}

# loops_below DIR prints the loop devices whose file is, or was, below DIR.
loops_below() {
	losetup --list --noheadings --output NAME,BACK-FILE |
		awk -v dir="$1/" 'index($2, dir) == 1 { print $1 }'
}

# detach_below DIR detaches them. It must be called while their files are still seen
# below DIR: the kernel names a file by the mounts there are.
detach_below() {
	local loop
	for loop in $(loops_below "$1"); do
		losetup --detach "$loop" 2>/dev/null || true
	done
}

# processes_of DIR prints the processes that were started with a TMPDIR in DIR.
processes_of() {
	env -u TMPDIR grep -lzsE "^TMPDIR=$1(/|$)" /proc/[0-9]*/environ | cut -d / -f 3
}

# gone FUNCTION DIR waits up to five seconds until FUNCTION prints nothing for DIR.
gone() {
	local i
	for ((i = 0; i < 50; i++)); do
		[[ -n $("$@") ]] || return 0
		sleep 0.1
	done
	return 1
}

# abort_fuse DIR aborts the FUSE connections of the mounts below DIR. Without it, a
# process that waits for its own mount cannot be killed.
abort_fuse() {
	local point device
	while read -r device point; do
		point=$(printf '%b' "$point")
		[[ $point != "$1"/* ]] || echo 1 >"/sys/fs/fuse/connections/${device#*:}/abort" || true
	done < <(awk '/ - fuse/ { print $3, $5 }' /proc/self/mountinfo)
}

# sweep DIR ends what was started in DIR, unmounts what is mounted below it, and
# removes it. It returns 1 if something would not go.
sweep() {
	local dir=$1 signal point pid i status=0
	for signal in TERM KILL; do
		[[ $signal == TERM ]] || abort_fuse "$dir" 2>/dev/null
		for pid in $(processes_of "$dir"); do
			kill -s "$signal" "$pid" 2>/dev/null || true
		done
		! gone processes_of "$dir" || break
	done
	while read -r point; do
		detach_below "$point"
		for ((i = 0; i < 50; i++)); do
			! umount "$point" 2>/dev/null || continue 2
			sleep 0.1
		done
		echo "sweep: $point is in use; detaching it" >&2
		umount --lazy "$point" || true
		status=1
	done < <(mounts_below "$dir")
	detach_below "$dir"
	rm -rf --one-file-system "$dir" || status=1
	return "$status"
}
