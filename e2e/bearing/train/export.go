package main

import (
	"strconv"
	"strings"

	"github.com/longshore-edge/longshore/e2e/bearing"
	"github.com/longshore-edge/longshore/proto/onnxfile"
)

// graph puts nodes one after another.
type graph struct {
	model onnxfile.Model
	last  string
	count int
}

// then adds a node that takes the last result first, and makes its output the last result.
func (g *graph) then(op string, more []string, attributes ...onnxfile.Attribute) string {
	return g.node(op, append([]string{g.last}, more...), attributes...)
}

func (g *graph) node(op string, in []string, attributes ...onnxfile.Attribute) string {
	g.count++
	g.last = strings.ToLower(op) + strconv.Itoa(g.count)
	g.model.Nodes = append(g.model.Nodes, onnxfile.Node{Op: op, In: in, Out: []string{g.last}, Attributes: attributes})
	return g.last
}

// weight adds a constant and returns its name in a list, as then takes it.
func (g *graph) weight(t onnxfile.Tensor) []string {
	g.model.Weights = append(g.model.Weights, t)
	return []string{t.Name}
}

func (g *graph) scalar(name string, v float32) []string {
	return g.weight(onnxfile.Floats(name, []int64{1}, []float32{v}))
}

func (g *graph) reshape(name string, shape ...int64) {
	g.then("Reshape", g.weight(onnxfile.Int64s(name, shape...)))
}

func (g *graph) mean(axis, keep int64) string {
	return g.then("ReduceMean", nil, onnxfile.Attribute{Name: "axes", Ints: []int64{axis}}, onnxfile.Attribute{Name: "keepdims", Int: keep})
}

// square multiplies the last result with itself.
func (g *graph) square() { g.then("Mul", []string{g.last}) }

// export writes front and network as one ONNX model: samples in, probabilities out. It follows features.go step by step,
// with operators that both ONNX Runtime and GoMLX have.
func export(f *front, n *network, properties []onnxfile.Property) []byte {
	g := &graph{last: "vibration", model: onnxfile.Model{Name: "bearing", Opset: 13, Properties: properties,
		Inputs:  []onnxfile.Value{{Name: "vibration", Type: onnxfile.Float, Shape: []int64{-1, bearing.Window}}},
		Outputs: []onnxfile.Value{{Name: "probabilities", Type: onnxfile.Float, Shape: []int64{-1, int64(bearing.Conditions)}}}}}
	bands := int64(f.bands)

	// Zero mean, power of 1.
	mean := g.mean(1, 1)
	centered := g.node("Sub", []string{"vibration", mean})
	g.square()
	g.mean(1, 1)
	g.then("Add", g.scalar("tiny", tiny))
	rms := g.then("Sqrt", nil)
	g.node("Div", []string{centered, rms})

	// Envelope of each band.
	g.reshape("one_channel", -1, 1, bearing.Window)
	g.then("Conv", g.weight(onnxfile.Floats("filters", []int64{2 * bands, 1, taps}, f.filters)),
		onnxfile.Attribute{Name: "kernel_shape", Ints: []int64{taps}}, onnxfile.Attribute{Name: "strides", Ints: []int64{stride}},
		onnxfile.Attribute{Name: "pads", Ints: []int64{padding, padding}})
	g.square()
	g.reshape("pairs", -1, bands, 2, envelope)
	g.mean(2, 0)
	g.then("Add", []string{"tiny"})
	e := g.then("Sqrt", nil)

	// Its spectrum.
	mean = g.mean(2, 1)
	g.node("Sub", []string{e, mean})
	g.then("MatMul", g.weight(onnxfile.Floats("rhythm", []int64{envelope, 2 * lines}, f.rhythm)))
	g.square()
	g.reshape("parts", -1, bands, 2, lines)
	g.mean(2, 0)
	g.then("Add", g.scalar("floor", floor))
	g.then("Log", nil)
	g.reshape("features", -1, bands*lines)

	// The perceptron; the standardization of the features goes into its first layer.
	weights, bias := n.folded()
	g.dense("hidden", weights, bias)
	g.then("Relu", nil)
	g.dense("final", float32s(n.final.weights), float32s(n.final.bias))
	g.then("Softmax", nil, onnxfile.Attribute{Name: "axis", Int: -1})
	g.model.Nodes[len(g.model.Nodes)-1].Out = []string{"probabilities"}
	return g.model.Marshal()
}

func (g *graph) dense(name string, weights, bias []float32) {
	out := int64(len(bias))
	g.then("MatMul", g.weight(onnxfile.Floats(name+"_weights", []int64{int64(len(weights)) / out, out}, weights)))
	g.then("Add", g.weight(onnxfile.Floats(name+"_bias", []int64{out}, bias)))
}

// folded returns the hidden layer for features that are not standardized.
func (n *network) folded() (weights, bias []float32) {
	h := n.hidden
	b := append([]float64(nil), h.bias...)
	for i := range h.in {
		for j := range h.out {
			w := h.weights[i*h.out+j] * n.scale[i]
			weights = append(weights, float32(w))
			b[j] -= w * n.mean[i]
		}
	}
	return weights, float32s(b)
}

func float32s(values []float64) []float32 {
	out := make([]float32, len(values))
	for i, v := range values {
		out[i] = float32(v)
	}
	return out
}
