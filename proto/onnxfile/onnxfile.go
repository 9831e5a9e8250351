// Package onnxfile writes small ONNX models, and reads the little of a model that Longshore looks at itself.
//
// It speaks the wire format of onnx.proto (github.com/onnx/onnx, onnx/onnx.proto) without generated code: a second
// generated copy of that schema in one program panics at its start, and the inference engine brings one.
package onnxfile

import (
	"encoding/binary"
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// ElementType is TensorProto.DataType.
type ElementType int64

// The element types that the Open Inference Protocol has too.
const (
	Float   ElementType = 1
	Uint8   ElementType = 2
	Int8    ElementType = 3
	Uint16  ElementType = 4
	Int16   ElementType = 5
	Int32   ElementType = 6
	Int64   ElementType = 7
	String  ElementType = 8
	Bool    ElementType = 9
	Float16 ElementType = 10
	Double  ElementType = 11
	Uint32  ElementType = 12
	Uint64  ElementType = 13
)

// Model is a graph of nodes; the first node's inputs come first.
type Model struct {
	Name string
	// Opset is the version of the default operator set.
	Opset   int64
	Inputs  []Value
	Outputs []Value
	Weights []Tensor
	Nodes   []Node
	// Properties are free text (metadata_props), for people and tools.
	Properties []Property
}

// Value is an input or output of the graph. A dimension of -1 may have any size; at the same place of the shape it is the
// same size in all values.
type Value struct {
	Name  string
	Type  ElementType
	Shape []int64
}

// Tensor is a constant; Raw holds its elements in little endian.
type Tensor struct {
	Name  string
	Type  ElementType
	Shape []int64
	Raw   []byte
}

// Node is one operator.
type Node struct {
	Op         string
	In, Out    []string
	Attributes []Attribute
}

// Attribute of a node: an int or, where Ints is set, a list of ints.
type Attribute struct {
	Name string
	Int  int64
	Ints []int64
}

// Property is a name with a value.
type Property struct{ Key, Value string }

// Floats makes a constant of 32-bit floats.
func Floats(name string, shape []int64, values []float32) Tensor {
	t := Tensor{Name: name, Type: Float, Shape: shape}
	for _, v := range values {
		t.Raw = binary.LittleEndian.AppendUint32(t.Raw, math.Float32bits(v))
	}
	return t
}

// Int64s makes a constant of 64-bit integers, one-dimensional.
func Int64s(name string, values ...int64) Tensor {
	t := Tensor{Name: name, Type: Int64, Shape: []int64{int64(len(values))}}
	for _, v := range values {
		t.Raw = binary.LittleEndian.AppendUint64(t.Raw, uint64(v))
	}
	return t
}

// message is a protobuf message being written.
type message []byte

func (m *message) int(field protowire.Number, v int64) {
	*m = protowire.AppendVarint(protowire.AppendTag(*m, field, protowire.VarintType), uint64(v))
}

func (m *message) text(field protowire.Number, v string) { m.bytes(field, []byte(v)) }

func (m *message) bytes(field protowire.Number, v []byte) {
	*m = protowire.AppendBytes(protowire.AppendTag(*m, field, protowire.BytesType), v)
}

// Field numbers of onnx.proto.
const (
	modelIRVersion, modelProducer, modelGraph, modelOpsets, modelProperties      = 1, 2, 7, 8, 14
	opsetVersion                                                                 = 2
	propertyKey, propertyValue                                                   = 1, 2
	graphNode, graphName, graphInitializer, graphInput, graphOutput              = 1, 2, 5, 11, 12
	nodeInput, nodeOutput, nodeOpType, nodeAttribute                             = 1, 2, 4, 5
	attributeName, attributeInt, attributeInts, attributeType                    = 1, 3, 8, 20
	attributeTypeInt, attributeTypeInts                                          = 2, 7
	tensorDims, tensorType, tensorName, tensorRaw                                = 1, 2, 8, 9
	valueName, valueType, typeTensor, typeElement, typeShape, shapeDim, dimValue = 1, 2, 1, 1, 2, 1, 1
	dimParam                                                                     = 2
	irVersion                                                                    = 8
)

// Marshal encodes the model; equal models have equal bytes.
func (m *Model) Marshal() []byte {
	var g message
	for _, n := range m.Nodes {
		g.bytes(graphNode, n.marshal())
	}
	g.text(graphName, m.Name)
	for _, t := range m.Weights {
		g.bytes(graphInitializer, t.marshal())
	}
	for _, v := range m.Inputs {
		g.bytes(graphInput, v.marshal())
	}
	for _, v := range m.Outputs {
		g.bytes(graphOutput, v.marshal())
	}
	var out, opset message
	out.int(modelIRVersion, irVersion)
	out.text(modelProducer, "longshore")
	out.bytes(modelGraph, g)
	opset.int(opsetVersion, m.Opset)
	out.bytes(modelOpsets, opset)
	for _, p := range m.Properties {
		var e message
		e.text(propertyKey, p.Key)
		e.text(propertyValue, p.Value)
		out.bytes(modelProperties, e)
	}
	return out
}

func (n *Node) marshal() []byte {
	var m message
	for _, s := range n.In {
		m.text(nodeInput, s)
	}
	for _, s := range n.Out {
		m.text(nodeOutput, s)
	}
	m.text(nodeOpType, n.Op)
	for _, a := range n.Attributes {
		var e message
		e.text(attributeName, a.Name)
		if a.Ints == nil {
			e.int(attributeInt, a.Int)
			e.int(attributeType, attributeTypeInt)
		} else {
			for _, v := range a.Ints {
				e.int(attributeInts, v)
			}
			e.int(attributeType, attributeTypeInts)
		}
		m.bytes(nodeAttribute, e)
	}
	return m
}

func (t *Tensor) marshal() []byte {
	var m message
	for _, d := range t.Shape {
		m.int(tensorDims, d)
	}
	m.int(tensorType, int64(t.Type))
	m.text(tensorName, t.Name)
	m.bytes(tensorRaw, t.Raw)
	return m
}

func (v *Value) marshal() []byte {
	var shape, tensor, kind, m message
	for i, d := range v.Shape {
		var dim message
		if d < 0 {
			dim.text(dimParam, "d"+strconv.Itoa(i))
		} else {
			dim.int(dimValue, d)
		}
		shape.bytes(shapeDim, dim)
	}
	tensor.int(typeElement, int64(v.Type))
	tensor.bytes(typeShape, shape)
	kind.bytes(typeTensor, tensor)
	m.text(valueName, v.Name)
	m.bytes(valueType, kind)
	return m
}

// Operators counts the operators of a model's graph by their names. It returns what it finds before the first byte that
// is no protobuf.
func Operators(model []byte) map[string]int {
	out := map[string]int{}
	eachField(model, modelGraph, func(graph []byte) {
		eachField(graph, graphNode, func(node []byte) {
			eachField(node, nodeOpType, func(op []byte) { out[string(op)]++ })
		})
	})
	return out
}

// eachField calls f for every length-delimited field with the given number.
func eachField(m []byte, number protowire.Number, f func([]byte)) {
	for len(m) > 0 {
		num, kind, n := protowire.ConsumeTag(m)
		if n < 0 {
			return
		}
		m = m[n:]
		if num == number && kind == protowire.BytesType {
			if value, n := protowire.ConsumeBytes(m); n >= 0 {
				f(value)
			}
		}
		if n = protowire.ConsumeFieldValue(num, kind, m); n < 0 {
			return
		}
		m = m[n:]
	}
}
