// Package broker is an MQTT 3.1.1 and 5 broker on which clients with fixed ids and persistent sessions are safe.
package broker
