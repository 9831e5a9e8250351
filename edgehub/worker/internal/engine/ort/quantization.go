package ort

import "github.com/longshore-edge/longshore/proto/onnxfile"

// weightOnly reports whether a model only dequantizes: its weights are stored small, its activations are floats. A model
// that also quantizes means INT8 arithmetic. What can't be parsed is left to ONNX Runtime to refuse.
func weightOnly(model []byte) bool {
	ops := onnxfile.Operators(model)
	return ops["DequantizeLinear"] > 0 && ops["QuantizeLinear"] == 0 && ops["DynamicQuantizeLinear"] == 0
}
