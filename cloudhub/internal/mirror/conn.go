package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	reports "github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// Bounds of what one connection may have waiting for its sender; past them it is closed.
const (
	maxHello        = 64 << 10
	maxFetches      = 4096
	maxPlainFilters = 64
	maxFilterBytes  = 1024
)

// conn is one connection as the broker's callbacks see it. They note things in it and wake its sender, which takes them.
// wake may be called by anyone; the fields below mu are guarded by it.
type conn struct {
	*broker.Conn
	edge   string
	sender *sender // set before anybody knows the connection

	mu       sync.Mutex
	greeting *longshorepb.Hello // set once
	uplink   *intake.Session    // nil before the hello, without an intake and after the end
	account  account
	plain    []string // filters below plain/ that are subscribed
	in       inbox
}

// wake has the sender look again; it never blocks.
func (c *conn) wake() { c.sender.task.wake() }

// inbox is what waits for the sender.
type inbox struct {
	opened   bool // a hello came
	again    bool // and came again
	fetches  []fetch
	filters  []string // plain filters not answered yet
	acks     bool     // acknowledgements are asked for in full
	reported bool     // the account changed
	// What others ask of the sender.
	supersede bool
	close     string // a reason
}

type fetch struct {
	digest desired.Digest
	offset uint64
}

// subscribe notes one granted filter; an error is a reason to close the connection.
func (c *conn) subscribe(filter string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if isPlain(c.edge, filter) {
		if slices.Contains(c.plain, filter) && slices.Contains(c.in.filters, filter) {
			return nil
		}
		if len(c.plain) >= maxPlainFilters && !slices.Contains(c.plain, filter) || len(c.in.filters) >= maxPlainFilters || len(filter) > maxFilterBytes {
			return fmt.Errorf("more than %d subscriptions, or one longer than %d bytes", maxPlainFilters, maxFilterBytes)
		}
		if !slices.Contains(c.plain, filter) {
			c.plain = append(c.plain, filter)
		}
		c.in.filters = append(c.in.filters, filter)
		return nil
	}
	t, err := topic.Parse(filter)
	if err != nil {
		return err
	}
	switch t.Kind {
	case topic.Ack:
		c.in.acks = true
	case topic.Objects, topic.Models:
		if len(c.in.fetches) >= maxFetches {
			return fmt.Errorf("more than %d objects asked for at one time", maxFetches)
		}
		c.in.fetches = append(c.in.fetches, fetch{desired.Digest(t.Digest), t.Offset})
	}
	return nil
}

func (c *conn) unsubscribe(filters []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plain = slices.DeleteFunc(c.plain, func(f string) bool { return slices.Contains(filters, f) })
	c.in.filters = slices.DeleteFunc(c.in.filters, func(f string) bool { return slices.Contains(filters, f) })
}

// repeated reports whether h is the hello that came before: the edge has not seen an answer yet.
func (c *conn) repeated(h *longshorepb.Hello) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	same := c.greeting != nil && bytes.Equal(c.greeting.Nonce, h.GetNonce())
	c.in.again = c.in.again || same
	return same
}

// open notes the hello of the session that this connection carries.
func (c *conn) open(h *longshorepb.Hello, uplink *intake.Session, before account) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.greeting != nil {
		return errors.New("another one on the same connection")
	}
	c.greeting, c.uplink, c.account = h, uplink, follow(before, h)
	c.in.opened = true
	return nil
}

func (c *conn) report(payload []byte) (absurd int, err error) {
	r, err := reports.Decode(payload)
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.greeting == nil {
		return 0, errors.New("before the hello")
	}
	absurd, err = c.account.merge(r)
	c.in.reported = c.in.reported || err == nil
	return absurd, err
}

func (c *conn) telemetry(payload []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.uplink == nil {
		return errors.New("before the hello, or the hub takes none")
	}
	return c.uplink.Receive(payload)
}

// hangUp ends the telemetry session.
func (c *conn) hangUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.uplink != nil {
		c.uplink.Close()
		c.uplink = nil
	}
}

// order asks the sender to close the connection for a reason, or to tell the edge that it is superseded.
func (c *conn) order(reason string, supersede bool) {
	c.mu.Lock()
	c.in.close, c.in.supersede = reason, supersede
	c.mu.Unlock()
	c.wake()
}

// take empties the inbox.
func (c *conn) take() inbox {
	c.mu.Lock()
	defer c.mu.Unlock()
	in := c.in
	c.in = inbox{}
	return in
}

func (c *conn) hello() *longshorepb.Hello {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.greeting
}

func (c *conn) instance() string { return hexInstance(c.hello()) }

// reportedList returns the digest of the list the edge says it holds.
func (c *conn) reportedList() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.account.list
}

// accountHeld reports whether the account that the hello names was held here when it came.
func (c *conn) accountHeld() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.account.named
}

// reported returns the account as it is now.
func (c *conn) reported() account {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.account.clone()
}

// keep returns what is kept of the account when the connection has ended.
func (c *conn) keep() account {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.account.kept()
}

func (c *conn) plainFilters() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.plain)
}

// state returns what is known of the edge, as a value of its own.
func (c *conn) state() EdgeState {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &c.account
	s := EdgeState{
		Edge: c.edge, Online: true, Session: c.greeting.GetSession(), Sequence: a.sequence, LastContact: time.Now(),
		AgentVersion: agentVersion(c.greeting, a.node), Node: a.node, Complete: a.complete,
		Pods: maps.Clone(a.pods), Models: maps.Clone(a.models),
	}
	if c.greeting != nil {
		s.Instance = hexInstance(c.greeting)
	}
	return s
}

// acknowledgement returns what is to be acknowledged to the edge, nil if nothing is.
func (c *conn) acknowledgement(full bool) *longshorepb.Ack {
	c.mu.Lock()
	uplink := c.uplink
	c.mu.Unlock()
	if uplink == nil {
		return nil
	}
	return uplink.Ack(full)
}

// keepOnly drops from a state what is not about this edge's pods and models (any more).
func (s *EdgeState) keepOnly(v *View, list *desired.List) {
	maps.DeleteFunc(s.Pods, func(uid types.UID, _ *longshorepb.PodReport) bool { return !v.HasPod(uid) })
	if list == nil {
		return
	}
	models := map[string]bool{}
	for _, e := range list.Entries {
		if e.Kind == longshorepb.Kind_KIND_MODEL {
			models[e.Namespace+"/"+e.Name] = true
		}
	}
	maps.DeleteFunc(s.Models, func(key string, _ *longshorepb.ModelReport) bool { return !models[key] })
}

// offline is the state of an edge of which only the source knows.
func offline(e *v1alpha1.Edge) EdgeState {
	s := EdgeState{
		Edge: e.Name, Session: uint64(max(0, e.Status.Session)), Sequence: uint64(max(0, e.Status.Sequence)),
		Instance: e.Status.Instance, AgentVersion: e.Status.AgentVersion,
	}
	if e.Status.LastContact != nil {
		s.LastContact = e.Status.LastContact.Time
	}
	if e.Status.BacklogRecords > 0 {
		s.Node = &longshorepb.NodeReport{BacklogRecords: uint64(e.Status.BacklogRecords)}
	}
	return s
}
