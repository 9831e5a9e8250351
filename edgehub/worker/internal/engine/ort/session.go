//go:build linux && (amd64 || arm64)

package ort

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// datatypes of ONNX tensors by the value of ONNXTensorElementDataType; "" has no datatype in the protocol.
var datatypes = [...]oip.Datatype{"", oip.FP32, oip.Uint8, oip.Int8, oip.Uint16, oip.Int16, oip.Int32, oip.Int64, oip.Bytes,
	oip.Bool, oip.FP16, oip.FP64, oip.Uint32, oip.Uint64}

const tensorType = 1 // ONNX_TYPE_TENSOR

type session struct {
	*Runtime
	handle          uintptr
	inputs, outputs []oip.TensorMetadata
	names           map[string]*byte // C strings of inputs and outputs
}

// Load implements engine.Engine.
func (r *Runtime) Load(model []byte, o engine.Options) (engine.Session, error) {
	if len(model) == 0 {
		return nil, errors.New("the model file is empty")
	}
	s := &session{Runtime: r, names: map[string]*byte{}}
	err := s.create(model, o)
	if err == nil {
		s.inputs, err = s.describe(fnSessionGetInputCount, fnSessionGetInputName, fnSessionGetInputTypeInfo, "input")
	}
	if err == nil {
		s.outputs, err = s.describe(fnSessionGetOutputCount, fnSessionGetOutputName, fnSessionGetOutputTypeInfo, "output")
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *session) create(model []byte, o engine.Options) error {
	var options uintptr
	if err := s.call(fnCreateSessionOptions, uintptr(unsafe.Pointer(&options))); err != nil {
		return err
	}
	defer s.release(fnReleaseSessionOptions, options)
	for _, err := range []error{
		s.call(fnSetIntraOpNumThreads, options, uintptr(o.Threads)),
		s.call(fnSetInterOpNumThreads, options, 1),
		// Memory goes back after each inference: edges are small.
		s.call(fnDisableCPUMemArena, options),
		s.call(fnDisableMemPattern, options),
		s.set(options, "session.intra_op.allow_spinning", "0"),
	} {
		if err != nil {
			return err
		}
	}
	// Weights that are stored as INT8 and dequantized: without this they are computed with as INT8, and wrongly.
	if weightOnly(model) {
		if err := s.set(options, "session.disable_quant_qdq", "1"); err != nil {
			return err
		}
	}
	return s.call(fnCreateSessionFromArray, s.env, uintptr(unsafe.Pointer(&model[0])), uintptr(len(model)), options,
		uintptr(unsafe.Pointer(&s.handle)))
}

func (s *session) set(options uintptr, key, value string) error {
	return s.call(fnAddSessionConfigEntry, options, uintptr(unsafe.Pointer(cString(key))), uintptr(unsafe.Pointer(cString(value))))
}

// describe asks for names, datatypes and shapes of all inputs, or of all outputs.
func (s *session) describe(fnCount, fnName, fnTypeInfo int, kind string) ([]oip.TensorMetadata, error) {
	var count uintptr
	if err := s.call(fnCount, s.handle, uintptr(unsafe.Pointer(&count))); err != nil {
		return nil, err
	}
	all := make([]oip.TensorMetadata, count)
	for i := range all {
		var name, info uintptr
		if err := s.call(fnName, s.handle, uintptr(i), s.allocator, uintptr(unsafe.Pointer(&name))); err != nil {
			return nil, err
		}
		all[i].Name = goString(name)
		s.names[all[i].Name] = cString(all[i].Name)
		if err := s.call(fnAllocatorFree, s.allocator, name); err != nil {
			return nil, err
		}
		if err := s.call(fnTypeInfo, s.handle, uintptr(i), uintptr(unsafe.Pointer(&info))); err != nil {
			return nil, err
		}
		var err error
		all[i].Datatype, all[i].Shape, err = s.typeOf(info)
		s.release(fnReleaseTypeInfo, info)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", kind, all[i].Name, err)
		}
	}
	return all, nil
}

func (s *session) typeOf(info uintptr) (oip.Datatype, []int64, error) {
	var kind int32
	if err := s.call(fnGetOnnxTypeFromTypeInfo, info, uintptr(unsafe.Pointer(&kind))); err != nil {
		return "", nil, err
	}
	if kind != tensorType {
		return "", nil, errors.New("it is not a tensor (a classifier of scikit-learn must be exported with zipmap=False)")
	}
	var tensor uintptr // belongs to info
	if err := s.call(fnCastTypeInfoToTensorInfo, info, uintptr(unsafe.Pointer(&tensor))); err != nil {
		return "", nil, err
	}
	return s.tensorType(tensor)
}

func (s *session) tensorType(info uintptr) (oip.Datatype, []int64, error) {
	var element int32
	if err := s.call(fnGetTensorElementType, info, uintptr(unsafe.Pointer(&element))); err != nil {
		return "", nil, err
	}
	if element < 0 || int(element) >= len(datatypes) || datatypes[element] == "" {
		return "", nil, fmt.Errorf("ONNX element type %d has no datatype in the Open Inference Protocol", element)
	}
	var rank uintptr
	if err := s.call(fnGetDimensionsCount, info, uintptr(unsafe.Pointer(&rank))); err != nil {
		return "", nil, err
	}
	shape := make([]int64, rank)
	if rank > 0 {
		if err := s.call(fnGetDimensions, info, uintptr(unsafe.Pointer(&shape[0])), rank); err != nil {
			return "", nil, err
		}
	}
	return datatypes[element], shape, nil
}

func (s *session) Inputs() []oip.TensorMetadata  { return s.inputs }
func (s *session) Outputs() []oip.TensorMetadata { return s.outputs }

func (s *session) Close() {
	s.release(fnReleaseSession, s.handle)
	s.handle = 0
}

func (s *session) Run(inputs []oip.Tensor, outputs []string) ([]oip.Tensor, error) {
	var pin runtime.Pinner
	defer pin.Unpin()
	inNames, inValues := make([]*byte, len(inputs)), make([]uintptr, len(inputs))
	outNames, outValues := make([]*byte, len(outputs)), make([]uintptr, len(outputs))
	defer func() {
		for _, v := range slices.Concat(inValues, outValues) {
			s.release(fnReleaseValue, v)
		}
	}()
	for i := range inputs {
		inNames[i] = s.names[inputs[i].Name]
		pin.Pin(inNames[i])
		var err error
		if inValues[i], err = s.value(&inputs[i], &pin); err != nil {
			return nil, fmt.Errorf("input %q: %w", inputs[i].Name, err)
		}
	}
	for i, name := range outputs {
		outNames[i] = s.names[name]
		pin.Pin(outNames[i])
	}
	err := s.call(fnRun, s.handle, 0, uintptr(unsafe.Pointer(unsafe.SliceData(inNames))), uintptr(unsafe.Pointer(unsafe.SliceData(inValues))),
		uintptr(len(inputs)), uintptr(unsafe.Pointer(unsafe.SliceData(outNames))), uintptr(len(outputs)),
		uintptr(unsafe.Pointer(unsafe.SliceData(outValues))))
	if err != nil {
		if errors.Is(err, engine.ErrOutOfMemory) {
			return nil, err
		}
		// The model passed its warm-up, so it is these inputs that it can't do.
		return nil, &engine.InputError{Err: err}
	}
	results := make([]oip.Tensor, len(outputs))
	for i, name := range outputs {
		if results[i], err = s.tensor(name, outValues[i]); err != nil {
			return nil, fmt.Errorf("output %q: %w", name, err)
		}
	}
	return results, nil
}

// value makes an OrtValue. Its elements are those of t, or a copy where t's are not aligned; pin keeps them in place.
func (s *session) value(t *oip.Tensor, pin *runtime.Pinner) (uintptr, error) {
	element := uintptr(slices.Index(datatypes[:], t.Datatype))
	shape := t.Shape
	if len(shape) == 0 {
		shape = []int64{0} // a scalar: its address is taken, its length is not
	}
	var v uintptr
	if t.Datatype == oip.Bytes {
		err := s.call(fnCreateTensorAsOrtValue, s.allocator, uintptr(unsafe.Pointer(&shape[0])), uintptr(len(t.Shape)), element,
			uintptr(unsafe.Pointer(&v)))
		if err == nil {
			err = s.fill(v, t)
		}
		return v, err
	}
	data := t.Data
	if address := uintptr(unsafe.Pointer(unsafe.SliceData(data))); len(data) == 0 || address%8 != 0 {
		data = make([]byte, max(8, len(data)))
		copy(data, t.Data)
	}
	pin.Pin(&data[0])
	err := s.call(fnCreateTensorWithDataAsOrtValue, s.memory, uintptr(unsafe.Pointer(&data[0])), uintptr(len(t.Data)),
		uintptr(unsafe.Pointer(&shape[0])), uintptr(len(t.Shape)), element, uintptr(unsafe.Pointer(&v)))
	return v, err
}

// fill copies the elements of a BYTES tensor. They are C strings there, so a zero byte can't be part of one.
func (s *session) fill(v uintptr, t *oip.Tensor) error {
	elements, err := t.Strings()
	if err != nil {
		return &engine.InputError{Err: err}
	}
	if len(elements) == 0 {
		return nil
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	strings := make([]*byte, len(elements))
	for i, e := range elements {
		if slices.Contains(e, 0) {
			return &engine.InputError{Err: fmt.Errorf("element %d has a zero byte in it, which an ONNX string can't hold", i)}
		}
		strings[i] = cString(string(e))
		pin.Pin(strings[i])
	}
	return s.call(fnFillStringTensor, v, uintptr(unsafe.Pointer(&strings[0])), uintptr(len(strings)))
}

// tensor copies an OrtValue.
func (s *session) tensor(name string, v uintptr) (oip.Tensor, error) {
	var info, count uintptr
	if err := s.call(fnGetTensorTypeAndShape, v, uintptr(unsafe.Pointer(&info))); err != nil {
		return oip.Tensor{}, err
	}
	defer s.release(fnReleaseTensorTypeAndShapeInfo, info)
	datatype, shape, err := s.tensorType(info)
	if err != nil {
		return oip.Tensor{}, err
	}
	if err := s.call(fnGetTensorShapeElementCount, info, uintptr(unsafe.Pointer(&count))); err != nil {
		return oip.Tensor{}, err
	}
	t := oip.Tensor{Name: name, Datatype: datatype, Shape: shape, Data: []byte{}}
	if count == 0 {
		return t, nil
	}
	if datatype == oip.Bytes {
		t.Data, err = s.strings(v, int(count))
		return t, err
	}
	var data uintptr
	if err := s.call(fnGetTensorMutableData, v, uintptr(unsafe.Pointer(&data))); err != nil {
		return oip.Tensor{}, err
	}
	t.Data = slices.Clone(unsafe.Slice((*byte)(pointer(data)), int(count)*datatype.Size()))
	return t, nil
}

func (s *session) strings(v uintptr, count int) ([]byte, error) {
	var size uintptr
	if err := s.call(fnGetStringTensorDataLength, v, uintptr(unsafe.Pointer(&size))); err != nil {
		return nil, err
	}
	text, offsets := make([]byte, size+1), make([]uintptr, count+1)
	offsets[count] = size
	if err := s.call(fnGetStringTensorContent, v, uintptr(unsafe.Pointer(&text[0])), size, uintptr(unsafe.Pointer(&offsets[0])),
		uintptr(count)); err != nil {
		return nil, err
	}
	data := make([]byte, 0, int(size)+binary.Size(uint32(0))*count)
	for i := range count {
		data = oip.AppendString(data, text[offsets[i]:offsets[i+1]])
	}
	return data, nil
}
