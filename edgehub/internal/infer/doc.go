// Package infer serves the models an edge should serve, each in a worker process behind the Open Inference Protocol.
package infer
