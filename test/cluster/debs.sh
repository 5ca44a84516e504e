#!/usr/bin/env bash
# debs.sh unpacks the Debian packages that the node needs into a directory of their own: nothing is installed. What is
# there is not fetched again.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"

mkdir -p "$CLUSTER_DEB"
exec 9>"$CLUSTER_DEB.lock"
flock 9

# A line: the package, and a file in it by which it is known.
needs="
busybox-static              bin/busybox
containernetworking-plugins usr/lib/cni/ptp
"
missing=()
while read -r package file; do
	[[ -z $package || -e $CLUSTER_DEB/$file ]] || missing+=("$package")
done <<<"$needs"
((${#missing[@]})) || exit 0

step "debs: ${missing[*]}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o DPkg::Lock::Timeout=300 update
apt-get -qq -o APT::Sandbox::User=root download "${missing[@]}"
for deb in *.deb; do
	dpkg -x "$deb" "$CLUSTER_DEB"
done
