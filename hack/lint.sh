#!/usr/bin/env bash
# lint.sh runs every linter and fails if one of them finds something.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

failed=()
# check NAME COMMAND... fails when COMMAND fails, and shows what it said only then.
check() {
	local name=$1 out
	shift
	if out=$("$@" 2>&1); then
		printf '%-12s ok\n' "$name"
	else
		printf '%-12s FAILED\n%s\n' "$name" "$out"
		failed+=("$name")
	fi
}
# formatted fails when gofmt would change something; gofmt -l alone does not.
formatted() {
	local out
	out=$(gofmt -s -l .) || return
	[[ -z $out ]] || echo "gofmt -s would change: $out"
	[[ -z $out ]]
}

# everywhere COMMAND... runs it on this module's packages, and on the tests of test/cluster: not on the programs of that
# module, for which all of Kubernetes would have to be there.
everywhere() { "$@" ./... && (cd test/cluster && "$@" .); }

mapfile -t scripts < <(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)

check gofmt formatted
check "go vet" everywhere go vet
check staticcheck everywhere "$(go tool -n staticcheck)"
check depguard go tool depguard ./...
check shellcheck shellcheck -x "${scripts[@]}"
check "go mod tidy" go mod tidy -diff

if ((${#failed[@]})); then
	echo "lint: failed: ${failed[*]}"
	exit 1
fi
