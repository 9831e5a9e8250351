package oip

import (
	"fmt"
	"slices"
	"strings"
)

// TensorMetadata describes an input or output of a model; a dimension of -1 may have any size.
type TensorMetadata struct {
	Name     string   `json:"name"`
	Datatype Datatype `json:"datatype"`
	Shape    []int64  `json:"shape"`
}

// Metadata describes a model ($metadata_model_response).
type Metadata struct {
	Name     string           `json:"name"`
	Versions []string         `json:"versions,omitempty"`
	Platform string           `json:"platform"`
	Inputs   []TensorMetadata `json:"inputs"`
	Outputs  []TensorMetadata `json:"outputs"`
}

// ServerMetadata describes a server ($metadata_server_response).
type ServerMetadata struct {
	Name       string   `json:"name"`
	Version    string   `json:"version"`
	Extensions []string `json:"extensions"`
}

// BinaryExtension is the name of the binary tensor data extension in ServerMetadata.
const BinaryExtension = "binary_tensor_data"

// Error is the body of every failed request ($inference_error_response and its kin).
type Error struct {
	Error string `json:"error"`
}

// Check reports whether the model takes the request: every input once, with the model's datatype and a shape that fits,
// the data as large as the shape says, and no output the model does not have.
func (m *Metadata) Check(r *InferRequest) error {
	seen := make(map[string]bool, len(r.Inputs))
	for i := range r.Inputs {
		t := &r.Inputs[i]
		k := slices.IndexFunc(m.Inputs, func(in TensorMetadata) bool { return in.Name == t.Name })
		switch {
		case k < 0:
			return fmt.Errorf("the model has no input %q; it has %s", t.Name, names(m.Inputs))
		case seen[t.Name]:
			return fmt.Errorf("input %q is given twice", t.Name)
		case t.Datatype != m.Inputs[k].Datatype:
			return fmt.Errorf("input %q: datatype is %s, the model takes %s", t.Name, t.Datatype, m.Inputs[k].Datatype)
		case !fits(t.Shape, m.Inputs[k].Shape):
			return fmt.Errorf("input %q: shape is %v, the model takes %v (-1: any size)", t.Name, t.Shape, m.Inputs[k].Shape)
		}
		if err := t.Check(); err != nil {
			return fmt.Errorf("input %q: %w", t.Name, err)
		}
		seen[t.Name] = true
	}
	for _, in := range m.Inputs {
		if !seen[in.Name] {
			return fmt.Errorf("input %q is missing", in.Name)
		}
	}
	for i, o := range r.Outputs {
		if !slices.ContainsFunc(m.Outputs, func(out TensorMetadata) bool { return out.Name == o.Name }) {
			return fmt.Errorf("the model has no output %q; it has %s", o.Name, names(m.Outputs))
		}
		if slices.ContainsFunc(r.Outputs[:i], func(p RequestedOutput) bool { return p.Name == o.Name }) {
			return fmt.Errorf("output %q is asked for twice", o.Name)
		}
	}
	return nil
}

func fits(shape, want []int64) bool {
	return slices.EqualFunc(shape, want, func(s, w int64) bool { return w < 0 && s >= 0 || s == w })
}

func names(ts []TensorMetadata) string {
	var out []string
	for _, t := range ts {
		out = append(out, fmt.Sprintf("%q", t.Name))
	}
	return strings.Join(out, ", ")
}
