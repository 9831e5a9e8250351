// Package plain describes an edge's specs as small JSON, for devices that speak MQTT and nothing else.
//
// ../README.md has the JSON schemas and examples.
package plain
