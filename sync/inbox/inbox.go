package inbox

import (
	"context"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// ID names a record.
type ID struct {
	Edge   string
	Epoch  [16]byte
	Stream string
	Seq    uint64
}

// Record as it reaches a sink.
type Record struct {
	ID
	// WallNs is nanoseconds since 1970 UTC, corrected by the newest clock mapping; Quality says how good it is.
	WallNs  int64
	Quality longshorepb.ClockQuality
	MonoNs  int64
	BootID  string
	Topic   string
	Payload []byte
	// Historical: sent from the backlog lane.
	Historical bool
}

// Account is the books of one (edge, epoch, stream): Ranges of what is delivered and of what is ledgered, a pure value.
type Account struct{}

// Sink stores records together with the accounts, in one transaction, durably.
// (implemented by cloudhub/internal/intake)
type Sink interface {
	Commit(ctx context.Context, b Batch) error
}

// Batch is what one commit holds.
type Batch struct {
	Records []Record
	Losses  []*longshorepb.Loss
	// further accounting: owner's choice
}
