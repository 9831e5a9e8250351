package oip

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The example of the specification must decode as it stands, or no standard client works. (Its BOOL input says shape [3]
// with one element, which is an error here: the shape is what the model gets.)
func TestDecodeSpecificationExample(t *testing.T) {
	body := `{"id":"42","parameters":{"anything":true},"inputs":[
	  {"name":"input0","shape":[2,2],"datatype":"UINT32","data":[1,2,3,4]},
	  {"name":"input1","shape":[3],"datatype":"BOOL","data":[true, false,true]}],
	  "outputs":[{"name":"output0"}]}`
	r, err := DecodeRequest([]byte(body), "")
	if err != nil {
		t.Fatal(err)
	}
	want := &InferRequest{ID: "42", Inputs: []Tensor{
		{Name: "input0", Datatype: Uint32, Shape: []int64{2, 2}, Data: []byte{1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0}},
		{Name: "input1", Datatype: Bool, Shape: []int64{3}, Data: []byte{1, 0, 1}},
	}, Outputs: []RequestedOutput{{Name: "output0"}}}
	if !reflect.DeepEqual(r, want) {
		t.Fatalf("got %+v, want %+v", r, want)
	}
}

// What goes in must come out, in JSON and in binary, for every datatype: otherwise a sensor's values change on the way.
func TestRoundTripOfEveryDatatype(t *testing.T) {
	data := map[Datatype]string{
		Bool: `[true,false,true,false]`, Uint8: `[0,1,254,255]`, Uint16: `[0,1,2,65535]`, Uint32: `[0,1,2,4294967295]`,
		Uint64: `[0,1,2,18446744073709551615]`, Int8: `[-128,-1,0,127]`, Int16: `[-32768,-1,0,32767]`,
		Int32: `[-2147483648,-1,0,2147483647]`, Int64: `[-9223372036854775808,-1,0,9223372036854775807]`,
		FP16: `[0,-1.5,0.25,65504]`, FP32: `[0,-1.5,3.4028235e+38,1e-45]`, FP64: `[0,-1.5,1.7976931348623157e+308,5e-324]`,
		Bytes: `["","a","quote \" and ] and \\","über"]`,
	}
	if len(data) != 13 {
		t.Fatal("a datatype is missing here")
	}
	for d, text := range data {
		in := `{"inputs":[{"name":"x","shape":[2,2],"datatype":"` + string(d) + `","data":` + text + `}]}`
		r, err := DecodeRequest([]byte(in), "")
		if err != nil {
			t.Errorf("%s: %v", d, err)
			continue
		}
		// Binary request.
		body, header, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeRequest(body, header)
		if err != nil || !reflect.DeepEqual(again.Inputs, r.Inputs) {
			t.Errorf("%s: binary request: %v, %+v", d, err, again)
		}
		// JSON and binary response.
		for _, binary := range []bool{false, true} {
			resp := &InferResponse{ModelName: "m", ModelVersion: "1", ID: "7", Outputs: r.Inputs}
			body, header, err := resp.Encode(&InferRequest{BinaryOutput: binary})
			if err != nil || (header != "") != binary {
				t.Fatalf("%s: %q %v", d, header, err)
			}
			got, err := DecodeResponse(body, header)
			if err != nil || !reflect.DeepEqual(got, resp) {
				t.Errorf("%s: response (binary %v): %v\n got %+v\nwant %+v", d, binary, err, got, resp)
			}
			if !binary && !bytes.Contains(body, []byte(`"data":`+text)) {
				t.Errorf("%s: %s lacks %s", d, body, text)
			}
		}
	}
}

// A bad request must be refused with words that name the tensor and the mistake; an installer has nothing else to go by.
func TestBadRequestsSayWhatIsWrong(t *testing.T) {
	x := func(shape, datatype, data string) string {
		return `{"inputs":[{"name":"x","shape":` + shape + `,"datatype":"` + datatype + `","data":` + data + `}]}`
	}
	for _, c := range []struct{ body, header, want string }{
		{`{`, "", "malformed JSON"},
		{`[]`, "", "malformed JSON"},
		{`{} {}`, "", "more follows"},
		{`{"inputs":[]}`, "", `no "inputs"`},
		{x(`[2]`, "FLOAT", `[1,2]`), "", `"FLOAT" is not a datatype`},
		{x(`[2]`, "FP32", `[1,2,3]`), "", `input "x": shape [2] needs 2 elements, the data has 3`},
		{x(`[2,2]`, "FP32", `[[1,2],[3]]`), "", "a row of 1 beside one of 2"},
		{x(`[2,2]`, "FP32", `[[1,2],3]`), "", "nested unevenly"},
		{x(`[2,2]`, "FP32", `[[1,2],[3,[4]]]`), "", "element 3: an array or object"},
		{x(`[2,2]`, "FP32", `[[[1]]]`), "", "nested as [1 1 1]"},
		{x(`[2]`, "FP32", `{"a":1}`), "", "not a JSON array"},
		{x(`[2]`, "FP32", `[1,null]`), "", "element 1: null is not a number"},
		{x(`[2]`, "FP32", `[1,"2"]`), "", `element 1: "2" is not a number`},
		{x(`[1]`, "FP32", `[1e39]`), "", "does not fit into FP32"},
		{x(`[1]`, "FP16", `[65520]`), "", "does not fit into FP16"},
		{x(`[1]`, "INT8", `[128]`), "", "128 does not fit into INT8"},
		{x(`[1]`, "UINT8", `[-1]`), "", "-1 is not an integer that fits into UINT8"},
		{x(`[1]`, "INT32", `[1.5]`), "", "1.5 is not an integer"},
		{x(`[1]`, "BOOL", `[1]`), "", "1 is not true or false"},
		{x(`[1]`, "BYTES", `[1]`), "", "1 is not a string"},
		{x(`[-1]`, "FP32", `[1]`), "", "negative dimension"},
		{x(`[4611686018427387904,4]`, "FP32", `[1]`), "", "too large"},
		{`{"inputs":[{"name":"x","datatype":"FP32","data":[1]}]}`, "", `no "shape"`},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"FP32"}]}`, "", `"data" is missing`},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}}]}`, "", "0 bytes are left"},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":3}}]}abc`, "91", "needs 4 bytes, the data has 3"},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}}]}abcde`, "91", "1 bytes follow"},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"BOOL","parameters":{"binary_data_size":1}}]}a`, "91", "a BOOL is 0 or 1"},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}` + "\x09\x00\x00\x00a", "92", "ends inside an element"},
		{`{}`, "9", "with a body of 2 bytes"},
		{`{}`, "-1", "with a body of 2 bytes"},
		{`{}`, "x", "with a body of 2 bytes"},
	} {
		if _, err := DecodeRequest([]byte(c.body), c.header); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s\n got %v\nwant %s", c.body, err, c.want)
		}
	}
}

var bearing = Metadata{Name: "bearing",
	Inputs:  []TensorMetadata{{Name: "vibration", Datatype: FP32, Shape: []int64{-1, 4}}},
	Outputs: []TensorMetadata{{Name: "probabilities", Datatype: FP32, Shape: []int64{-1, 2}}}}

// A request that does not fit must be stopped before the engine sees it, with the model's own needs in the message.
func TestCheckHoldsRequestToModel(t *testing.T) {
	good := func() *InferRequest {
		return &InferRequest{Inputs: []Tensor{FP32Tensor("vibration", []int64{1, 4}, []float32{1, 2, 3, 4})}}
	}
	for _, c := range []struct {
		change func(*InferRequest)
		want   string
	}{
		{func(*InferRequest) {}, ""},
		{func(r *InferRequest) { r.Outputs = []RequestedOutput{{Name: "probabilities"}} }, ""},
		{func(r *InferRequest) { r.Inputs[0].Name = "y" }, `no input "y"; it has "vibration"`},
		{func(r *InferRequest) { r.Inputs = nil }, `input "vibration" is missing`},
		{func(r *InferRequest) { r.Inputs = append(r.Inputs, r.Inputs[0]) }, "given twice"},
		{func(r *InferRequest) { r.Inputs[0].Datatype = Int32 }, "datatype is INT32, the model takes FP32"},
		{func(r *InferRequest) { r.Inputs[0].Shape = []int64{4} }, "shape is [4], the model takes [-1 4]"},
		{func(r *InferRequest) { r.Inputs[0].Shape = []int64{2, 4} }, "needs 32 bytes, the data has 16"},
		{func(r *InferRequest) { r.Outputs = []RequestedOutput{{Name: "z"}} }, `no output "z"`},
		{func(r *InferRequest) {
			r.Outputs = []RequestedOutput{{Name: "probabilities"}, {Name: "probabilities"}}
		}, "asked for twice"},
	} {
		r := good()
		c.change(r)
		err := bearing.Check(r)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

// Devices send what their firmware can: each of these forms must reach the model as the same numbers.
func TestFromDeviceForms(t *testing.T) {
	for _, c := range []struct {
		payload string
		shape   []int64
		id      string
	}{
		{`[1,2,3,4]`, []int64{1, 4}, ""},
		{` [[1,2,3,4]] `, []int64{1, 4}, ""},
		{`[1,2,3,4,5,6,7,8]`, []int64{2, 4}, ""},
		{`[[1,2,3,4],[5,6,7,8]]`, []int64{2, 4}, ""},
		{`{"seq":12,"id":"a7","values":[1,2,3,4],"unit":"g"}`, []int64{1, 4}, "a7"},
		{`{"id":12,"values":[1,2,3,4]}`, []int64{1, 4}, "12"},
		{`{"id":"q","inputs":[{"name":"vibration","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}`, []int64{1, 4}, "q"},
	} {
		r, err := FromDevice([]byte(c.payload), bearing)
		if err != nil {
			t.Errorf("%s: %v", c.payload, err)
			continue
		}
		if !reflect.DeepEqual(r.Inputs[0].Shape, c.shape) || r.ID != c.id || !r.BinaryOutput {
			t.Errorf("%s: %+v", c.payload, r)
		}
		for i, f := range r.Inputs[0].Float32s() {
			if f != float32(i+1) {
				t.Errorf("%s: element %d is %v", c.payload, i, f)
			}
		}
	}
}

// Shapes with more freedom: the flat form must choose the only sensible shape, or say that it can't.
func TestFromDeviceShapes(t *testing.T) {
	for _, c := range []struct {
		want    []int64
		payload string
		shape   []int64
		err     string
	}{
		{[]int64{1}, `21.5`, []int64{1}, ""},
		{[]int64{-1, 1}, `-3`, []int64{1, 1}, ""},
		{[]int64{}, `7`, []int64{}, ""},
		{[]int64{-1}, `[1,2,3]`, []int64{3}, ""},
		{[]int64{-1, -1}, `[1,2,3]`, []int64{1, 3}, ""},
		{[]int64{-1, 2, 2}, `[[1,2],[3,4]]`, []int64{1, 2, 2}, ""},
		{[]int64{-1, -1, -1}, `[1,2]`, nil, "does not say which shape"},
		{[]int64{-1, 4}, `[1,2,3]`, nil, "a multiple of 4"},
		{[]int64{4}, `[1,2,3]`, nil, "got 3 values, the model takes [4]"},
		{[]int64{-1, 4}, `[]`, nil, "a multiple of 4"},
		{[]int64{2, 2, 2}, `[[1,2],[3,4]]`, nil, "values are nested as [2 2]"},
		{[]int64{-1, 4}, `[[1,2,3]]`, nil, "shape is [1 3]"},
	} {
		m := Metadata{Inputs: []TensorMetadata{{Name: "x", Datatype: FP32, Shape: c.want}}}
		r, err := FromDevice([]byte(c.payload), m)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%v %s: got %v, want %q", c.want, c.payload, err, c.err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(r.Inputs[0].Shape, c.shape) {
			t.Errorf("%v %s: %v %+v, want %v", c.want, c.payload, err, r, c.shape)
		}
	}
}

// A payload the model can't take must turn into an error a technician understands, never into a wrong inference.
func TestFromDeviceErrors(t *testing.T) {
	two := Metadata{Inputs: []TensorMetadata{{Name: "a", Datatype: FP32, Shape: []int64{1}}, {Name: "b", Datatype: FP32, Shape: []int64{1}}}}
	for _, c := range []struct {
		payload string
		meta    Metadata
		want    string
	}{
		{``, bearing, "empty"},
		{"\xff\x00garbage", bearing, "not JSON"},
		{`[1,2`, bearing, "not JSON"},
		{`"text"`, bearing, "neither an object nor an array"},
		{`true`, bearing, "neither an object nor an array"},
		{`{"value":[1]}`, bearing, `neither "values" nor "inputs"`},
		{`{"values":5}`, bearing, "not a JSON array"},
		{`{"values":null}`, bearing, "not a JSON array"},
		{`[1,2,3,"x"]`, bearing, `input "vibration": element 3: "x" is not a number`},
		{`[1,2,3,{}]`, bearing, "an array or object"},
		{`[1]`, two, `the model has 2 inputs ("a", "b")`},
		{`{"inputs":[]}`, bearing, `no "inputs"`},
		{`{"inputs":[{"name":"vibration","shape":[1,3],"datatype":"FP32","data":[1,2,3]}]}`, bearing, "the model takes [-1 4]"},
	} {
		if _, err := FromDevice([]byte(c.payload), c.meta); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.payload, err, c.want)
		}
	}
}

// The result is what a small device must be able to parse; NaN must not make it invalid JSON.
func TestToDevice(t *testing.T) {
	r := &InferResponse{ModelName: "bearing", ModelVersion: "2", ID: "a7", Outputs: []Tensor{
		FP32Tensor("p", []int64{1, 3}, []float32{0.25, 1, float32(math.NaN())}),
		FP32Tensor("q", []int64{2, 2}, []float32{1, 2, 3, 4}),
		{Name: "label", Datatype: Bytes, Shape: []int64{1}, Data: AppendString(nil, "inner race")},
		{Name: "none", Datatype: Int64, Shape: []int64{0, 3}},
	}}
	d, err := ToDevice(r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(d)
	want := `{"model":"bearing","version":"2","id":"a7","outputs":{"label":["inner race"],"none":[],"p":[0.25,1,null],"q":[[1,2],[3,4]]}}`
	if err != nil || string(got) != want {
		t.Fatalf("got  %s, %v\nwant %s", got, err, want)
	}
	r.Outputs[0].Shape = []int64{9}
	if _, err := ToDevice(r); err == nil {
		t.Fatal("a tensor whose data does not fit its shape must be refused")
	}
}

// Whatever bytes a client or device sends: an error or a sound request, never a panic.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"inputs":[{"name":"vibration","shape":[1,4],"datatype":"FP32","data":[[1,2,3,4]]}]}`), "")
	f.Add([]byte(`{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}....."`), "87")
	f.Add([]byte(`{"values":[1,2,[3],"\"]"]}`), "")
	f.Fuzz(func(t *testing.T, body []byte, header string) {
		if r, err := DecodeRequest(body, header); err == nil {
			for i := range r.Inputs {
				if err := r.Inputs[i].Check(); err != nil {
					t.Fatal(err)
				}
			}
			body, header, err := r.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if again, err := DecodeRequest(body, header); err != nil || !sameTensors(again.Inputs, r.Inputs) || again.ID != r.ID {
				t.Fatalf("%+v comes out of the binary form as %+v, %v", r, again, err)
			}
		}
		if r, err := FromDevice(body, bearing); err == nil {
			if err := bearing.Check(r); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func sameTensors(a, b []Tensor) bool {
	return slices.EqualFunc(a, b, func(a, b Tensor) bool {
		return a.Name == b.Name && a.Datatype == b.Datatype && slices.Equal(a.Shape, b.Shape) && bytes.Equal(a.Data, b.Data)
	})
}

// A model server in a pod is foreign code: whatever it answers, a device gets an error or sound JSON, of a size that the answer
// bounds.
func FuzzDecodeResponse(f *testing.F) {
	f.Add([]byte(`{"model_name":"m","outputs":[{"name":"y","shape":[1,2],"datatype":"FP32","data":[1,2.5]}]}`), "")
	f.Add([]byte(`{"outputs":[{"name":"y","shape":[2],"datatype":"BYTES","parameters":{"binary_data_size":9}}]}\x01\x00\x00\x00\xff\x00\x00\x00\x00`), "90")
	f.Add([]byte(`{"outputs":[{"name":"y","shape":[0,9223372036854775807],"datatype":"INT8","data":[]}]}`), "")
	f.Add([]byte(`{"outputs":[{"name":"y","shape":[1,1,1,1,1,1,1,1,1],"datatype":"BOOL","data":[true]}]}`), "")
	f.Fuzz(func(t *testing.T, body []byte, header string) {
		r, err := DecodeResponse(body, header)
		if err != nil {
			return
		}
		d, err := ToDevice(r)
		if err != nil {
			return
		}
		text, err := json.Marshal(d)
		if err != nil || !json.Valid(text) {
			t.Fatalf("%s: %v", text, err)
		}
		if len(text) > 100*len(body)+1000 {
			t.Fatalf("an answer of %d bytes becomes %d", len(body), len(text))
		}
		for _, o := range r.Outputs {
			if err := o.Check(); err != nil {
				t.Fatal(err)
			}
		}
		binary, length, err := r.Encode(&InferRequest{BinaryOutput: true})
		if err != nil {
			t.Fatal(err)
		}
		if again, err := DecodeResponse(binary, length); err != nil || !sameTensors(again.Outputs, r.Outputs) {
			t.Fatalf("%+v comes out of the binary form as %+v, %v", r, again, err)
		}
	})
}

// 1,024 samples of a vibration sensor: the cost of the JSON a device sends.
func BenchmarkFromDevice(b *testing.B) {
	m := Metadata{Inputs: []TensorMetadata{{Name: "x", Datatype: FP32, Shape: []int64{-1, 1024}}}}
	values := make([]float32, 1024)
	for i := range values {
		values[i] = float32(math.Sin(float64(i)))
	}
	payload, err := json.Marshal(values)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := FromDevice(payload, m); err != nil {
			b.Fatal(err)
		}
	}
}
