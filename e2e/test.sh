#!/usr/bin/env bash
# Every check and test, in the order in which they fail fastest. Prints how long each family took.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
family() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@" || { echo "== $name FAILED after $((SECONDS - start)) s"; exit 1; }
  echo "== $name: $((SECONDS - start)) s"
}
tests() { go test -race -shuffle=on -timeout "$1" "${@:2}"; }

if [ "$(id -u)" != 0 ]; then
  echo "make test needs root: its tests make network namespaces and small file systems. Without root, run go test ./sync/... ./broker/... ./edgehub/... ./cloudhub and so on." >&2
  exit 1
fi
family "packages" e2e/install.sh
family "format" bash -c 'test -z "$(gofmt -l . | tee /dev/stderr)"'
family "build" make --no-print-directory bin
family "vet" go vet ./...
family "generated code" make --no-print-directory check-generated
family "cross build" make --no-print-directory cross
family "onnx runtime" make --no-print-directory onnxruntime
export LONGSHORE_REQUIRE_ORT=1
family "unit and protocol tests" tests 15m $(go list ./... | grep -vE '/internal/kube$|/e2e$|/e2e/fault$')
family "ten thousand histories of the protocol" go test -count=1 -timeout 10m ./sync/simtest
family "control plane build" make --no-print-directory controlplane
family "kubernetes tests" tests 15m ./cloudhub/internal/kube
family "end-to-end tests" tests 20m ./e2e
family "fault tests" tests 15m ./e2e/fault
family "lint" make --no-print-directory lint
echo "all tests passed in $SECONDS s"
