#!/usr/bin/env bash
# test.sh [PACKAGE...] runs every test of the module: the packages first, with the
# race detector, then the suites in test/, one package at a time so that they do not
# disturb each other. test.sh cluster [FLAG...] runs those of test/cluster, a module of
# its own. In CI a skipped test is a failure unless hack/skips.txt names it. The last
# line counts; it is also left in bin/test/summary, beside `go test -json`'s output
# (bin/test-cluster/summary).
set -euo pipefail
cd "$(dirname "$0")/.."

results=$PWD/bin/test
[[ ${1:-} != cluster ]] || results+=-cluster
rm -rf "$results"
mkdir -p "$results"
module=$(go list -m)
status=0

# suite NAME TIMEOUT FLAG... runs go test; TIMEOUT is for each package.
suite() {
	local name=$1 timeout=$2
	shift 2
	echo "== $name: go test $*"
	# Compile with all processors before one package runs at a time.
	go test -exec true "$@" >/dev/null 2>&1 || true
	go tool gotestsum --format pkgname --hide-summary skipped --jsonfile "$results/$name.json" -- \
		-p 1 -count 1 -timeout "$timeout" "$@" || status=1
}

# modules runs the tests of this module's packages.
modules() {
	local package listed packages=() suites=()
	listed=$(go list "$@")
	for package in $listed; do
		case $package in
		"$module"/test/*) suites+=("$package") ;;
		*) packages+=("$package") ;;
		esac
	done
	if ((${#packages[@]})); then
		CGO_ENABLED=1 suite packages 10m -race "${packages[@]}"
	fi
	if ((${#suites[@]})); then
		suite suites 30m "${suites[@]}"
	fi
}

# cluster runs the tests in a cluster. Each says what it does as it goes: it is the one that takes minutes.
cluster() {
	go tool gotestsum --format standard-verbose --hide-summary skipped --jsonfile "$results/cluster.json" --raw-command -- \
		go -C test/cluster test -json -count 1 -timeout 60m . "$@" || status=1
}

if [[ ${1:-} == cluster ]]; then
	cluster "${@:2}"
else
	(($#)) || set -- ./...
	modules "$@"
fi

# tests ACTION prints "package test" for each test that ended so. go test -json writes
# one object a line, its fields always in the same order.
tests() {
	sed -nE "s|.*\"Action\":\"$1\",\"Package\":\"$module/([^\"]*)\",\"Test\":\"([^\"]*)\".*|\1 \2|p" "$results"/*.json
}

# may_skip TEST tells whether hack/skips.txt names it.
may_skip() {
	local pattern
	while read -r pattern; do
		# shellcheck disable=SC2053 # it is a pattern
		[[ $1 != $pattern ]] || return 0
	done < <(sed 's/ *#.*//; /^$/d' hack/skips.txt)
	return 1
}

if [[ -n ${CI:-} ]]; then
	while read -r skip; do
		if ! may_skip "$skip"; then
			echo "skipped, and not in hack/skips.txt: $skip"
			status=1
		fi
	done < <(tests skip)
fi

passed=$(tests pass | wc -l)
failed=$(tests fail | wc -l)
skipped=$(tests skip | wc -l)
((passed > 0)) || status=1
if ((status != 0 && failed == 0)); then
	failed=1 # a package that did not build, a forbidden skip, no test at all
fi
echo "$passed passed, $failed failed, $skipped skipped" | tee "$results/summary"
exit "$status"
