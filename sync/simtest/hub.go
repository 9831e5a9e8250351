package simtest

import (
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// hub is a cloud hub: a cache that is a position in the cluster's history.
type hub struct {
	w    *World
	name string
	pos  int
	// lag keeps the cache where it is until it is told to watch.
	lag    bool
	conns  []*conn
	proofs []pendingProof
}

type pendingProof struct {
	conn *conn
	pos  int
}

// cacheView is the hub's cache as the session of one edge sees it.
type cacheView struct {
	h    *hub
	edge string
}

func (v cacheView) Object(d desired.Digest) (desired.Object, bool) {
	for _, o := range v.h.w.cluster.at(v.h.pos, v.edge).objects {
		if o.Digest == d {
			return o, true
		}
	}
	return desired.Object{}, false
}

// receive handles a message of an edge.
func (h *hub) receive(c *conn, m message) {
	t, err := topic.Parse(m.topic)
	if err != nil {
		h.w.fail("hub got a topic %q: %v", m.topic, err)
		return
	}
	switch {
	case m.subscribe:
		if c.session != nil && len(t.Digest) > 0 {
			c.session.Fetch(h.w.now, desired.Digest(t.Digest), t.Offset)
		}
	case t.Kind == topic.Hello:
		h.hello(c, m.payload)
	case t.Kind == topic.Reported:
		r, err := account.Decode(m.payload)
		if err != nil {
			h.w.fail("hub got a report: %v", err)
			return
		}
		if c.session != nil && r.GetSession() == c.hello.GetSession() && r.GetSequence() > c.reported {
			c.reported = r.GetSequence()
			c.session.Reported(h.w.now, r.GetList())
		}
	}
	h.work(c)
}

// hello begins a session; of two instances with one identity the later wins.
func (h *hub) hello(c *conn, payload []byte) {
	hello := &longshorepb.Hello{}
	if err := proto.Unmarshal(payload, hello); err != nil {
		h.w.fail("hub got a hello: %v", err)
		return
	}
	if c.hello != nil {
		if c.session != nil && string(c.hello.GetNonce()) == string(hello.GetNonce()) {
			c.session.Again(h.w.now)
		}
		return
	}
	s, err := desired.NewSession(desired.SessionConfig{
		Cluster: "cluster-1", Edge: c.box.edge, EdgeKey: edgeKey(c.box.edge), Key: h.w.key, Objects: cacheView{h, c.box.edge},
	}, hello, h.w.now)
	if err != nil {
		h.w.fail("hub refuses a hello: %v", err)
		return
	}
	c.session, c.hello = s, hello
	s.SetList(h.w.now, h.w.cluster.at(h.pos, c.box.edge).list)
	if old := h.w.owners[c.box.edge]; old != nil && old != c && old.open {
		if old.session != nil && string(old.hello.GetInstance()) != string(hello.GetInstance()) {
			old.session.Supersede(h.w.now)
			old.hub.work(old)
		} else if old.box != c.box {
			old.box.disconnect()
		}
	}
	h.w.owners[c.box.edge] = c
}

// work carries out what a session wants.
func (h *hub) work(c *conn) {
	for c.open && c.session != nil {
		actions := c.session.Poll(h.w.now)
		if actions == nil {
			return
		}
		for _, a := range actions {
			switch a := a.(type) {
			case desired.Send:
				if len(a.Payload) > 16<<10 {
					h.w.fail("a message of %d bytes on %s", len(a.Payload), a.Topic)
				}
				h.w.send(c, &c.down, message{topic: a.Topic, payload: a.Payload})
			case desired.Prove:
				h.w.trace("%s proves %s", h.name, c.box.edge)
				h.proofs = append(h.proofs, pendingProof{c, h.w.cluster.newest()})
				h.prove()
			case desired.Close:
				h.w.trace("%s closes %s: %s", h.name, c.box.name, a.Reason)
				c.session = nil
				c.down.waiting = append(c.down.waiting, arrival{c.down.last.Add(h.w.link.delay), message{end: true}})
			}
		}
	}
}

// prove answers the proofs that the cache has reached.
func (h *hub) prove() {
	waiting := h.proofs
	h.proofs = nil
	for _, p := range waiting {
		switch {
		case !p.conn.open || p.conn.session == nil:
		case h.pos < p.pos:
			h.proofs = append(h.proofs, p)
		default:
			p.conn.session.Proved(h.w.now, h.w.cluster.at(h.pos, p.conn.box.edge).list)
			h.work(p.conn)
		}
	}
}

// watch moves the cache on.
func (h *hub) watch(pos int) {
	h.pos = pos
	for _, c := range append([]*conn(nil), h.conns...) {
		if c.session != nil {
			c.session.SetList(h.w.now, h.w.cluster.at(pos, c.box.edge).list)
			h.work(c)
		}
	}
	h.prove()
}
