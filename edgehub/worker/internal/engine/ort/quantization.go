package ort

import "google.golang.org/protobuf/encoding/protowire"

// Field numbers of onnx.proto.
const (
	modelGraph = 7
	graphNode  = 1
	nodeOpType = 4
)

// weightOnly reports whether a model only dequantizes: its weights are stored small, its activations are floats. A model
// that also quantizes means INT8 arithmetic. What can't be parsed is left to ONNX Runtime to refuse.
func weightOnly(model []byte) bool {
	quantizes, dequantizes := false, false
	eachField(model, modelGraph, func(graph []byte) {
		eachField(graph, graphNode, func(node []byte) {
			eachField(node, nodeOpType, func(op []byte) {
				switch string(op) {
				case "DequantizeLinear":
					dequantizes = true
				case "QuantizeLinear", "DynamicQuantizeLinear":
					quantizes = true
				}
			})
		})
	})
	return dequantizes && !quantizes
}

// eachField calls f for every length-delimited field with the given number.
func eachField(message []byte, number protowire.Number, f func([]byte)) {
	for len(message) > 0 {
		num, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return
		}
		message = message[n:]
		if num == number && kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(message)
			if n < 0 {
				return
			}
			f(value)
			message = message[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, kind, message); n < 0 {
			return
		}
		message = message[n:]
	}
}
