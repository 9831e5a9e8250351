// Package desired brings what an edge should hold from a cloud hub to the edge.
//
// Both ends are pure state machines: [Session] on the hub, one per connection, and [Replica] on the edge. They know no
// goroutine, clock or I/O; their owners feed them messages and the time and carry out the actions they return. [Store]
// keeps what a replica holds. ../README.md describes the protocol.
package desired
