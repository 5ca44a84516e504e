#!/usr/bin/env bash
# fuzz.sh [TIME] runs each fuzz target for TIME (default 10s). As root that is in a mount namespace of its own: go
# ends the processes that fuzz within seconds, and what they have mounted goes with them.
set -euo pipefail
cd "$(dirname "$0")/.."

private=()
((EUID != 0)) || private=(unshare --mount)
found=0
while IFS=: read -r file target; do
	found=1
	echo "== ${file%/*} $target"
	# Inputs that are not the same to a daemon each time would be minimized for a minute each.
	"${private[@]}" go test -run='^$' -fuzz="^$target\$" -fuzztime="${1:-10s}" -fuzzminimizetime=10x "./${file%/*}"
done < <(git grep --untracked -ohE '^func Fuzz\w+' -- '*_test.go' >/dev/null &&
	git grep --untracked -oE '^func Fuzz\w+' -- '*_test.go' | sed 's/:func /:/')
((found)) || echo "there are no fuzz targets"
