// Package frame packs runs of telemetry records into frames, the unit in which they are stored, sent and compared.
//
// A frame is encoded once, on the edge, and never again: the same bytes stand in the outbox, go over the wire and lie in
// the sink. So two frames under one identity are the same records exactly if their bytes are equal.
package frame
