package desired

import (
	"crypto/ed25519"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// ReplicaConfig is what the edge's side needs.
type ReplicaConfig struct {
	Edge    string
	EdgeKey []byte
	// HubKeys are the public keys whose heads are believed.
	HubKeys []ed25519.PublicKey
	// MaxListBytes and MaxObjectBytes refuse what would not fit the box (16 MiB, 4 MiB).
	MaxListBytes, MaxObjectBytes uint64
	AgentVersion                 string
	Instance                     [16]byte
}

// Replica is the edge's side: a pure state machine, as Session is. Feed it, then execute what Poll returns, in order.
// An action that cannot be executed (disk full) ends the session: call Stop, and later Start again.
type Replica struct{}

// NewReplica continues from what the store holds.
func NewReplica(cfg ReplicaConfig, stored Stored) *Replica { panic("TODO") }

// Start begins a session on a fresh connection. nonce must be random, session higher than ever before.
func (r *Replica) Start(now time.Time, nonce [16]byte, session uint64, outboxes []*longshorepb.OutboxHead) {
	panic("TODO")
}

// Stop ends the session; partial objects are kept for the next.
func (r *Replica) Stop() { panic("TODO") }

// Receive takes a message of the topics index, objects, models and push. An error says what was wrong with it, for a
// counter and the log; the replica's state is then unchanged.
func (r *Replica) Receive(now time.Time, topic string, payload []byte) error { panic("TODO") }

// Poll returns the next actions; nil when there is nothing to do.
func (r *Replica) Poll(now time.Time) []EdgeAction { panic("TODO") }

// Deadline is when Poll should be called again if nothing else happens; zero for never.
func (r *Replica) Deadline() time.Time { panic("TODO") }

// Status for people and reports.
func (r *Replica) Status() ReplicaStatus { panic("TODO") }

// ReplicaStatus says where the replica stands.
type ReplicaStatus struct {
	// Committed is the list that holds; Target the one being fetched, zero if none.
	Committed, Target Digest
	// Synced is set when in this session a head named the committed list.
	Synced bool
	// Superseded is set when a later instance took over: the owner closes the connection and does not come back by itself.
	Superseded bool
	// Have and Want count encoded bytes of the objects being fetched.
	Have, Want uint64
	Cluster    string
}

// EdgeAction is one of Publish, Subscribe, SaveObject, SavePart and Commit.
type EdgeAction interface{ edgeAction() }

// Publish sends a message up.
type Publish struct {
	Topic   string
	Payload []byte
}

// Subscribe asks for topics.
type Subscribe struct{ Topics []string }

// SavePart keeps a part of an object, so that fetching resumes after a crash. It need not be synced to disk.
type SavePart struct {
	Digest Digest
	Offset uint64
	Data   []byte
	Total  uint64
	Kind   longshorepb.Kind
	Enc    longshorepb.Encoding
}

// SaveObject stores one verified object (or list), inert.
type SaveObject struct{ Object Object }

// Commit makes a list the current one, in one transaction, durably, and collects what neither it, nor the last good one,
// nor a list in flight names. Every object it names is stored.
type Commit struct {
	List    *List
	Cluster string
}

func (Publish) edgeAction()    {}
func (Subscribe) edgeAction()  {}
func (SavePart) edgeAction()   {}
func (SaveObject) edgeAction() {}
func (Commit) edgeAction()     {}
