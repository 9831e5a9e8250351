// Package intake takes telemetry from edges into a sink that makes it durable before it is acknowledged.
//
// # Storage
//
// The embedded sink is Badger. Frames are stored as the edge encoded them, one key each; the accounts that say what is held
// are written in the same transaction. Acknowledgements are computed from accounts after their commit. Keys, with 0x00
// between names (which contain none) and big-endian numbers:
//
//	e <edge> 00 <epoch>                              ordinal of the epoch: when it was first heard of, in nanoseconds
//	a <edge> 00 <stream> 00 <ordinal>                epoch, account
//	d <edge> 00 <stream> 00 <ordinal> <first>        frame, with what the hub adds
//	c <edge> 00 <stream> 00 <ordinal> <first> <hash> frame that came under an identity already held, with other content
//	l <edge> 00 <stream> 00 <ordinal> <first>        ledger entry
//	k <edge> 00 <boot>                               how monotonic time of that boot maps to wall time
//	t <time> <number> <bytes>                        keys d and c written by one transaction, for retention
//
// Retention deletes d and c; the accounts and the ledger stay.
package intake
