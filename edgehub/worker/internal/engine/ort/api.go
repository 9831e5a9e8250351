//go:build linux && (amd64 || arm64)

// Package ort runs models on ONNX Runtime, whose shared library it loads at run time, without cgo.
package ort

import (
	"fmt"
	"strings"
	"unsafe"

	"github.com/ebitengine/purego"

	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// apiVersion of the C API; ONNX Runtime 1.24 is the first that has it. The table of functions only ever grows at its end.
const apiVersion = 24

// Positions of functions in struct OrtApi, onnxruntime_c_api.h.
const (
	fnGetErrorMessage                = 2
	fnCreateEnv                      = 3
	fnCreateSessionFromArray         = 8
	fnRun                            = 9
	fnCreateSessionOptions           = 10
	fnDisableMemPattern              = 17
	fnDisableCPUMemArena             = 19
	fnSetIntraOpNumThreads           = 24
	fnSetInterOpNumThreads           = 25
	fnSessionGetInputCount           = 30
	fnSessionGetOutputCount          = 31
	fnSessionGetInputTypeInfo        = 33
	fnSessionGetOutputTypeInfo       = 34
	fnSessionGetInputName            = 36
	fnSessionGetOutputName           = 37
	fnCreateTensorAsOrtValue         = 48
	fnCreateTensorWithDataAsOrtValue = 49
	fnGetTensorMutableData           = 51
	fnFillStringTensor               = 52
	fnGetStringTensorDataLength      = 53
	fnGetStringTensorContent         = 54
	fnCastTypeInfoToTensorInfo       = 55
	fnGetOnnxTypeFromTypeInfo        = 56
	fnGetTensorElementType           = 60
	fnGetDimensionsCount             = 61
	fnGetDimensions                  = 62
	fnGetTensorShapeElementCount     = 64
	fnGetTensorTypeAndShape          = 65
	fnCreateCPUMemoryInfo            = 69
	fnAllocatorFree                  = 76
	fnGetAllocatorWithDefaultOptions = 78
	fnReleaseStatus                  = 93
	fnReleaseSession                 = 95
	fnReleaseValue                   = 96
	fnReleaseTypeInfo                = 98
	fnReleaseTensorTypeAndShapeInfo  = 99
	fnReleaseSessionOptions          = 100
	fnAddSessionConfigEntry          = 130
	functions                        = 131
)

// Runtime is ONNX Runtime, loaded into this process, where it stays. Safe for concurrent use.
type Runtime struct {
	version   string
	api       [functions]uintptr
	env       uintptr
	memory    uintptr // OrtMemoryInfo of the CPU
	allocator uintptr
}

// Open loads the library; path is what FindLibrary returned. Its errors are engine.ErrNoEngine.
func Open(path string) (*Runtime, error) {
	r, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: ONNX Runtime: %w", engine.ErrNoEngine, err)
	}
	return r, nil
}

func open(path string) (*Runtime, error) {
	lib, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, notFound(path, err)
	}
	getBase, err := purego.Dlsym(lib, "OrtGetApiBase")
	if err != nil {
		return nil, fmt.Errorf("%s is no ONNX Runtime: %w", path, err)
	}
	base, _, _ := purego.SyscallN(getBase)
	table := (*[2]uintptr)(pointer(base)) // GetApi, GetVersionString
	version, _, _ := purego.SyscallN(table[1])
	r := &Runtime{version: goString(version)}
	api, _, _ := purego.SyscallN(table[0], apiVersion)
	if api == 0 {
		return nil, fmt.Errorf("%s is version %s; at least 1.%d is needed", path, r.version, apiVersion)
	}
	r.api = *(*[functions]uintptr)(pointer(api))
	const logFatal = 4 // errors are returned
	if err := r.call(fnCreateEnv, logFatal, uintptr(unsafe.Pointer(cString("longshore"))), uintptr(unsafe.Pointer(&r.env))); err != nil {
		return nil, err
	}
	const arenaAllocator, defaultMemory = 1, 0
	if err := r.call(fnCreateCPUMemoryInfo, arenaAllocator, defaultMemory, uintptr(unsafe.Pointer(&r.memory))); err != nil {
		return nil, err
	}
	if err := r.call(fnGetAllocatorWithDefaultOptions, uintptr(unsafe.Pointer(&r.allocator))); err != nil {
		return nil, err
	}
	return r, nil
}

// notFound explains what to do where no library was found.
func notFound(path string, err error) error {
	if path == LibraryName && strings.Contains(err.Error(), "No such file") {
		return fmt.Errorf("%s is nowhere on this machine: run \"make onnxruntime\", or name it with --ort-library or $%s",
			LibraryName, LibraryVariable)
	}
	return err
}

// Name implements engine.Engine.
func (r *Runtime) Name() string { return "onnxruntime" }

// Version implements engine.Engine.
func (r *Runtime) Version() string { return r.version }

// statusError is what ONNX Runtime said.
type statusError string

func (e statusError) Error() string { return string(e) }

func (e statusError) Unwrap() error {
	for _, s := range []string{"bad_alloc", "bad allocation", "Failed to allocate memory"} {
		if strings.Contains(string(e), s) {
			return engine.ErrOutOfMemory
		}
	}
	return nil
}

// call calls a function that returns an OrtStatus. Pointers converted in the argument list stay alive and in place until
// it returns.
//
//go:uintptrescapes
func (r *Runtime) call(fn int, args ...uintptr) error {
	status, _, _ := purego.SyscallN(r.api[fn], args...)
	if status == 0 {
		return nil
	}
	message, _, _ := purego.SyscallN(r.api[fnGetErrorMessage], status)
	err := statusError(goString(message))
	purego.SyscallN(r.api[fnReleaseStatus], status)
	return err
}

// release calls one of the Release functions, which return nothing and take a null pointer.
func (r *Runtime) release(fn int, object uintptr) {
	if object != 0 {
		purego.SyscallN(r.api[fn], object)
	}
}

// pointer makes a Go pointer of an address outside of the Go heap.
func pointer(address uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&address)) }

func cString(s string) *byte {
	b := append([]byte(s), 0)
	return &b[0]
}

func goString(address uintptr) string {
	if address == 0 {
		return ""
	}
	p := pointer(address)
	n := 0
	for *(*byte)(unsafe.Add(p, n)) != 0 {
		n++
	}
	return string(unsafe.Slice((*byte)(p), n))
}
