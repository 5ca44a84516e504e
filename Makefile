# People and CI run the same targets. `make` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-X main.version=$(VERSION)'

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## bin/croft, one static binary
	$(GO_BUILD) -o bin/croft ./cmd/croft

.PHONY: deps
deps: ## install the Debian packages that tests and demo need (as root)
	@hack/deps.sh test

.PHONY: check
check: deps build lint ## in under two minutes: build, lint, short tests (as root)
	hack/with-scratch.sh go test -short -timeout 2m ./bench/... ./cmd/... ./csi/... ./fs/... ./meta/... ./quota/...

.PHONY: test
test: deps build ## every test, over real mounts, or those of PKG=./fs/... (as root)
	hack/with-scratch.sh hack/test.sh $(PKG)

.PHONY: cluster-build
cluster-build: ## Kubernetes' own programs, for the tests of a cluster: ten minutes cold (as root)
	@hack/deps.sh cluster
	test/cluster/debs.sh
	nice -n 10 test/cluster/build.sh

.PHONY: test-cluster
test-cluster: deps cluster-build ## Croft in a real Kubernetes on this machine; ARGS="-run TestDrain" (as root)
	hack/with-scratch.sh hack/test.sh cluster $(ARGS)

.PHONY: e2e-storage
e2e-storage: ## Kubernetes' own storage tests against Croft in that cluster (as root)
	@$(MAKE) test-cluster ARGS="-run TestExternalStorage $(ARGS)"

.PHONY: soak
soak: deps build ## daemons killed 200 times in each tier, under load; ARGS="-kills 1000" (as root)
	SCRATCH_TIMEOUT=21600 hack/with-scratch.sh go test ./test/takeover -count=1 -v -timeout 6h -args -kills 200 -stopped 30s -inodes 100000 -volumes 1000 $(ARGS)

.PHONY: lint
lint: deps ## gofmt, vet, staticcheck, import rules, shellcheck, go mod tidy
	@hack/lint.sh

.PHONY: deploy-check
deploy-check: ## manifests, chart and examples: are they what Kubernetes takes, and the same
	@hack/deploy-check.sh

.PHONY: demo
demo: ## show a volume and its limit, and fio beside the native directory (as root)
	@hack/deps.sh demo
	@$(GO_BUILD) -o bin/croft ./cmd/croft
	@hack/demo.sh

.PHONY: bench
bench: ## measure beside native, loopback, bindfs; ARGS="--fs xfs", ARGS=--help (as root)
	@hack/deps.sh bench
	@$(GO_BUILD) -o bin/croft ./cmd/croft
	@CGO_ENABLED=0 go build -o bin/loopback github.com/hanwen/go-fuse/v2/example/loopback
	@CGO_ENABLED=0 go build -o bin/bench ./bench
	bin/bench $(ARGS)

.PHONY: pjdfstest
pjdfstest: build ## run pjdfstest from PJDFSTEST=DIR, its source, on BACKING="ext4 xfs btrfs" (as root)
	@[[ -n "$(PJDFSTEST)" ]] || { echo 'make pjdfstest PJDFSTEST=DIR: DIR is a checkout of pjdfstest' >&2; exit 2; }
	@hack/deps.sh pjdfstest
	hack/with-scratch.sh test/pjdfstest.sh '$(PJDFSTEST)' $(BACKING)

.PHONY: fuzz
fuzz: deps ## each fuzz target for FUZZTIME (default 10s)
	hack/with-scratch.sh hack/fuzz.sh $(FUZZTIME)

.PHONY: clean
clean: ## remove what was built
	rm -rf bin
	go clean -testcache
