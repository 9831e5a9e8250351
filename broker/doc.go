// Package broker is an embedded MQTT 3.1.1 and 5 server that keeps what it acknowledged.
//
// The protocol engine is mochi-mqtt: packets, the topic tree, CONNECT, SUBSCRIBE, PINGREQ. What decides whether a
// message arrives is this package's own: sockets that notice a stalled peer, connects serialised per client,
// sessions with a bounded queue and an in-flight window, acknowledgements after the store has the message, wills that
// go the same way. To mochi every connection is a new client without inherited state, so none of its session code,
// outbound channels or in-flight maps take part.
//
// How a message travels: the connection's read goroutine hands a PUBLISH to the commit queue (commit.go), one goroutine
// stores batches and acknowledges, then fans out (route.go) into the queue of each session (session.go), from which
// one write goroutine per connection (conn.go) sends. No lock is held across a socket write but the connection's own.
package broker
