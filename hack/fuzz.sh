#!/usr/bin/env bash
# fuzz.sh [TIME] runs each fuzz target for TIME (default 10s).
set -euo pipefail
cd "$(dirname "$0")/.."

found=0
while IFS=: read -r file target; do
	found=1
	echo "== ${file%/*} $target"
	go test -run='^$' -fuzz="^$target\$" -fuzztime="${1:-10s}" "./${file%/*}"
done < <(git grep --untracked -ohE '^func Fuzz\w+' -- '*_test.go' >/dev/null &&
	git grep --untracked -oE '^func Fuzz\w+' -- '*_test.go' | sed 's/:func /:/')
((found)) || echo "there are no fuzz targets"
