package desired

import (
	"crypto/ed25519"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// List is what one edge should hold: sorted entries and their digest.
type List struct {
	Entries []*longshorepb.Entry
	Digest  Digest
	// Body is the canonical encoding that Digest is about.
	Body []byte
}

// NewList sorts a copy of the entries and computes the digest.
func NewList(entries []*longshorepb.Entry) *List { panic("TODO") }

// Objects gives a hub's sessions the bodies of objects at the moment of sending. Object returns false for what the
// hub's cache does not have (any more).
type Objects interface {
	Object(d Digest) (Object, bool)
}

// SessionConfig is what the hub's side of a session needs.
type SessionConfig struct {
	Cluster, Edge string
	EdgeKey       []byte
	Key           ed25519.PrivateKey
	Objects       Objects
	// ResendMin and ResendMax bound the doubling pause after which a head not reported as applied is sent again (5 s, 2 min).
	ResendMin, ResendMax time.Duration
}

// Session is the hub's side of one connection of one edge. It is a pure state machine: no goroutine, clock or I/O; not
// safe for concurrent use. Feed it with its methods, then call Poll until it returns nothing.
type Session struct{}

// NewSession answers a Hello. It fails, with a reason for the log and the edge's status, on a Hello no edge of this wire sends.
func NewSession(cfg SessionConfig, hello *longshorepb.Hello, now time.Time) (*Session, error) {
	panic("TODO")
}

// SetList tells the newest list according to the hub's cache. Calling it with an equal list costs nothing and sends nothing.
func (s *Session) SetList(now time.Time, l *List) { panic("TODO") }

// Proved answers a Prove action: the hub's cache now holds at least what the source held when Prove was asked; l is the list
// then. A failed proof is retried by the caller, not reported here.
func (s *Session) Proved(now time.Time, l *List) { panic("TODO") }

// Fetch notes a subscription to an object or list from an offset.
func (s *Session) Fetch(now time.Time, d Digest, offset uint64) { panic("TODO") }

// Reported notes the list digest an edge reports as committed.
func (s *Session) Reported(now time.Time, list []byte) { panic("TODO") }

// Supersede makes the next Poll send a signed "superseded" head and then close.
func (s *Session) Supersede(now time.Time) { panic("TODO") }

// Poll returns the next things to do, at most about 32 KiB of payload, most urgent first; nil when there is nothing.
func (s *Session) Poll(now time.Time) []HubAction { panic("TODO") }

// Deadline is when Poll should be called again if nothing else happens; zero for never.
func (s *Session) Deadline() time.Time { panic("TODO") }

// InSync reports whether the edge has reported the newest list as committed.
func (s *Session) InSync() bool { panic("TODO") }

// HubAction is one of Send, Prove and Close.
type HubAction interface{ hubAction() }

// Send publishes on the edge's connection. Retain marks an answer to a subscribe.
type Send struct {
	Topic   string
	Payload []byte
	Retain  bool
}

// Prove asks the caller to prove the hub's view of this edge and then to call Proved.
type Prove struct{}

// Close asks the caller to end the connection after what was sent before.
type Close struct{ Reason string }

func (Send) hubAction()  {}
func (Prove) hubAction() {}
func (Close) hubAction() {}
