// Package outbox is the durable log in which an edge keeps records until the cloud holds them.
//
// # Why segments of our own
//
// tidwall/wal and hashicorp/raft-wal are one sequence that is cut at its ends. Here several streams with quotas of their
// own share a disk, records are acknowledged out of order, a damaged batch must cost itself alone and be accounted for, and
// nothing of an old start of the agent may be mixed with a new one; that fits neither, and what is left to share is little.
//
// # On disk
//
//	DIR/lock                         held while open
//	DIR/state                        what was acknowledged, dropped and ledgered; replaced atomically
//	DIR/epochs/<epoch>/<stream>.<first>.seg
//
// Every Open is an epoch. Each stream of an epoch has a sequence of segment files of its own, so that a full or slow stream
// never pins the space of another; a segment is a run of batches, each a header with checksums and one frame as it
// goes over the wire. A segment's name says its first sequence and so ends the one before it: what stands beyond that
// in the older file was never acknowledged to anybody. Files of earlier epochs are never written again, so a torn tail
// needs no repair, it is simply the end.
//
// # Order of writes
//
// An append is acknowledged after the fsync of its segment (and of its directory, if the file is new). After a write or fsync
// error the segment is abandoned at its last good batch and the next append begins another: a second fsync of the same
// file could claim success for pages the kernel has thrown away. The state file is durable before any
// segment is unlinked, so every sequence is at any moment in a segment, acknowledged, or in the ledger. Only a disk without a single
// free block turns this round: there the oldest segment makes room for the state, and a start in between ledgers what it misses.
//
// # Records that are never stored
//
// A record too large for its stream can only be refused for ever. A producer that can't be told (a device with MQTT 3.1.1) sends it
// again on every connection, and nothing behind it gets through. LoseTooLarge gives such records sequences and ledgers them in the
// same step, so that the producer may be answered as if they were accepted, and accepted is still delivered plus ledgered.
//
// # Time
//
// Age counts on the log's own clock: CLOCK_BOOTTIME, continued over boots from the last reading known. Time with the box
// switched off does not count; the wall clock is only noted, never used.
package outbox
