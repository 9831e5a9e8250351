//go:build !linux || !(amd64 || arm64)

// Package ort runs models on ONNX Runtime, which does not exist for this machine.
package ort

import (
	"fmt"
	"runtime"

	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// Open fails: there is no ONNX Runtime for this machine.
func Open(string) (engine.Engine, error) {
	return nil, fmt.Errorf("%w: ONNX Runtime is not supported on %s/%s", engine.ErrNoEngine, runtime.GOOS, runtime.GOARCH)
}
