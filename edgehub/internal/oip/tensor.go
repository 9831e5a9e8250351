package oip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// Datatype names the elements of a tensor, as the protocol spells them.
type Datatype string

// The datatypes of the protocol.
const (
	Bool   Datatype = "BOOL"
	Uint8  Datatype = "UINT8"
	Uint16 Datatype = "UINT16"
	Uint32 Datatype = "UINT32"
	Uint64 Datatype = "UINT64"
	Int8   Datatype = "INT8"
	Int16  Datatype = "INT16"
	Int32  Datatype = "INT32"
	Int64  Datatype = "INT64"
	FP16   Datatype = "FP16"
	FP32   Datatype = "FP32"
	FP64   Datatype = "FP64"
	Bytes  Datatype = "BYTES"
)

// Size of one element in bytes; 0 for BYTES, whose elements differ, and for a name that is no datatype.
func (d Datatype) Size() int {
	switch d {
	case Bool, Uint8, Int8:
		return 1
	case Uint16, Int16, FP16:
		return 2
	case Uint32, Int32, FP32:
		return 4
	case Uint64, Int64, FP64:
		return 8
	default:
		return 0
	}
}

// Valid reports whether d is a datatype of the protocol.
func (d Datatype) Valid() bool { return d == Bytes || d.Size() > 0 }

// Tensor is a named array. Data holds its elements row by row, little endian, without gaps; an element of BYTES is a
// uint32 with its length and then the bytes (the layout of the binary extension).
type Tensor struct {
	Name     string
	Datatype Datatype
	Shape    []int64
	Data     []byte
}

// Elements counts the elements a shape holds: 1 for a scalar. It fails on a negative dimension and on overflow.
func Elements(shape []int64) (int64, error) {
	n := int64(1)
	for _, d := range shape {
		if d < 0 {
			return 0, fmt.Errorf("shape %v has a negative dimension", shape)
		}
		if d > 0 && n > math.MaxInt64/16/d {
			return 0, fmt.Errorf("shape %v is too large", shape)
		}
		n *= d
	}
	return n, nil
}

// Check reports whether datatype, shape and data fit together.
func (t *Tensor) Check() error {
	if !t.Datatype.Valid() {
		return fmt.Errorf("%q is not a datatype of the Open Inference Protocol", t.Datatype)
	}
	n, err := Elements(t.Shape)
	if err != nil {
		return err
	}
	if t.Datatype == Bytes {
		s, err := t.Strings()
		if err == nil && int64(len(s)) != n {
			err = fmt.Errorf("shape %v needs %d elements, the data has %d", t.Shape, n, len(s))
		}
		return err
	}
	if want := n * int64(t.Datatype.Size()); int64(len(t.Data)) != want {
		return fmt.Errorf("shape %v of %s needs %d bytes, the data has %d", t.Shape, t.Datatype, want, len(t.Data))
	}
	if t.Datatype == Bool {
		for i, b := range t.Data {
			if b > 1 {
				return fmt.Errorf("element %d: a BOOL is 0 or 1, not %d", i, b)
			}
		}
	}
	return nil
}

// Strings returns the elements of a BYTES tensor; they share memory with it.
func (t *Tensor) Strings() ([][]byte, error) {
	var out [][]byte
	for rest := t.Data; len(rest) > 0; {
		if len(rest) < 4 {
			return nil, errors.New("BYTES data ends inside the length of an element")
		}
		n := int64(binary.LittleEndian.Uint32(rest))
		if rest = rest[4:]; n > int64(len(rest)) {
			return nil, errors.New("BYTES data ends inside an element")
		}
		out = append(out, rest[:n:n])
		rest = rest[n:]
	}
	return out, nil
}

// AppendString appends one element to the data of a BYTES tensor.
func AppendString[S ~string | ~[]byte](data []byte, s S) []byte {
	data = binary.LittleEndian.AppendUint32(data, uint32(len(s)))
	return append(data, s...)
}

// FP32Tensor makes a tensor of 32-bit floats.
func FP32Tensor(name string, shape []int64, values []float32) Tensor {
	data := make([]byte, 0, 4*len(values))
	for _, v := range values {
		data = binary.LittleEndian.AppendUint32(data, math.Float32bits(v))
	}
	return Tensor{Name: name, Datatype: FP32, Shape: shape, Data: data}
}

// Float32s returns the elements of an FP32 tensor, and nil for another datatype.
func (t *Tensor) Float32s() []float32 {
	if t.Datatype != FP32 {
		return nil
	}
	out := make([]float32, len(t.Data)/4)
	for i := range out {
		out[i] = math.Float32frombits(binary.LittleEndian.Uint32(t.Data[4*i:]))
	}
	return out
}

// Zeros makes a tensor of zeros (empty strings for BYTES) in the given shape.
func Zeros(name string, d Datatype, shape []int64) (Tensor, error) {
	n, err := Elements(shape)
	if err != nil {
		return Tensor{}, err
	}
	size := int64(d.Size())
	if d == Bytes {
		size = 4
	}
	if n*size > math.MaxInt32 {
		return Tensor{}, fmt.Errorf("shape %v is too large", shape)
	}
	return Tensor{Name: name, Datatype: d, Shape: shape, Data: make([]byte, n*size)}, nil
}
