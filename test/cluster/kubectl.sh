#!/usr/bin/env bash
# kubectl.sh ARG... is kubectl against the running cluster.
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"
k "$@"
