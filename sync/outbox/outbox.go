package outbox

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// ErrFull is the verdict on a record of a stream with Policy Refuse whose quota is full.
var ErrFull = errors.New("stream quota is full")

// Policy says what happens when a stream's quota is full.
type Policy string

// The policies.
const (
	DropOldest Policy = "drop-oldest" // and ledger it
	Refuse     Policy = "refuse"
)

// Quota of one stream. Zero values mean the default in parentheses.
type Quota struct {
	MaxBytes int64         // on disk (256 MiB)
	MaxAge   time.Duration // monotonic; 0 = unlimited
	Policy   Policy        // (drop-oldest)
}

// Config of a Log.
type Config struct {
	Logger *slog.Logger
	// Quotas by stream; Default for streams not named.
	Quotas  map[string]Quota
	Default Quota
	// MaxRecord bounds one record's payload in bytes (128 KiB).
	MaxRecord int
	// SegmentBytes (4 MiB).
	SegmentBytes int64
}

// Record is what a producer hands in.
type Record struct {
	Stream  string
	Topic   string
	Payload []byte
}

// Log is a set of segmented files below one directory. Safe for concurrent use. Each Open starts a new epoch; earlier
// epochs are kept until acknowledged or dropped.
type Log struct{}

// Open recovers dir (torn tails are cut; a damaged batch is ledgered, not fatal) and starts a new epoch. It starts nothing.
func Open(dir string, cfg Config) (*Log, error) { panic("TODO") }

// Run does the background work (quotas by age, ledger, statistics) until ctx ends. Appends work without it.
func (l *Log) Run(ctx context.Context) error { panic("TODO") }

// Close syncs and closes the files.
func (l *Log) Close() error { panic("TODO") }

// Append writes records and returns when they are on disk (fsync), sharing the sync with other callers (group commit). The
// verdicts match recs: nil means accepted, will be delivered or ledgered. err is set when nothing was accepted, such as on
// a full disk.
func (l *Log) Append(ctx context.Context, recs []Record) (verdicts []error, err error) { panic("TODO") }

// Appended is a 1-slot signal: look again.
func (l *Log) Appended() <-chan struct{} { panic("TODO") }

// Heads for the Hello: epochs that hold something not acknowledged.
func (l *Log) Heads() []*longshorepb.OutboxHead { panic("TODO") }

// Reader walks what is not acknowledged and builds batches to send.
// One for the live lane (records appended since the session began, newest epoch) and one for the backlog lane.
type Reader struct{}

// NewReader starts at the oldest record not acknowledged for the backlog lane, at the end for the live lane. Both
// together cover every record; what the live lane could not send before its connection ended is the next session's backlog.
func (l *Log) NewReaders() (live, backlog *Reader) { panic("TODO") }

// Next returns the next message to send, at most maxBytes serialized (never above 16 KiB); nil if there is none now.
// Ranges acknowledged meanwhile are skipped.
func (r *Reader) Next(maxBytes int) (*longshorepb.Telemetry, error) { panic("TODO") }

// Ack notes what the sink holds and gives the disk back. Acknowledgements of anything never sent are refused with an error.
func (l *Log) Ack(a *longshorepb.Ack) error { panic("TODO") }

// StreamStats of one stream over all epochs held.
type StreamStats struct {
	Stream                            string
	Accepted, Acked, Dropped, Refused uint64 // records, since the state directory was made (Refused: since start)
	Held                              uint64 // records held and not acknowledged
	HeldBytes                         int64
	OldestAge                         time.Duration
}

// Stats for status and metrics; disk bytes in all.
func (l *Log) Stats() (streams []StreamStats, diskBytes int64) { panic("TODO") }
