#!/bin/sh
# Writes what is generated from the Go types of the API group longshore.dev: their deep-copy functions and the CRDs.
set -eu
cd "$(dirname "$0")/.."

controller_gen="sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0"

go run "$controller_gen" object crd:maxDescLen=512 \
	paths=./cloudhub/internal/api/v1alpha1 \
	output:crd:artifacts:config=deploy/crds
