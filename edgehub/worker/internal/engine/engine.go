// Package engine says what a model runtime does for the worker.
package engine

import (
	"errors"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
)

// Options of a session.
type Options struct {
	// Threads one inference may use; at least 1.
	Threads int
}

// Engine is a runtime for models in the ONNX format.
type Engine interface {
	// Name as --engine and a model's requirements spell it.
	Name() string
	Version() string
	// Load prepares a model for inference. It keeps no reference to model.
	Load(model []byte, o Options) (Session, error)
}

// Session is a loaded model. Run may be called from many goroutines at once.
type Session interface {
	// Inputs and Outputs of the model, in its own order.
	Inputs() []oip.TensorMetadata
	Outputs() []oip.TensorMetadata
	// Run computes the named outputs from all inputs, which have passed oip.Metadata.Check. What it returns is the
	// caller's. The error is an *InputError where other inputs may succeed.
	Run(inputs []oip.Tensor, outputs []string) ([]oip.Tensor, error)
	// Close frees the session. No Run may be under way.
	Close()
}

// ErrOutOfMemory is in the chain of an error that more memory would have prevented.
var ErrOutOfMemory = errors.New("out of memory")

// ErrNoEngine is in the chain of an error that says that an engine can't be used on this machine.
var ErrNoEngine = errors.New("no engine")

// InputError says that the model can't compute with these inputs.
type InputError struct{ Err error }

func (e *InputError) Error() string { return e.Err.Error() }

func (e *InputError) Unwrap() error { return e.Err }
