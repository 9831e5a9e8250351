# Targets do what a person would type. See CONTRIBUTING.md.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X main.version=$(VERSION)
GOBUILD  := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
COMMANDS := ./cloudhub ./edgehub ./edgehub/worker

BUF      := go run github.com/bufbuild/buf/cmd/buf@v1.75.0
LINT     := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

export LONGSHORE_CACHE ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/longshore

.PHONY: build bin demo demo-kube test soak fuzz lint vet generate check-generated cross onnxruntime controlplane tools bench clean help

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

bin: ## build the commands for this machine into bin/
	@mkdir -p bin
	@$(GOBUILD) -o bin/cloudhub ./cloudhub
	@$(GOBUILD) -o bin/edgehub ./edgehub
	@$(GOBUILD) -o bin/longshore-worker ./edgehub/worker

build: bin cross ## build for this machine and for amd64, arm64 and armv7

cross: ## check that the edge builds for every kind of box, into bin/<os>-<arch>/
	@for t in amd64 arm64 arm; do \
	  mkdir -p bin/linux-$$t; \
	  GOOS=linux GOARCH=$$t GOARM=7 $(GOBUILD) -o bin/linux-$$t/edgehub ./edgehub; \
	  GOOS=linux GOARCH=$$t GOARM=7 $(GOBUILD) -o bin/linux-$$t/longshore-worker ./edgehub/worker; \
	  if [ $$t != arm ]; then GOOS=linux GOARCH=$$t $(GOBUILD) -o bin/linux-$$t/cloudhub ./cloudhub; fi; \
	done
	@ls -l bin/linux-*/ | awk 'NF>8 {printf "%6.1f MB  %s\n", $$5/1e6, $$9} /^bin/ {print}'

demo: bin onnxruntime ## the main job on a folder of YAML, in about a minute
	@go run ./e2e/demo

demo-kube: bin onnxruntime controlplane ## the same against a real API server
	@go run ./e2e/demo -kube

test: ## every check and test; installs what they need
	@e2e/test.sh

soak: bin controlplane ## faults under load for DURATION (30m); prints what it costs every minute, and a summary. SEED repeats one
	@BIN=$(CURDIR)/bin DURATION=$(or $(DURATION),30m) go test -v -count=1 -timeout 0 ./e2e/fault -run TestSoak

fuzz: ## every fuzz target for FUZZTIME (1m), one after another; TARGET=FuzzName for one
	@FUZZTIME=$(or $(FUZZTIME),1m) TARGET=$(TARGET) e2e/fuzz.sh

onnxruntime: ## get the ONNX Runtime library (through npm) into the cache
	@edgehub/worker/get-onnxruntime.sh

controlplane: ## build the one-process control plane of the tests into the cache
	@go run ./e2e/cluster/up -build

lint: ## golangci-lint, pinned
	@$(LINT) run ./...

vet:
	@go vet ./...

generate: ## generated code: wire messages, deep copies, CRDs
	@cd proto && $(BUF) generate
	@deploy/generate.sh

check-generated: generate ## fail if generated code is not current
	@git diff --exit-code --stat -- proto deploy cloudhub/internal/api || { echo "generated code is not current: run make generate and commit"; exit 1; }

bench: bin onnxruntime controlplane ## every figure, about an hour, into docs/PERFORMANCE.md; ONLY=name: one experiment
	@go run ./e2e/bench $(if $(ONLY),-only $(ONLY),-markdown docs/PERFORMANCE.md)

clean:
	@rm -rf bin bench.json
