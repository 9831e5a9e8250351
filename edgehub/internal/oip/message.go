package oip

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// HeaderLength is the HTTP header with the size of the JSON part in bytes, where binary tensors follow it.
const HeaderLength = "Inference-Header-Content-Length"

// RequestedOutput names an output tensor to return.
type RequestedOutput struct {
	Name string
	// Binary asks for the binary form.
	Binary bool
}

// InferRequest asks for one inference.
type InferRequest struct {
	// ID comes back in the response.
	ID     string
	Inputs []Tensor
	// Outputs to return; none means all.
	Outputs []RequestedOutput
	// BinaryOutput asks for the binary form of all outputs that Outputs does not name.
	BinaryOutput bool
}

// InferResponse is the result of one inference.
type InferResponse struct {
	ModelName    string
	ModelVersion string
	ID           string
	Outputs      []Tensor
}

// The JSON forms. Parameters the protocol does not define are allowed and ignored.
type (
	wireTensor struct {
		Name       string            `json:"name"`
		Shape      []int64           `json:"shape"`
		Datatype   Datatype          `json:"datatype"`
		Parameters *tensorParameters `json:"parameters,omitempty"`
		Data       json.RawMessage   `json:"data,omitempty"`
	}
	tensorParameters struct {
		BinaryDataSize *int64 `json:"binary_data_size,omitempty"`
	}
	wireOutput struct {
		Name       string           `json:"name"`
		Parameters outputParameters `json:"parameters,omitzero"`
	}
	outputParameters struct {
		BinaryData *bool `json:"binary_data,omitempty"`
	}
	wireRequest struct {
		ID         string            `json:"id,omitempty"`
		Parameters requestParameters `json:"parameters,omitzero"`
		Inputs     []wireTensor      `json:"inputs"`
		Outputs    []wireOutput      `json:"outputs,omitempty"`
	}
	requestParameters struct {
		BinaryDataOutput bool `json:"binary_data_output,omitempty"`
	}
	wireResponse struct {
		ModelName    string       `json:"model_name"`
		ModelVersion string       `json:"model_version,omitempty"`
		ID           string       `json:"id,omitempty"`
		Outputs      []wireTensor `json:"outputs"`
	}
)

// DecodeRequest reads the body of an infer request. header is the value of the HeaderLength header, "" where it is
// absent. Its errors are the client's fault and say what is wrong with which tensor. Data of binary tensors shares
// memory with body.
func DecodeRequest(body []byte, header string) (*InferRequest, error) {
	text, binary, err := split(body, header)
	if err != nil {
		return nil, err
	}
	var w wireRequest
	if err := decodeJSON(text, &w); err != nil {
		return nil, fmt.Errorf("inference request: %w", err)
	}
	if len(w.Inputs) == 0 {
		return nil, errors.New(`inference request has no "inputs"`)
	}
	r := &InferRequest{ID: w.ID, BinaryOutput: w.Parameters.BinaryDataOutput}
	if r.Inputs, err = decodeTensors("input", w.Inputs, binary); err != nil {
		return nil, err
	}
	for _, o := range w.Outputs {
		b := r.BinaryOutput
		if o.Parameters.BinaryData != nil {
			b = *o.Parameters.BinaryData
		}
		r.Outputs = append(r.Outputs, RequestedOutput{Name: o.Name, Binary: b})
	}
	return r, nil
}

// Encode writes the request with binary tensors. header is the value for the HeaderLength header.
func (r *InferRequest) Encode() (body []byte, header string, err error) {
	w := wireRequest{ID: r.ID, Parameters: requestParameters{BinaryDataOutput: r.BinaryOutput}}
	for _, o := range r.Outputs {
		w.Outputs = append(w.Outputs, wireOutput{Name: o.Name, Parameters: outputParameters{BinaryData: &o.Binary}})
	}
	w.Inputs = make([]wireTensor, len(r.Inputs))
	for i := range r.Inputs {
		w.Inputs[i] = binaryTensor(&r.Inputs[i])
	}
	text, err := json.Marshal(w)
	if err != nil {
		return nil, "", fmt.Errorf("encode inference request: %w", err)
	}
	return appendBinary(text, r.Inputs, func(int) bool { return true }), strconv.Itoa(len(text)), nil
}

// DecodeResponse reads the body of a successful infer response; header is the value of its HeaderLength header, "" where
// it is absent.
func DecodeResponse(body []byte, header string) (*InferResponse, error) {
	text, binary, err := split(body, header)
	if err != nil {
		return nil, err
	}
	var w wireResponse
	if err := decodeJSON(text, &w); err != nil {
		return nil, fmt.Errorf("inference response: %w", err)
	}
	r := &InferResponse{ModelName: w.ModelName, ModelVersion: w.ModelVersion, ID: w.ID}
	r.Outputs, err = decodeTensors("output", w.Outputs, binary)
	return r, err
}

// Encode writes the response, each output in the form that request asked for. header is "" where no tensor is binary.
func (r *InferResponse) Encode(request *InferRequest) (body []byte, header string, err error) {
	isBinary := func(i int) bool {
		for _, o := range request.Outputs {
			if o.Name == r.Outputs[i].Name {
				return o.Binary
			}
		}
		return request.BinaryOutput
	}
	w := wireResponse{ModelName: r.ModelName, ModelVersion: r.ModelVersion, ID: r.ID}
	w.Outputs = make([]wireTensor, len(r.Outputs))
	anyBinary := false
	for i := range r.Outputs {
		t := &r.Outputs[i]
		if isBinary(i) {
			w.Outputs[i] = binaryTensor(t)
			anyBinary = true
			continue
		}
		n, err := Elements(t.Shape)
		if err != nil {
			return nil, "", fmt.Errorf("encode output %q: %w", t.Name, err)
		}
		data, err := appendJSON(nil, t, []int64{n})
		if err != nil {
			return nil, "", fmt.Errorf("encode output %q: %w", t.Name, err)
		}
		w.Outputs[i] = wireTensor{Name: t.Name, Shape: t.Shape, Datatype: t.Datatype, Data: data}
	}
	text, err := json.Marshal(w)
	if err != nil {
		return nil, "", fmt.Errorf("encode inference response: %w", err)
	}
	if !anyBinary {
		return text, "", nil
	}
	return appendBinary(text, r.Outputs, isBinary), strconv.Itoa(len(text)), nil
}

// split cuts a body into its JSON part and the binary tensors after it.
func split(body []byte, header string) (text, binary []byte, err error) {
	if header == "" {
		return body, nil, nil
	}
	n, err := strconv.ParseInt(header, 10, 64)
	if err != nil || n <= 0 || n > int64(len(body)) {
		return nil, nil, fmt.Errorf("%s is %q, with a body of %d bytes", HeaderLength, header, len(body))
	}
	return body[:n], body[n:], nil
}

// decodeJSON reads exactly one JSON value.
func decodeJSON(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("malformed JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("malformed JSON: more follows after the first value")
	}
	return nil
}

func decodeTensors(kind string, ws []wireTensor, binary []byte) ([]Tensor, error) {
	out := make([]Tensor, len(ws))
	for i, w := range ws {
		t := Tensor{Name: w.Name, Datatype: w.Datatype, Shape: w.Shape}
		if t.Shape == nil {
			return nil, fmt.Errorf(`%s %q has no "shape"`, kind, w.Name)
		}
		if !t.Datatype.Valid() {
			return nil, fmt.Errorf("%s %q: %q is not a datatype of the Open Inference Protocol", kind, w.Name, w.Datatype)
		}
		var err error
		switch {
		case w.Parameters != nil && w.Parameters.BinaryDataSize != nil:
			n := *w.Parameters.BinaryDataSize
			switch {
			case w.Data != nil:
				err = errors.New("both data and binary_data_size are given")
			case n < 0 || n > int64(len(binary)):
				err = fmt.Errorf("binary_data_size is %d, but %d bytes are left after the JSON (the %s header says where they begin)",
					n, len(binary), HeaderLength)
			default:
				t.Data, binary = binary[:n:n], binary[n:]
				err = t.Check()
			}
		case w.Data == nil:
			err = errors.New(`"data" is missing`)
		default:
			t.Data, err = parseData(t.Datatype, t.Shape, w.Data)
		}
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", kind, w.Name, err)
		}
		out[i] = t
	}
	if len(binary) > 0 {
		return nil, fmt.Errorf("%d bytes follow the last binary %s", len(binary), kind)
	}
	return out, nil
}

func binaryTensor(t *Tensor) wireTensor {
	n := int64(len(t.Data))
	return wireTensor{Name: t.Name, Shape: t.Shape, Datatype: t.Datatype, Parameters: &tensorParameters{BinaryDataSize: &n}}
}

func appendBinary(text []byte, ts []Tensor, isBinary func(int) bool) []byte {
	for i := range ts {
		if isBinary(i) {
			text = append(text, ts[i].Data...)
		}
	}
	return text
}
