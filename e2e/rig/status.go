package rig

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"time"
)

// EdgeStatus is the part of "edgehub status -o json" that is looked at here.
type EdgeStatus struct {
	Agent struct{ MemoryBytes uint64 }
	Clock struct{ Quality string }
	Link  struct {
		State, Error string
		Session      uint64
		Rejected     uint64
	}
	List struct {
		Committed, Error string
		Synced           bool
	}
	Pods []struct {
		Namespace, Name, UID, Phase, Reason string
		Finished                            bool
	}
	Models []ModelStatus
	Outbox struct {
		Streams   []StreamStatus
		DiskBytes int64
	}
	Warnings []string
}

// ModelStatus is one model on one edge.
type ModelStatus struct {
	Namespace, Name, DesiredVersion, ServingVersion string
	State, Reason, Message, Engine                  string
}

// StreamStatus is one stream of an outbox.
type StreamStatus struct {
	Stream                                  string
	Accepted, Acked, Held, Dropped, Refused uint64
	HeldBytes                               int64
}

// Status asks the edge's HTTP door.
func (e *Edge) Status(ctx context.Context) (EdgeStatus, error) {
	var s EdgeStatus
	return s, GetJSON(ctx, "http://"+e.HTTP+"/status", &s)
}

// Model returns the status of a model, or an error if the edge does not have it.
func (s EdgeStatus) Model(name string) (ModelStatus, error) {
	for _, m := range s.Models {
		if m.Name == name {
			return m, nil
		}
	}
	return ModelStatus{}, fmt.Errorf("no model %s among %+v", name, s.Models)
}

// Stream returns the counts of a stream, zero if it has none.
func (s EdgeStatus) Stream(name string) StreamStatus {
	for _, st := range s.Outbox.Streams {
		if st.Stream == name {
			return st
		}
	}
	return StreamStatus{Stream: name}
}

// HubEdge is an edge as the hub's API shows it.
type HubEdge struct {
	Name, Link string
	// Superseded counts the instances that this one took over from.
	Superseded int `json:"-"`
	Synced     bool
	Pods       []struct{ Namespace, Name, UID, Phase, Waiting string }
	Models     []ModelStatus
}

// Edges asks the hub's API, by name.
func (h *Hub) Edges(ctx context.Context) (map[string]HubEdge, error) {
	var list []HubEdge
	err := GetJSON(ctx, "http://"+h.HTTP+"/api/v1/edges", &list)
	edges := map[string]HubEdge{}
	for _, e := range list {
		if holder, ok := edges[e.Name]; ok { // superseded instances follow the one that took over
			holder.Superseded++
			e = holder
		}
		edges[e.Name] = e
	}
	return edges, err
}

// Sum is the account of one stream.
type Sum struct {
	Edge, Stream                                                 string
	Accepted, Delivered, Ledgered, Duplicates, Resent, Conflicts uint64
}

// Balanced says whether every accepted record is delivered or ledgered, and none twice.
func (s Sum) Balanced() bool { return s.Accepted == s.Delivered+s.Ledgered && s.Duplicates == 0 }

// Sums asks the hub for its accounts.
func (h *Hub) Sums(ctx context.Context) ([]Sum, error) {
	var ledger struct{ Sums []Sum }
	return ledger.Sums, GetJSON(ctx, "http://"+h.HTTP+"/api/v1/ledger", &ledger)
}

// Sum returns the account of one stream, zero if there is none.
func (h *Hub) Sum(ctx context.Context, edge, stream string) (Sum, error) {
	sums, err := h.Sums(ctx)
	for _, s := range sums {
		if s.Edge == edge && s.Stream == stream {
			return s, err
		}
	}
	return Sum{Edge: edge, Stream: stream}, err
}

// Record is one line of the hub's telemetry.
type Record struct {
	Edge, Stream, Epoch, Topic, Clock, Payload string
	Sequence                                   uint64
	Historical                                 bool
	Time                                       time.Time
}

// Records returns all of a stream's records in the sink.
func (h *Hub) Records(ctx context.Context, edge, stream string) ([]Record, error) {
	q := url.Values{"edge": {edge}, "stream": {stream}, "limit": {"1000000"}}
	b, err := Get(ctx, "http://"+h.HTTP+"/api/v1/telemetry?"+q.Encode())
	if err != nil {
		return nil, err
	}
	var records []Record
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r Record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return nil, err
		}
		records = append(records, r)
	}
	return records, lines.Err()
}
