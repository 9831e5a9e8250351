package inbox

import "github.com/longshore-edge/longshore/proto/longshorepb"

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
