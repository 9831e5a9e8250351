//go:build !(amd64 || arm64)

// Package gomlx runs models on GoMLX's pure Go backend, which does not compile for this architecture.
package gomlx

import (
	"fmt"
	"runtime"

	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// Open fails: GoMLX does not exist for this architecture.
func Open() (engine.Engine, error) {
	return nil, fmt.Errorf("%w: GoMLX does not support %s", engine.ErrNoEngine, runtime.GOARCH)
}
