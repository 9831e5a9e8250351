// Package local is the edge's own MQTT broker for the devices around it.
//
// What a device publishes on a topic that the configuration maps to a stream is on disk before its PUBACK goes out, and
// from then on delivered or ledgered. Everything is fanned out to local subscribers and offered to the models' bindings.
package local
