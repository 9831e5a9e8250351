//go:build amd64 || arm64

// Package gomlx runs models on GoMLX's pure Go backend: slower than ONNX Runtime and with fewer operators, but needing
// nothing that is not in this program.
package gomlx

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"

	"github.com/gomlx/gomlx/backends"
	"github.com/gomlx/gomlx/backends/simplego"
	"github.com/gomlx/gomlx/pkg/core/dtypes"
	"github.com/gomlx/gomlx/pkg/core/graph"
	"github.com/gomlx/gomlx/pkg/core/shapes"
	"github.com/gomlx/gomlx/pkg/core/tensors"
	"github.com/gomlx/gomlx/pkg/ml/context"
	"github.com/gomlx/onnx-gomlx/onnx"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// maxShapes bounds the graphs a session keeps: GoMLX compiles one for each combination of input shapes and outputs.
const maxShapes = 16

var datatypes = map[dtypes.DType]oip.Datatype{
	dtypes.Bool: oip.Bool, dtypes.Uint8: oip.Uint8, dtypes.Uint16: oip.Uint16, dtypes.Uint32: oip.Uint32, dtypes.Uint64: oip.Uint64,
	dtypes.Int8: oip.Int8, dtypes.Int16: oip.Int16, dtypes.Int32: oip.Int32, dtypes.Int64: oip.Int64,
	dtypes.Float16: oip.FP16, dtypes.Float32: oip.FP32, dtypes.Float64: oip.FP64,
}

// Engine is GoMLX with its pure Go backend. Safe for concurrent use.
type Engine struct{ version string }

// Open returns the engine.
func Open() (*Engine, error) {
	e := &Engine{version: "unknown"}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == "github.com/gomlx/gomlx" {
				e.version = m.Version
			}
		}
	}
	return e, nil
}

// Name implements engine.Engine.
func (e *Engine) Name() string { return "gomlx" }

// Version implements engine.Engine.
func (e *Engine) Version() string { return e.version }

// Load implements engine.Engine. GoMLX reports many mistakes in a model by panicking; they become errors.
func (e *Engine) Load(model []byte, o engine.Options) (s engine.Session, err error) {
	defer recovered(&err)
	// One thread means the goroutine of the caller; the backend knows no other count.
	config := "ops_sequential"
	if o.Threads > 1 {
		config = ""
	}
	backend, err := simplego.New(config)
	if err != nil {
		return nil, err
	}
	m, err := onnx.Parse(model)
	if err != nil {
		return nil, err
	}
	if err := checkWeights(m); err != nil {
		return nil, err
	}
	n := &session{model: m, backend: backend, variables: context.New()}
	if err := m.VariablesToContext(n.variables); err != nil {
		return nil, err
	}
	n.variables = n.variables.Reuse()
	if n.inputs, err = describe(m.Inputs()); err != nil {
		return nil, err
	}
	if n.outputs, err = describe(m.Outputs()); err != nil {
		return nil, err
	}
	n.reset()
	return n, nil
}

// checkWeights refuses weights that claim to be larger than what the file holds: GoMLX would reserve the memory first,
// and Go can't recover from memory that is not there.
func checkWeights(m *onnx.Model) error {
	for _, w := range m.Proto.Graph.Initializer {
		n, err := oip.Elements(w.Dims)
		if err == nil && w.RawData != nil && n > int64(len(w.RawData)) {
			err = fmt.Errorf("%d elements in %d bytes", n, len(w.RawData))
		}
		if err != nil {
			return fmt.Errorf("weights %q: %w", w.Name, err)
		}
	}
	return nil
}

func describe(names []string, shapes []onnx.DynamicShape) ([]oip.TensorMetadata, error) {
	out := make([]oip.TensorMetadata, len(names))
	for i, name := range names {
		d, ok := datatypes[shapes[i].DType]
		if !ok {
			return nil, fmt.Errorf("tensor %q: %s has no datatype in the Open Inference Protocol", name, shapes[i].DType)
		}
		out[i] = oip.TensorMetadata{Name: name, Datatype: d, Shape: []int64{}}
		for _, n := range shapes[i].Dimensions {
			out[i].Shape = append(out[i].Shape, int64(n))
		}
	}
	return out, nil
}

type session struct {
	model           *onnx.Model
	backend         backends.Backend
	variables       *context.Context
	inputs, outputs []oip.TensorMetadata

	// mu serializes inference: the backend shares buffers and the box has few cores.
	mu sync.Mutex
	// exec runs the graphs, at most maxShapes; known are their keys.
	exec  *context.Exec
	known map[string]bool
}

// reset forgets all compiled graphs.
func (s *session) reset() {
	if s.exec != nil {
		s.exec.Finalize()
	}
	s.exec, s.known = nil, map[string]bool{}
}

func (s *session) Inputs() []oip.TensorMetadata  { return s.inputs }
func (s *session) Outputs() []oip.TensorMetadata { return s.outputs }

func (s *session) Close() {
	s.reset()
	s.backend.Finalize()
}

func (s *session) Run(inputs []oip.Tensor, outputs []string) (results []oip.Tensor, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer recovered(&err)
	args := make([]any, len(s.inputs))
	defer func() {
		for _, a := range args {
			if t, ok := a.(*tensors.Tensor); ok {
				err = errors.Join(err, t.FinalizeAll())
			}
		}
	}()
	key := ""
	for i, in := range s.inputs {
		k := slices.IndexFunc(inputs, func(t oip.Tensor) bool { return t.Name == in.Name })
		t, err := tensorOf(&inputs[k])
		if err != nil {
			return nil, fmt.Errorf("input %q: %w", in.Name, err)
		}
		args[i] = t
		key += fmt.Sprint(inputs[k].Shape)
	}
	if !s.known[key] && len(s.known) == maxShapes {
		s.reset()
	}
	if s.exec == nil {
		if s.exec, err = context.NewExec(s.backend, s.variables, s.graph); err != nil {
			return nil, err
		}
	}
	s.known[key] = true
	// All outputs are computed, so that the choice of outputs needs no graph of its own.
	all, err := s.exec.Exec(args...)
	if err != nil {
		// The model passed its warm-up, so it is these shapes that it can't do.
		return nil, &engine.InputError{Err: err}
	}
	for i, t := range all {
		if slices.Contains(outputs, s.outputs[i].Name) {
			r, err := resultOf(s.outputs[i].Name, t)
			if err != nil {
				return nil, err
			}
			results = append(results, r)
		}
		if err := t.FinalizeAll(); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(results, func(a, b oip.Tensor) int {
		return slices.Index(outputs, a.Name) - slices.Index(outputs, b.Name)
	})
	return results, nil
}

// graph builds the computation for one combination of input shapes.
func (s *session) graph(ctx *context.Context, inputs []*graph.Node) []*graph.Node {
	byName := make(map[string]*graph.Node, len(inputs))
	for i, in := range s.inputs {
		byName[in.Name] = inputs[i]
	}
	return s.model.CallGraph(ctx, inputs[0].Graph(), byName)
}

func tensorOf(t *oip.Tensor) (*tensors.Tensor, error) {
	shape := shapes.Shape{Dimensions: make([]int, len(t.Shape))}
	for d, name := range datatypes {
		if name == t.Datatype {
			shape.DType = d
		}
	}
	for i, n := range t.Shape {
		if n == 0 {
			return nil, &engine.InputError{Err: errors.New("GoMLX takes no tensor without elements")}
		}
		shape.Dimensions[i] = int(n)
	}
	out := tensors.FromShape(shape)
	return out, out.MutableBytes(func(data []byte) { copy(data, t.Data) })
}

func resultOf(name string, t *tensors.Tensor) (oip.Tensor, error) {
	out := oip.Tensor{Name: name, Datatype: datatypes[t.DType()], Shape: []int64{}}
	for _, n := range t.Shape().Dimensions {
		out.Shape = append(out.Shape, int64(n))
	}
	err := t.ConstBytes(func(data []byte) { out.Data = slices.Clone(data) })
	if err == nil && !out.Datatype.Valid() {
		err = fmt.Errorf("%s has no datatype in the Open Inference Protocol", t.DType())
	}
	if err != nil {
		return oip.Tensor{}, fmt.Errorf("output %q: %w", name, err)
	}
	return out, nil
}

func recovered(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("GoMLX: %v", p)
	}
}
