package engine_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine/gomlx"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine/ort"
	"github.com/longshore-edge/longshore/proto/onnxfile"
)

var elementTypes = map[oip.Datatype]onnxfile.ElementType{
	oip.Bool: onnxfile.Bool, oip.Uint8: onnxfile.Uint8, oip.Uint16: onnxfile.Uint16, oip.Uint32: onnxfile.Uint32,
	oip.Uint64: onnxfile.Uint64, oip.Int8: onnxfile.Int8, oip.Int16: onnxfile.Int16, oip.Int32: onnxfile.Int32,
	oip.Int64: onnxfile.Int64, oip.FP16: onnxfile.Float16, oip.FP32: onnxfile.Float, oip.FP64: onnxfile.Double,
	oip.Bytes: onnxfile.String,
}

// eachEngine runs a test on every engine of this machine.
func eachEngine(t *testing.T, test func(*testing.T, engine.Engine)) {
	t.Run("gomlx", func(t *testing.T) {
		e, err := gomlx.Open()
		if err != nil {
			t.Fatal(err)
		}
		test(t, e)
	})
	t.Run("onnxruntime", func(t *testing.T) { test(t, openORT(t)) })
}

func openORT(t testing.TB) engine.Engine {
	path, err := ort.FindLibrary("")
	if err != nil {
		t.Fatal(err)
	}
	e, err := ort.Open(path)
	if err != nil {
		if os.Getenv("LONGSHORE_REQUIRE_ORT") == "1" {
			t.Fatalf("%v (run \"make onnxruntime\")", err)
		}
		t.Skipf("NOT TESTED on ONNX Runtime: %v", err)
	}
	return e
}

func load(t testing.TB, e engine.Engine, m onnxfile.Model) engine.Session {
	t.Helper()
	s, err := e.Load(m.Marshal(), engine.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func identity(d oip.Datatype, shape ...int64) onnxfile.Model {
	return onnxfile.Model{Name: "identity", Opset: 14,
		Inputs:  []onnxfile.Value{{Name: "x", Type: elementTypes[d], Shape: shape}},
		Outputs: []onnxfile.Value{{Name: "y", Type: elementTypes[d], Shape: shape}},
		Nodes:   []onnxfile.Node{{Op: "Identity", In: []string{"x"}, Out: []string{"y"}}}}
}

// sumAndProduct has two inputs and two outputs of any length.
var sumAndProduct = onnxfile.Model{Name: "two", Opset: 14,
	Inputs:  []onnxfile.Value{{Name: "a", Type: onnxfile.Float, Shape: []int64{-1}}, {Name: "b", Type: onnxfile.Float, Shape: []int64{-1}}},
	Outputs: []onnxfile.Value{{Name: "sum", Type: onnxfile.Float, Shape: []int64{-1}}, {Name: "product", Type: onnxfile.Float, Shape: []int64{-1}}},
	Nodes: []onnxfile.Node{
		{Op: "Add", In: []string{"a", "b"}, Out: []string{"sum"}},
		{Op: "Mul", In: []string{"a", "b"}, Out: []string{"product"}}}}

func data(d oip.Datatype) []byte {
	switch d {
	case oip.Bool:
		return []byte{1, 0, 0, 1}
	case oip.Bytes:
		var b []byte
		for _, s := range []string{"", "a", "über", strings.Repeat("long ", 100)} {
			b = oip.AppendString(b, s)
		}
		return b
	case oip.FP16:
		return []byte{0, 0x3c, 0, 0xbc, 0xff, 0x7b, 1, 0}
	case oip.FP32:
		return binary.LittleEndian.AppendUint32([]byte{0, 0, 0x80, 0x3f, 0xff, 0xff, 0x7f, 0x7f, 1, 0, 0, 0}, math.Float32bits(-1.5))
	case oip.FP64:
		b := make([]byte, 24)
		return binary.LittleEndian.AppendUint64(b, math.Float64bits(math.Pi))
	default:
		b := make([]byte, 4*d.Size())
		for i := range b {
			b[i] = byte(37 * (i + 1))
		}
		return b
	}
}

// A model of any datatype of the protocol must get exactly what the client sent, and answer exactly what it computed.
func TestEveryDatatype(t *testing.T) {
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		for d := range elementTypes {
			m := identity(d, -1, 2)
			if e.Name() == "gomlx" && (d == oip.Bytes || d == oip.FP16) {
				// GoMLX has no strings, and its ONNX reader no half floats: that must be said when the model is loaded.
				if _, err := e.Load(m.Marshal(), engine.Options{Threads: 1}); err == nil {
					t.Errorf("%s was loaded", d)
				}
				continue
			}
			s := load(t, e, m)
			want := []oip.TensorMetadata{{Name: "x", Datatype: d, Shape: []int64{-1, 2}}}
			if !reflect.DeepEqual(s.Inputs(), want) {
				t.Errorf("%s: inputs are %+v", d, s.Inputs())
			}
			in := oip.Tensor{Name: "x", Datatype: d, Shape: []int64{2, 2}, Data: data(d)}
			if err := in.Check(); err != nil {
				t.Fatal(d, err)
			}
			out, err := s.Run([]oip.Tensor{in}, []string{"y"})
			in.Name = "y"
			if err != nil || !reflect.DeepEqual(out, []oip.Tensor{in}) {
				t.Errorf("%s: %v\n got %v\nwant %v", d, err, out, in)
			}
			if err := engine.WarmUp(s); err != nil {
				t.Errorf("%s: %v", d, err)
			}
		}
	})
}

// Data that comes behind a JSON header lies at any address; scalars have no dimensions.
func TestUnalignedAndScalar(t *testing.T) {
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		s := load(t, e, identity(oip.FP64))
		raw := append([]byte{0}, binary.LittleEndian.AppendUint64(nil, math.Float64bits(math.E))...)
		out, err := s.Run([]oip.Tensor{{Name: "x", Datatype: oip.FP64, Shape: []int64{}, Data: raw[1:]}}, []string{"y"})
		if err != nil || !bytes.Equal(out[0].Data, raw[1:]) || len(out[0].Shape) != 0 {
			t.Fatalf("%v, %v", out, err)
		}
	})
}

// A batch of nothing is allowed on ONNX Runtime, and a clear error elsewhere.
func TestNoElements(t *testing.T) {
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		s := load(t, e, identity(oip.FP32, -1, 2))
		out, err := s.Run([]oip.Tensor{{Name: "x", Datatype: oip.FP32, Shape: []int64{0, 2}, Data: nil}}, []string{"y"})
		if e.Name() == "gomlx" {
			if _, ok := errors.AsType[*engine.InputError](err); !ok {
				t.Fatal(err)
			}
			return
		}
		if err != nil || len(out[0].Data) != 0 || !reflect.DeepEqual(out[0].Shape, []int64{0, 2}) {
			t.Fatalf("%v, %v", out, err)
		}
	})
}

// The client chooses outputs and the order of inputs; mixing them up would give wrong results that look right.
func TestSeveralInputsAndOutputs(t *testing.T) {
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		s := load(t, e, sumAndProduct)
		a := oip.FP32Tensor("a", []int64{3}, []float32{1, 2, 3})
		b := oip.FP32Tensor("b", []int64{3}, []float32{10, 20, 30})
		sum := oip.FP32Tensor("sum", []int64{3}, []float32{11, 22, 33})
		product := oip.FP32Tensor("product", []int64{3}, []float32{10, 40, 90})
		for _, c := range []struct {
			outputs []string
			want    []oip.Tensor
		}{
			{[]string{"sum", "product"}, []oip.Tensor{sum, product}},
			{[]string{"product", "sum"}, []oip.Tensor{product, sum}},
			{[]string{"product"}, []oip.Tensor{product}},
		} {
			if out, err := s.Run([]oip.Tensor{b, a}, c.outputs); err != nil || !reflect.DeepEqual(out, c.want) {
				t.Errorf("%v: got %v, %v", c.outputs, out, err)
			}
		}
		// Sizes that each fit the model and do not fit together.
		_, err := s.Run([]oip.Tensor{a, oip.FP32Tensor("b", []int64{2}, []float32{1, 2})}, []string{"sum"})
		if _, ok := errors.AsType[*engine.InputError](err); !ok {
			t.Errorf("3 and 2 elements were added: %v", err)
		}
		if out, err := s.Run([]oip.Tensor{b, a}, []string{"sum"}); err != nil || !reflect.DeepEqual(out, []oip.Tensor{sum}) {
			t.Errorf("after an error: %v, %v", out, err)
		}
	})
}

// Batches of many sizes must neither fail nor pile up compiled graphs.
func TestManyShapes(t *testing.T) {
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		s := load(t, e, identity(oip.FP32, -1))
		for n := range int64(50) {
			in := oip.FP32Tensor("x", []int64{n + 1}, make([]float32, n+1))
			if out, err := s.Run([]oip.Tensor{in}, []string{"y"}); err != nil || !bytes.Equal(out[0].Data, in.Data) {
				t.Fatalf("%d: %v", n, err)
			}
		}
	})
}

// Requests come at once from bindings and from HTTP; each must get its own result.
func TestConcurrentRuns(t *testing.T) {
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		s := load(t, e, sumAndProduct)
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 50 {
					a := oip.FP32Tensor("a", []int64{2}, []float32{float32(g), float32(i)})
					b := oip.FP32Tensor("b", []int64{2}, []float32{1, 1})
					out, err := s.Run([]oip.Tensor{a, b}, []string{"sum"})
					if err != nil || !reflect.DeepEqual(out[0].Float32s(), []float32{float32(g + 1), float32(i + 1)}) {
						t.Errorf("%d, %d: %v, %v", g, i, out, err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// A model of long signals can't run on one sample; it must pass its warm-up all the same, and one that can't run at all
// must not.
func TestWarmUpFindsShape(t *testing.T) {
	conv := onnxfile.Model{Name: "conv", Opset: 13,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1, -1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1, -1}}},
		Weights: []onnxfile.Tensor{onnxfile.Floats("w", []int64{1, 1, 9}, make([]float32, 9))},
		Nodes: []onnxfile.Node{{Op: "Conv", In: []string{"x", "w"}, Out: []string{"y"},
			Attributes: []onnxfile.Attribute{{Name: "kernel_shape", Ints: []int64{9}}, {Name: "strides", Ints: []int64{1}}, {Name: "pads", Ints: []int64{0, 0}}}}}}
	impossible := onnxfile.Model{Name: "impossible", Opset: 14,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1}}},
		Weights: []onnxfile.Tensor{onnxfile.Int64s("shape", 7, 11)},
		Nodes:   []onnxfile.Node{{Op: "Reshape", In: []string{"x", "shape"}, Out: []string{"y"}}}}
	eachEngine(t, func(t *testing.T, e engine.Engine) {
		if err := engine.WarmUp(load(t, e, conv)); err != nil {
			t.Error(err)
		}
		s, err := e.Load(impossible.Marshal(), engine.Options{Threads: 1})
		if err != nil {
			return // noticed even earlier
		}
		defer s.Close()
		if err := engine.WarmUp(s); err == nil || !strings.Contains(err.Error(), "warm-up") {
			t.Error(err)
		}
	})
}

// A damaged file with a correct digest must be refused with an error, never take the worker down by a signal: only then
// does the edge know that the model is at fault.
func TestDamagedModels(t *testing.T) {
	good, err := os.ReadFile("../../../../e2e/bearing/bearing-2.onnx")
	if err != nil {
		t.Fatal(err)
	}
	damaged := map[string][]byte{"empty": {}, "text": []byte("this is not a model\n"), "zeros": make([]byte, 1000)}
	for _, n := range []int{1, 10, 100, 1000, 10000, len(good) - 1} {
		damaged["cut at "+strconv.Itoa(n)] = good[:n]
	}
	for i := 7; i < len(good); i += len(good) / 40 {
		b := bytes.Clone(good)
		copy(b[i:], "\xff\xff\xff\xff")
		damaged[fmt.Sprintf("overwritten at %d", i)] = b
	}
	unknown := identity(oip.FP32, 1)
	unknown.Nodes[0].Op = "NoSuchOperator"
	damaged["unknown operator"] = unknown.Marshal()
	short := sumAndProduct
	short.Weights = []onnxfile.Tensor{{Name: "b", Type: onnxfile.Float, Shape: []int64{1 << 40}, Raw: []byte{1, 2, 3}}}
	damaged["weights shorter than their shape"] = short.Marshal()
	dangling := identity(oip.FP32, 1)
	dangling.Nodes[0].In = []string{"nowhere"}
	damaged["input from nowhere"] = dangling.Marshal()
	mustFail := []string{"empty", "text", "cut at 1000", "unknown operator", "weights shorter than their shape", "input from nowhere"}

	eachEngine(t, func(t *testing.T, e engine.Engine) {
		failed := map[string]bool{}
		for name, model := range damaged {
			s, err := e.Load(model, engine.Options{Threads: 1})
			if err == nil {
				err = engine.WarmUp(s)
				s.Close()
			}
			failed[name] = err != nil
		}
		for _, name := range mustFail {
			if !failed[name] {
				t.Errorf("%s: loaded and ran", name)
			}
		}
	})
}

// Weights stored as INT8 must still be computed with as floats: with INT8 arithmetic the results would be visibly wrong.
func TestWeightOnlyQuantization(t *testing.T) {
	const in, out = 64, 3
	floats, q, scale := make([]float32, in*out), make([]byte, in*out), make([]float32, out)
	for j := range out {
		scale[j] = 0.01 * float32(j+1)
	}
	for i := range in {
		for j := range out {
			v := int8((i*37 + j*11) % 255)
			q[i*out+j] = byte(v)
			floats[i*out+j] = float32(v) * scale[j]
		}
	}
	m := onnxfile.Model{Name: "int8", Opset: 13,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, in}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, out}}},
		Weights: []onnxfile.Tensor{{Name: "q", Type: onnxfile.Int8, Shape: []int64{in, out}, Raw: q}, onnxfile.Floats("scale", []int64{out}, scale)},
		Nodes: []onnxfile.Node{
			{Op: "DequantizeLinear", In: []string{"q", "scale"}, Out: []string{"w"}, Attributes: []onnxfile.Attribute{{Name: "axis", Int: 1}}},
			{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"y"}}}}
	x := make([]float32, in)
	want := make([]float32, out)
	for i := range x {
		x[i] = float32(math.Sin(float64(i)))
		for j := range out {
			want[j] += x[i] * floats[i*out+j]
		}
	}
	s := load(t, openORT(t), m)
	got, err := s.Run([]oip.Tensor{oip.FP32Tensor("x", []int64{1, in}, x)}, []string{"y"})
	if err != nil {
		t.Fatal(err)
	}
	for j, v := range got[0].Float32s() {
		if math.Abs(float64(v-want[j])) > 1e-4*math.Max(1, math.Abs(float64(want[j]))) {
			t.Errorf("output %d is %v, want %v", j, v, want[j])
		}
	}
}

// A worker runs for months: what an inference takes outside of Go's heap must come back.
func TestMemoryComesBack(t *testing.T) {
	const size = 1 << 20
	e := openORT(t)
	floats, texts := load(t, e, identity(oip.FP32, -1)), load(t, e, identity(oip.Bytes, -1))
	in := oip.FP32Tensor("x", []int64{size / 4}, make([]float32, size/4))
	text := oip.Tensor{Name: "x", Datatype: oip.Bytes, Shape: []int64{1}, Data: oip.AppendString(nil, strings.Repeat("x", size))}
	run := func(n int) {
		for range n {
			if _, err := floats.Run([]oip.Tensor{in}, []string{"y"}); err != nil {
				t.Fatal(err)
			}
			if _, err := texts.Run([]oip.Tensor{text}, []string{"y"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(10)
	before := resident(t)
	run(60) // 240 MiB in and out
	if grown := resident(t) - before; grown > 50<<20 {
		t.Errorf("grew by %d MiB", grown>>20)
	}
}

func resident(t *testing.T) int64 {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// BenchmarkRun is one window of the classifier by the engine alone. p50 is in microseconds.
func BenchmarkRun(b *testing.B) {
	model, err := os.ReadFile("../../../../e2e/bearing/bearing-2.onnx")
	if err != nil {
		b.Fatal(err)
	}
	pure, err := gomlx.Open()
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range []engine.Engine{pure, openORT(b)} {
		b.Run(e.Name(), func(b *testing.B) {
			s, err := e.Load(model, engine.Options{Threads: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			in := []oip.Tensor{oip.FP32Tensor("vibration", []int64{1, 1024}, make([]float32, 1024))}
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				if _, err := s.Run(in, []string{"probabilities"}); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1000, "p50-µs")
		})
	}
}
