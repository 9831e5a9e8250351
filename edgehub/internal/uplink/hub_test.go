package uplink

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/outbox"
	"github.com/longshore-edge/longshore/sync/seqset"
	"github.com/longshore-edge/longshore/sync/topic"
)

const edgeName = "edge-1"

// hub is the cloud's side for these tests: the real broker and the real session, with a sink in memory that can be told
// to lose or to withhold.
type hub struct {
	t      *testing.T
	key    ed25519.PrivateKey
	token  string
	digest [32]byte // of the token
	door   *link    // stays over restarts
	addr   string   // of the door
	stop   func()   // ends the broker and all connections

	mu      sync.Mutex
	list    *desired.List
	objects map[desired.Digest]desired.Object
	conn    *hubConn // newest
	hellos  []*longshorepb.Hello
	reports []*longshorepb.Reported
	records map[string][]string // payloads by stream in order of arrival, each identity once
	have    map[string]*seqset.Set
	resent  int
	part    []byte // of the frame that comes in fragments
	clocks  map[string]*longshorepb.Clock
	deaf    int // telemetry messages to lose
	// lostReports is how many reports of a committed list to lose.
	lostReports int
	withhold    bool
	unknown     bool         // the hub knows no such Edge
	books       books        // of what is reported
	order       []topic.Kind // of everything received
}

type hubConn struct {
	*broker.Conn
	session *desired.Session
	wake    chan struct{}
	acks    bool // asked for
	dirty   bool // something new to acknowledge
}

func newHub(t *testing.T) *hub {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		t.Fatal(err)
	}
	h := &hub{
		t: t, key: key, token: base64.RawURLEncoding.EncodeToString(secret), digest: sha256.Sum256(secret),
		objects: map[desired.Digest]desired.Object{}, records: map[string][]string{}, have: map[string]*seqset.Set{},
		clocks: map[string]*longshorepb.Clock{}, list: desired.NewList(nil),
	}
	h.door = newLink(t, "", 0)
	h.addr = h.door.Addr().String()
	h.start()
	t.Cleanup(func() { h.stop() })
	return h
}

// start serves; a later start is the same hub after a restart.
func (h *hub) start() {
	h.t.Helper()
	b, err := broker.New(broker.Config{Listeners: []broker.Listener{{Name: "hub", Address: "127.0.0.1:0"}}, Auth: h, Virtual: h})
	if err != nil {
		h.t.Fatal(err)
	}
	h.door.aim(b.Addr("hub").String())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	h.stop = sync.OnceFunc(func() {
		h.door.aim("")
		cancel()
		if err := <-done; err != nil {
			h.t.Error("broker:", err)
		}
	})
}

func (h *hub) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	if l.Username != edgeName || string(l.Password) != h.token {
		return broker.Identity{}, errors.New("unknown edge")
	}
	return broker.Identity{Name: edgeName, Key: h.digest[:], Access: everything{}}, nil
}

type everything struct{}

func (everything) Publish(string) bool   { return true }
func (everything) Subscribe(string) bool { return true }

func (h *hub) Connected(c *broker.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conn = &hubConn{Conn: c, wake: make(chan struct{}, 1)}
	go h.serve(h.conn) // ends with the connection, which the broker's Run waits for; goleak sees to it
}
func (h *hub) Disconnected(*broker.Conn)           {}
func (h *hub) Unsubscribed(*broker.Conn, []string) {}

func (h *hub) Subscribed(c *broker.Conn, filters []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, f := range filters {
		t, err := topic.Parse(f)
		switch {
		case err != nil:
			h.t.Errorf("subscription to %q: %v", f, err)
		case t.Kind == topic.Ack:
			h.conn.acks, h.conn.dirty = true, true
		case t.Kind == topic.Objects || t.Kind == topic.Models:
			h.conn.session.Fetch(time.Now(), desired.Digest(t.Digest), t.Offset)
		}
	}
	signal(h.conn.wake)
}

func (h *hub) Received(c *broker.Conn, name string, payload []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conn.Conn != c {
		return
	}
	if len(payload) > maxMessage {
		h.t.Errorf("message of %d bytes on %s", len(payload), name)
	}
	t, err := topic.Parse(name)
	if err != nil {
		h.t.Errorf("message on %q: %v", name, err)
		return
	}
	h.order = append(h.order, t.Kind)
	switch t.Kind {
	case topic.Hello:
		var m longshorepb.Hello
		h.decode(payload, &m)
		h.hellos = append(h.hellos, &m)
		if h.conn.session, err = desired.NewSession(desired.SessionConfig{
			Cluster: "test", Edge: edgeName, EdgeKey: h.digest[:], Key: h.key, Objects: hubObjects{h},
			ResendMin: 100 * time.Millisecond, AccountHeld: h.books.hold(m.GetAccount()),
		}, &m, time.Now()); err != nil {
			h.t.Error("hello:", err)
			return
		}
		h.conn.session.SetList(time.Now(), h.list)
		if h.unknown {
			h.conn.session.Dismiss(time.Now())
		}
	case topic.Reported:
		m, err := account.Decode(payload)
		if err != nil {
			h.t.Error("report:", err)
			return
		}
		if h.reports = append(h.reports, m); h.lostReports > 0 && len(m.GetList()) > 0 {
			h.lostReports--
			return
		}
		h.books.take(m)
		h.conn.session.Reported(time.Now(), m.GetList())
	case topic.Telemetry:
		if h.deaf > 0 {
			h.deaf--
			return
		}
		var m longshorepb.Telemetry
		h.decode(payload, &m)
		h.take(&m)
	}
	signal(h.conn.wake)
}

func (h *hub) decode(b []byte, m proto.Message) {
	if err := proto.Unmarshal(b, m); err != nil {
		h.t.Error(err)
	}
}

// take books records, each identity once. It needs mu.
func (h *hub) take(m *longshorepb.Telemetry) {
	for _, c := range m.GetClocks() {
		h.clocks[c.GetBootId()] = c
	}
	d, err := frame.NewDecoder()
	if err != nil {
		h.t.Error(err)
		return
	}
	defer d.Close()
	frames := m.GetFrames()
	if f := m.GetFragment(); f != nil {
		if f.GetOffset() == 0 {
			h.part = nil
		}
		if h.part = append(h.part, f.GetData()...); len(h.part) == int(f.GetTotal()) {
			frames = append(frames, h.part)
		}
	}
	for _, b := range frames {
		f, err := d.Decode(b)
		if err != nil {
			h.t.Error("frame:", err)
			continue
		}
		if h.clocks[f.BootID] == nil {
			h.t.Errorf("no clock for boot %q of a frame", f.BootID)
		}
		key := string(m.GetEpoch()) + "\x00" + f.Stream
		set := h.have[key]
		if set == nil {
			set = &seqset.Set{}
			h.have[key] = set
		}
		err = f.Walk(func(seq uint64, r frame.Record) bool {
			if set.Contains(seq, seq) {
				h.resent++
				return true
			}
			set.Add(seq, seq)
			h.records[f.Stream] = append(h.records[f.Stream], string(r.Payload))
			return true
		})
		if err != nil {
			h.t.Error("records:", err)
		}
	}
	h.conn.dirty = true
}

type hubObjects struct{ h *hub }

func (o hubObjects) Object(d desired.Digest) (desired.Object, bool) {
	x, ok := o.h.objects[d]
	return x, ok
}

// serve is the connection's one sender.
func (h *hub) serve(c *hubConn) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		out := h.outgoing(c)
		for _, s := range out {
			if c.Send(s.Topic, s.Payload, s.Retain) != nil {
				return
			}
		}
		if len(out) > 0 {
			continue
		}
		h.mu.Lock()
		if c.session != nil {
			if d := c.session.Deadline(); !d.IsZero() {
				timer.Reset(time.Until(d))
			}
		}
		h.mu.Unlock()
		select {
		case <-c.Done():
			return
		case <-c.wake:
		case <-timer.C:
		}
	}
}

func (h *hub) outgoing(c *hubConn) []desired.Send {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []desired.Send
	if c.session == nil {
		return nil
	}
	for _, a := range c.session.Poll(time.Now()) {
		switch a := a.(type) {
		case desired.Send:
			out = append(out, a)
		case desired.Prove:
			c.session.Proved(time.Now(), h.list)
			signal(c.wake)
		case desired.Close:
			// An edge that hears why leaves by itself.
		}
	}
	if c.acks && c.dirty && !h.withhold {
		c.dirty = false
		var ack longshorepb.Ack
		for key, set := range h.have {
			e := &longshorepb.EpochAck{Epoch: []byte(key[:16]), Streams: []*longshorepb.StreamAck{{Stream: key[17:], Watermark: set.Watermark()}}}
			for _, r := range set.Ranges() {
				if r.First > set.Watermark() {
					e.Streams[0].Above = append(e.Streams[0].Above, &longshorepb.Range{First: r.First, Last: r.Last})
				}
			}
			ack.Epochs = append(ack.Epochs, e)
		}
		out = append(out, desired.Send{Topic: topic.Topic{Kind: topic.Ack, Edge: edgeName}.String(), Payload: c.session.SignAck(&ack)})
	}
	return out
}

// hold makes the edge's list one of models of the given versions, with sizes of their bodies.
func (h *hub) hold(versions ...string) *desired.List {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	var entries []*longshorepb.Entry
	for i, v := range versions {
		o, err := desired.FromModel(&longshorepb.Model{Namespace: "plant", Name: fmt.Sprintf("m%d", i), Uid: fmt.Sprint(i), Version: v})
		if err != nil {
			h.t.Fatal(err)
		}
		h.objects[o.Digest] = o
		entries = append(entries, &longshorepb.Entry{
			Kind: o.Kind, Namespace: o.Namespace, Name: o.Name, Uid: o.UID, Digest: o.Digest[:], Size: uint64(len(o.Body)),
		})
	}
	h.list = desired.NewList(entries)
	h.objects[h.list.Digest] = desired.Object{Ref: desired.Ref{Kind: longshorepb.Kind_KIND_LIST}, Digest: h.list.Digest, Body: h.list.Body()}
	if h.conn != nil && h.conn.session != nil {
		h.conn.session.SetList(time.Now(), h.list)
		signal(h.conn.wake)
	}
	return h.list
}

// look runs f with the hub's books locked.
func look[T any](h *hub, f func() T) T {
	h.mu.Lock()
	defer h.mu.Unlock()
	return f()
}

func (h *hub) inSync() bool {
	return look(h, func() bool { return h.conn != nil && h.conn.session != nil && h.conn.session.InSync() })
}

// edge is an uplink on a real store and outbox.
type edge struct {
	*Uplink
	t         *testing.T
	dir       string
	store     *desired.Store
	outbox    *outbox.Log
	committed chan struct{}
	changed   chan struct{}
	stop      func()

	mu      sync.Mutex
	account Account
}

func newEdge(t *testing.T, h *hub, dir string, change ...func(*Config)) *edge {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, _, err := desired.OpenStore(filepath.Join(dir, "desired"), log)
	if err != nil {
		t.Fatal(err)
	}
	box, err := outbox.Open(filepath.Join(dir, "outbox"), outbox.Config{Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	e := &edge{t: t, dir: dir, store: store, outbox: box, committed: make(chan struct{}, 1), changed: make(chan struct{}, 1)}
	e.account.Node = &longshorepb.NodeReport{Hostname: "box"}
	cfg := Config{
		Logger: log, Edge: edgeName, Token: h.token, EdgeKey: h.digest[:], HubKeys: []ed25519.PublicKey{h.key.Public().(ed25519.PublicKey)},
		AgentVersion: "test", URL: "tcp://" + h.addr, Store: store, Outbox: box,
		Account: func() Account {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.account
		},
		AccountChanged: e.changed, Committed: func() { signal(e.committed) }, LinkUp: func() {},
	}
	for _, f := range change {
		f(&cfg)
	}
	if e.Uplink, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- e.Run(ctx) }()
	go func() { done <- box.Run(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, <-done, box.Close(), store.Close()); err != nil {
			t.Error("edge:", err)
		}
	})
	t.Cleanup(e.stop)
	return e
}

func (e *edge) report(f func(*Account)) {
	e.mu.Lock()
	f(&e.account)
	e.mu.Unlock()
	signal(e.changed)
}

func (e *edge) append(stream string, payloads ...string) {
	e.t.Helper()
	var recs []outbox.Record
	for _, p := range payloads {
		recs = append(recs, outbox.Record{Stream: stream, Topic: "t", Payload: []byte(p)})
	}
	verdicts, err := e.outbox.Append(e.t.Context(), recs)
	if err = errors.Join(append(verdicts, err)...); err != nil {
		e.t.Fatal(err)
	}
}

// eventually polls until ok, with a deadline far beyond what is needed.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func checkLeaks(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
}
