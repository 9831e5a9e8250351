package onnxfile

import (
	"bytes"
	"reflect"
	"testing"
)

var model = Model{Name: "m", Opset: 13,
	Inputs:     []Value{{Name: "x", Type: Float, Shape: []int64{-1, 2}}},
	Outputs:    []Value{{Name: "y", Type: Float, Shape: []int64{-1, 2}}},
	Weights:    []Tensor{Floats("w", []int64{2}, []float32{1, 2}), Int64s("shape", -1, 2)},
	Properties: []Property{{"version", "1"}},
	Nodes: []Node{
		{Op: "Mul", In: []string{"x", "w"}, Out: []string{"z"}},
		{Op: "Mul", In: []string{"z", "w"}, Out: []string{"v"}},
		{Op: "Reshape", In: []string{"v", "shape"}, Out: []string{"y"}, Attributes: []Attribute{{Name: "allowzero", Int: 1}, {Name: "none", Ints: []int64{1, 2}}}}}}

// The digest of a model is what edges compare: writing the same model twice must give the same file. That engines read
// these files is tested with the engines.
func TestMarshalRepeats(t *testing.T) {
	a, b := model.Marshal(), model.Marshal()
	if !bytes.Equal(a, b) {
		t.Error("the same model has two forms")
	}
	if got, want := Operators(a), map[string]int{"Mul": 2, "Reshape": 1}; !reflect.DeepEqual(got, want) {
		t.Errorf("operators are %v, want %v", got, want)
	}
}

// Files come from anywhere: looking into a damaged one must end, whatever is in it.
func FuzzOperators(f *testing.F) {
	f.Add(model.Marshal())
	f.Add([]byte("\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"))
	f.Fuzz(func(t *testing.T, b []byte) {
		nodes, size := 0, 0
		for name, n := range Operators(b) {
			nodes, size = nodes+n, size+len(name)
		}
		if nodes > len(b) || size > len(b) {
			t.Fatalf("%d nodes with names of %d bytes in a file of %d", nodes, size, len(b))
		}
	})
}
