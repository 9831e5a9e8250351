package oip

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// FromDevice turns the MQTT payload of a device into a request for the model. A payload is one of
//
//   - an inference request of the protocol, in JSON, exactly as it would be posted;
//   - {"values": […]}, with an optional "id" (string or number) and whatever else the device wants to say, which is ignored;
//   - […], a bare JSON array;
//   - a bare JSON number, the same as an array with one number.
//
// The short forms fit a model with exactly one input. Their array may be nested as the model's shape, nested without the
// leading batch dimension, or flat; a first dimension of any size then is the batch, and one more dimension of any size
// takes what the data has. The result has passed meta.Check, and asks for binary outputs.
func FromDevice(payload []byte, meta Metadata) (*InferRequest, error) {
	payload = bytes.TrimSpace(payload)
	if len(payload) == 0 {
		return nil, errors.New("the payload is empty")
	}
	if !json.Valid(payload) {
		return nil, errors.New("the payload is not JSON")
	}
	r, err := fromDevice(payload, &meta)
	if err != nil {
		return nil, err
	}
	r.BinaryOutput = true
	for i := range r.Outputs {
		r.Outputs[i].Binary = true
	}
	return r, meta.Check(r)
}

func fromDevice(payload []byte, meta *Metadata) (*InferRequest, error) {
	id, values := "", json.RawMessage(payload)
	switch c := payload[0]; {
	case c == '{':
		var p struct {
			ID     json.RawMessage
			Inputs json.RawMessage
			Values json.RawMessage
		}
		if err := json.Unmarshal(payload, &p); err != nil {
			return nil, fmt.Errorf("payload: %w", err)
		}
		if p.Inputs != nil {
			return DecodeRequest(payload, "")
		}
		if p.Values == nil {
			return nil, errors.New(`the payload has neither "values" nor "inputs"`)
		}
		if values, id = p.Values, string(p.ID); len(p.ID) > 0 && p.ID[0] == '"' {
			if err := json.Unmarshal(p.ID, &id); err != nil {
				return nil, fmt.Errorf("payload: id: %w", err)
			}
		}
	case c == '-' || c >= '0' && c <= '9':
		values = slices.Concat([]byte("["), payload, []byte("]"))
	case c != '[':
		return nil, errors.New("the payload is neither an object nor an array nor a number")
	}
	if len(meta.Inputs) != 1 {
		return nil, fmt.Errorf(`the model has %d inputs (%s); send an inference request with "inputs"`,
			len(meta.Inputs), names(meta.Inputs))
	}
	in := meta.Inputs[0]
	t, err := oneInput(values, in)
	if err != nil {
		return nil, fmt.Errorf("input %q: %w", in.Name, err)
	}
	return &InferRequest{ID: id, Inputs: []Tensor{t}}, nil
}

// oneInput gives an array without a shape the shape that the model takes.
func oneInput(values json.RawMessage, in TensorMetadata) (Tensor, error) {
	data, shape, err := parseArray(in.Datatype, values)
	switch want := in.Shape; {
	case err != nil:
	case len(shape) == len(want) && (len(want) > 1 || fits(shape, want)):
	case len(shape) == len(want)-1 && len(shape) > 1 && (want[0] == 1 || want[0] < 0):
		shape = append([]int64{1}, shape...)
	case len(shape) == 1:
		shape, err = resolve(shape[0], want)
	default:
		err = fmt.Errorf("values are nested as %v, the model takes %v (-1: any size)", shape, want)
	}
	return Tensor{Name: in.Name, Datatype: in.Datatype, Shape: shape, Data: data}, err
}

// resolve gives n flat elements the shape want, whose dimensions of any size it chooses.
func resolve(n int64, want []int64) ([]int64, error) {
	shape, free, known := slices.Clone(want), -1, int64(1)
	for i, d := range want {
		switch {
		case d >= 0:
			known *= d
		case free < 0:
			free = i
		case free == 0: // the batch gives way to the dimension that varies
			shape[0], free = 1, i
		default:
			return nil, fmt.Errorf("the model takes %v (-1: any size); a flat array does not say which shape is meant: "+
				"nest it, or send an inference request with \"inputs\"", want)
		}
	}
	if free >= 0 && known > 0 && n > 0 && n%known == 0 {
		shape[free], known = n/known, n
	} else if free >= 0 {
		return nil, fmt.Errorf("got %d values, the model takes %v (-1: any size), so a multiple of %d", n, want, known)
	}
	if n != known {
		return nil, fmt.Errorf("got %d values, the model takes %v, so %d", n, want, known)
	}
	return shape, nil
}

// DeviceResult is what a device gets back: small JSON, easy to read on a small machine.
//
//	{"model":"bearing","version":"2","outputs":{"probabilities":[0.01,0.97,0.01,0.01]}}
type DeviceResult struct {
	Model   string `json:"model"`
	Version string `json:"version,omitempty"`
	// ID of the request, where it had one.
	ID string `json:"id,omitempty"`
	// Outputs by name, nested as their shape; a leading batch dimension of 1 is left out. NaN and infinities are null.
	Outputs map[string]json.RawMessage `json:"outputs"`
}

// ToDevice turns a response into its compact form for output topics and telemetry.
func ToDevice(r *InferResponse) (*DeviceResult, error) {
	d := &DeviceResult{Model: r.ModelName, Version: r.ModelVersion, ID: r.ID, Outputs: map[string]json.RawMessage{}}
	for i := range r.Outputs {
		t := &r.Outputs[i]
		if err := t.Check(); err != nil {
			return nil, fmt.Errorf("output %q: %w", t.Name, err)
		}
		shape := t.Shape
		if len(shape) > 1 && shape[0] == 1 {
			shape = shape[1:]
		}
		data, err := appendJSON(nil, t, shape)
		if err != nil {
			return nil, fmt.Errorf("output %q: %w", t.Name, err)
		}
		d.Outputs[t.Name] = data
	}
	return d, nil
}
