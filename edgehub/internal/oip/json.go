package oip

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/x448/float16"
)

// parseData turns the JSON data of a tensor, flat or nested as its shape, into bytes.
func parseData(d Datatype, shape []int64, data json.RawMessage) ([]byte, error) {
	want, err := Elements(shape)
	if err != nil {
		return nil, err
	}
	out, got, err := parseArray(d, data)
	switch {
	case err != nil:
		return nil, err
	case len(got) == 1 && got[0] != want:
		return nil, fmt.Errorf("shape %v needs %d elements, the data has %d", shape, want, got[0])
	case len(got) > 1 && !slices.Equal(got, shape):
		return nil, fmt.Errorf("data is nested as %v; it must be flat or nested as the shape %v", got, shape)
	}
	return out, nil
}

// parseArray turns a JSON array, nested regularly or flat, into bytes, and tells its shape.
func parseArray(d Datatype, data json.RawMessage) (out []byte, shape []int64, err error) {
	e := &elements{json: data, datatype: d}
	if e.peek() != '[' {
		return nil, nil, errors.New("data is not a JSON array")
	}
	for e.peek() == '[' {
		shape = append(shape, -1)
		e.pos++
	}
	e.pos = 0
	// An element takes at least two characters of the text.
	e.out = make([]byte, 0, len(data)/2*max(d.Size(), 1))
	if err := e.array(shape); err != nil {
		return nil, nil, err
	}
	return e.out, shape, nil
}

// elements walks the JSON array of a tensor. The bytes are valid JSON already, so it only has to find the tokens.
type elements struct {
	json     []byte
	pos      int
	datatype Datatype
	count    int
	out      []byte
}

// peek skips white space and returns the next byte, 0 at the end.
func (e *elements) peek() byte {
	for ; e.pos < len(e.json); e.pos++ {
		switch c := e.json[e.pos]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// array reads one array. shape is its shape, where -1 stands for what the first array at that depth is about to tell.
func (e *elements) array(shape []int64) error {
	if e.peek() != '[' {
		return errors.New("data is nested unevenly")
	}
	e.pos++
	n := int64(0)
	for e.peek() != ']' {
		if err := e.item(shape[1:]); err != nil {
			return err
		}
		if n++; e.peek() == ',' {
			e.pos++
		}
	}
	e.pos++
	if shape[0] < 0 {
		shape[0] = n
	} else if n != shape[0] {
		return fmt.Errorf("data is nested unevenly: a row of %d beside one of %d", n, shape[0])
	}
	return nil
}

// item reads what an array holds: arrays, or elements in the innermost one.
func (e *elements) item(shape []int64) error {
	if len(shape) > 0 {
		return e.array(shape)
	}
	token, err := e.token()
	if err == nil {
		e.out, err = appendElement(e.out, e.datatype, token)
	}
	if err != nil {
		return fmt.Errorf("element %d: %w", e.count, err)
	}
	e.count++
	return nil
}

// token returns the next scalar.
func (e *elements) token() ([]byte, error) {
	start := e.pos
	switch e.json[start] {
	case '[', '{':
		return nil, errors.New("an array or object where a value should be")
	case '"':
		for e.pos++; e.json[e.pos] != '"'; e.pos++ {
			if e.json[e.pos] == '\\' {
				e.pos++
			}
		}
		e.pos++
		return e.json[start:e.pos], nil
	}
	for ; e.pos < len(e.json); e.pos++ {
		switch e.json[e.pos] {
		case ',', ']', ' ', '\t', '\r', '\n':
			return e.json[start:e.pos], nil
		}
	}
	return e.json[start:], nil
}

// appendElement converts one JSON scalar. It rounds to the precision of a float, and refuses everything else that does
// not fit: null, a fraction for an integer, a value out of range.
func appendElement(out []byte, d Datatype, token []byte) ([]byte, error) {
	le := binary.LittleEndian
	bits := 8 * d.Size()
	switch d {
	case Bytes:
		var s string
		if err := json.Unmarshal(token, &s); err != nil || token[0] != '"' {
			return nil, fmt.Errorf("%s is not a string, as BYTES needs", token)
		}
		return AppendString(out, s), nil
	case Bool:
		switch string(token) {
		case "true":
			return append(out, 1), nil
		case "false":
			return append(out, 0), nil
		}
		return nil, fmt.Errorf("%s is not true or false, as BOOL needs", token)
	case FP16, FP32, FP64:
		f, err := strconv.ParseFloat(string(token), max(bits, 32))
		switch {
		case errors.Is(err, strconv.ErrRange) || err == nil && d == FP16 && math.Abs(f) >= 65520:
			return nil, fmt.Errorf("%s does not fit into %s", token, d)
		case err != nil:
			return nil, fmt.Errorf("%s is not a number, as %s needs", token, d)
		}
		switch d {
		case FP16:
			return le.AppendUint16(out, float16.Fromfloat32(float32(f)).Bits()), nil
		case FP32:
			return le.AppendUint32(out, math.Float32bits(float32(f))), nil
		default:
			return le.AppendUint64(out, math.Float64bits(f)), nil
		}
	}
	var u uint64
	var err error
	if d[0] == 'U' {
		u, err = strconv.ParseUint(string(token), 10, bits)
	} else {
		var i int64
		i, err = strconv.ParseInt(string(token), 10, bits)
		u = uint64(i)
	}
	switch {
	case errors.Is(err, strconv.ErrRange):
		return nil, fmt.Errorf("%s does not fit into %s", token, d)
	case err != nil:
		return nil, fmt.Errorf("%s is not an integer that fits into %s", token, d)
	}
	switch bits {
	case 8:
		return append(out, byte(u)), nil
	case 16:
		return le.AppendUint16(out, uint16(u)), nil
	case 32:
		return le.AppendUint32(out, uint32(u)), nil
	default:
		return le.AppendUint64(out, u), nil
	}
}

// appendJSON writes the elements of t as arrays nested as shape, which holds as many elements as t. JSON has no NaN
// and no infinity: they become null.
func appendJSON(out []byte, t *Tensor, shape []int64) ([]byte, error) {
	if slices.Contains(shape, 0) {
		return append(out, "[]"...), nil
	}
	w := &elementWriter{tensor: t, out: out}
	if t.Datatype == Bytes {
		s, err := t.Strings()
		if err != nil {
			return nil, err
		}
		w.strings = s
	}
	w.array(shape)
	return w.out, nil
}

type elementWriter struct {
	tensor  *Tensor
	strings [][]byte
	next    int
	out     []byte
}

func (w *elementWriter) array(shape []int64) {
	if len(shape) == 0 {
		w.element()
		return
	}
	w.out = append(w.out, '[')
	for i := range shape[0] {
		if i > 0 {
			w.out = append(w.out, ',')
		}
		w.array(shape[1:])
	}
	w.out = append(w.out, ']')
}

func (w *elementWriter) element() {
	le, d, i := binary.LittleEndian, w.tensor.Data, w.next
	w.next++
	switch w.tensor.Datatype {
	case Bool:
		w.out = strconv.AppendBool(w.out, d[i] != 0)
	case Uint8:
		w.out = strconv.AppendUint(w.out, uint64(d[i]), 10)
	case Uint16:
		w.out = strconv.AppendUint(w.out, uint64(le.Uint16(d[2*i:])), 10)
	case Uint32:
		w.out = strconv.AppendUint(w.out, uint64(le.Uint32(d[4*i:])), 10)
	case Uint64:
		w.out = strconv.AppendUint(w.out, le.Uint64(d[8*i:]), 10)
	case Int8:
		w.out = strconv.AppendInt(w.out, int64(int8(d[i])), 10)
	case Int16:
		w.out = strconv.AppendInt(w.out, int64(int16(le.Uint16(d[2*i:]))), 10)
	case Int32:
		w.out = strconv.AppendInt(w.out, int64(int32(le.Uint32(d[4*i:]))), 10)
	case Int64:
		w.out = strconv.AppendInt(w.out, int64(le.Uint64(d[8*i:])), 10)
	case FP16:
		w.out = appendFloat(w.out, float64(float16.Frombits(le.Uint16(d[2*i:])).Float32()), 32)
	case FP32:
		w.out = appendFloat(w.out, float64(math.Float32frombits(le.Uint32(d[4*i:]))), 32)
	case FP64:
		w.out = appendFloat(w.out, math.Float64frombits(le.Uint64(d[8*i:])), 64)
	case Bytes:
		// A string that is not UTF-8 has no JSON form; Marshal replaces what is invalid. Binary output keeps it.
		s, err := json.Marshal(string(w.strings[i]))
		if err != nil {
			s = []byte("null")
		}
		w.out = append(w.out, s...)
	}
}

func appendFloat(out []byte, f float64, bits int) []byte {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return append(out, "null"...)
	}
	return strconv.AppendFloat(out, f, 'g', -1, bits)
}
