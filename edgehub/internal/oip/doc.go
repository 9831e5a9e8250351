// Package oip reads and writes the Open Inference Protocol v2, HTTP/REST with the binary tensor data extension.
//
// The protocol: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. The extension:
// "Binary Tensor Data Extension" in the KServe documentation. It also says what devices that speak MQTT only may send to
// a model and what they get back (FromDevice, ToDevice).
//
// Every value of this package is plain data: safe to read concurrently, not to be changed while it is read.
package oip
