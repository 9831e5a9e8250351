// Package uplink keeps an edge's one connection to its cloud hub.
//
// Per connection one goroutine owns the replica (what arrives, what it wants done, its timers) and one owns the socket's
// outgoing side. The writer picks, message by message, the most urgent thing there is: what the replica wants sent, then
// reports, then live telemetry, then the backlog. Nothing is queued but names of things to look at again, so a week
// without a link costs no memory.
package uplink
