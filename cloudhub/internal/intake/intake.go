package intake

import (
	"context"
	"log/slog"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/inbox"
)

// Config of the embedded store.
type Config struct {
	Logger *slog.Logger
	Dir    string
	// Retention of records by age (30 days) and bytes (4 GiB); the accounting is kept.
	MaxAge   time.Duration
	MaxBytes int64
	// PendingBytes bounds telemetry received and not yet committed, over all edges (32 MiB); past it edges are slowed.
	PendingBytes int64
}

// Intake is the cloud side of telemetry with the embedded Badger sink. Safe for concurrent use.
type Intake struct{}

// Open opens the store; errors say what to do.
func Open(cfg Config) (*Intake, error) { panic("TODO") }

// Run commits what Receive queued, until ctx ends; then closes the store.
func (i *Intake) Run(ctx context.Context) error { panic("TODO") }

// Session is one edge's connection.
type Session struct{}

// Session starts one; ack is called (never concurrently, from Run's goroutines, must not block) whenever there is something
// new to acknowledge to this edge: it wakes the sender, which then calls Ack.
func (i *Intake) Session(edge string, hello *longshorepb.Hello, wake func()) *Session { panic("TODO") }

// Receive queues one telemetry message. It never blocks; past the bounds it drops the message and says so with an error (the edge sends
// it again, since it is not acknowledged). A malformed message is an error for the log and changes nothing.
func (s *Session) Receive(payload []byte) error { panic("TODO") }

// Ack returns the acknowledgement to send now (at most 16 KiB serialized), nil if nothing is new. full asks for the state of
// every epoch the Hello named.
func (s *Session) Ack(full bool) *longshorepb.Ack { panic("TODO") }

// Close ends the session.
func (s *Session) Close() { panic("TODO") }

// Query selects records.
type Query struct {
	Edge, Stream string // empty = all
	From, To     time.Time
	Limit        int
}

// Records streams records in order of (edge, stream, epoch start, sequence) to f until f returns an error.
func (i *Intake) Records(ctx context.Context, q Query, f func(inbox.Record) error) error {
	panic("TODO")
}

// Sum is the account of one (edge, stream) over all epochs: Accepted is what the edge says it accepted (next sequence - 1 summed),
// Delivered what the sink holds or held, Ledgered what was lost and booked; Duplicates counts records booked twice (always 0),
// Resent those received again and not booked; Conflicts same identity with other bytes.
type Sum struct {
	Edge, Stream                                                 string
	Accepted, Delivered, Ledgered, Duplicates, Resent, Conflicts uint64
}

// Ledger returns the sums and the entries.
func (i *Intake) Ledger(ctx context.Context, q Query) ([]Sum, []LedgerEntry, error) { panic("TODO") }

// LedgerEntry is one booked loss.
type LedgerEntry struct {
	Edge, Stream, Reason string
	Epoch                [16]byte
	First, Last          uint64
	At                   time.Time
}
