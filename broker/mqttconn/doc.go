// Package mqttconn keeps one MQTT 3.1.1 connection to a broker, with a fresh client id and a clean session each time.
//
// It uses paho's packet codec and not paho's client: there a Publish can outlive its connection by the whole write
// timeout, a short SUBACK panics in a goroutine that nobody can guard, a header may make it allocate 256 MiB, and
// nothing tells when the goroutines of a connection have ended. QoS 0 needs none of what that client adds.
package mqttconn
