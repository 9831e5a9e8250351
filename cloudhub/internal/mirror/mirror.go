package mirror

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// maxRetired bounds the superseded instances remembered per edge, so that a clone stays superseded when it comes back.
	maxRetired = 8
	// retiredShown is how long after it was last heard from a superseded instance is shown.
	retiredShown = 10 * time.Minute
	// maxProofs bounds the proofs asked of the source at one time.
	maxProofs = 32
)

// Config of a Mirror.
type Config struct {
	Logger *slog.Logger
	// HubName tells this hub from others in an Edge's status.
	HubName string
	// Cluster returns the UID that goes into signed heads. It is asked again, with pauses, until it answers.
	Cluster func(context.Context) (string, error)
	// Key signs heads.
	Key      ed25519.PrivateKey
	Cache    *Cache
	Upstream Upstream
	// Current reports whether the credential of a connection still counts; nil: all do. It must not block.
	Current func(broker.Identity) bool
	// Intake takes telemetry; nil: telemetry is refused.
	Intake *intake.Intake
}

// Mirror keeps every connected edge at what the cache says for it. It implements broker.Virtual. Create it with New, then
// call Run once. Safe for concurrent use.
type Mirror struct {
	cfg      Config
	counters counters
	named    chan struct{} // closed when cluster is known
	cluster  string        // set before named is closed
	proofs   chan struct{} // one slot per proof under way
	turns    tasks         // of the senders

	mu      sync.Mutex
	conns   map[uint64]*conn
	edges   map[string]*record
	senders map[*sender]struct{}
}

// record is what the mirror knows of one edge across its connections; guarded by Mirror.mu.
type record struct {
	active *conn
	// state was handed out last; Online is false once active has ended.
	state EdgeState
	known bool // state is set
	// kept is the account of the connection that ended last.
	kept account
	// retired are instances that were superseded here, oldest first.
	retired []retired
}

// account is the newest of an edge; the caller holds Mirror.mu.
func (r *record) account() account {
	if r.active != nil {
		return r.active.reported()
	}
	return r.kept
}

// retired is a superseded instance with what it last said. Most are gone: an agent that starts again after a power cut is
// another instance, while its old connection may still look alive.
type retired struct {
	EdgeState
	// heard: it lived on after another took over. Then there are two boxes with one identity, and somebody should know.
	heard bool
}

// outlived notes that a superseded instance lives.
func (r *record) outlived(instance string, now time.Time) {
	for i := range r.retired {
		if r.retired[i].Instance == instance {
			r.retired[i].heard, r.retired[i].LastContact = true, now
		}
	}
}

// rivals are the superseded instances that live, or did until a while ago.
func (r *record) rivals(now time.Time) []EdgeState {
	var all []EdgeState
	for _, i := range r.retired {
		if i.heard && now.Sub(i.LastContact) < retiredShown {
			all = append(all, i.EdgeState)
		}
	}
	return all
}

var _ broker.Virtual = (*Mirror)(nil)

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Mirror, error) {
	if len(cfg.Key) != ed25519.PrivateKeySize {
		return nil, errors.New("the hub's signing key is missing")
	}
	if cfg.Logger == nil || cfg.Cluster == nil || cfg.Cache == nil || cfg.Upstream == nil {
		return nil, errors.New("mirror needs a logger, a cluster, a cache and an upstream")
	}
	return &Mirror{
		cfg:     cfg,
		named:   make(chan struct{}),
		proofs:  make(chan struct{}, maxProofs),
		conns:   map[uint64]*conn{},
		edges:   map[string]*record{},
		senders: map[*sender]struct{}{},
	}, nil
}

// Run serves connections until ctx ends; it returns nil once all its goroutines have ended.
func (m *Mirror) Run(ctx context.Context) error {
	m.turns.open()
	m.wakeAll()
	var naming sync.WaitGroup
	naming.Go(func() { m.identify(ctx) })
	defer func() {
		naming.Wait()
		m.turns.close()
		for _, s := range m.allSenders() {
			s.finish(nil, false)
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.cfg.Cache.s.hasProblems:
			for _, p := range m.cfg.Cache.takeProblems() {
				m.cfg.Upstream.Problem(p.ref, p.reason, p.message)
			}
		}
	}
}

func (m *Mirror) allSenders() []*sender {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.senders))
}

func (m *Mirror) wakeAll() {
	for _, s := range m.allSenders() {
		s.task.wake()
	}
}

// identify asks for the cluster's UID until it is known.
func (m *Mirror) identify(ctx context.Context) {
	for pause := time.Second; ; pause = min(2*pause, 30*time.Second) {
		uid, err := m.cfg.Cluster(ctx)
		if err == nil {
			m.cluster = uid
			close(m.named)
			m.wakeAll()
			return
		}
		if ctx.Err() != nil {
			return
		}
		m.cfg.Logger.Warn("the cluster's UID is not known yet", "err", err, "retry", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// Ready reports why no session can be answered yet, nil if all is well.
func (m *Mirror) Ready() error {
	select {
	case <-m.named:
	default:
		return errors.New("the cluster's UID is not known yet")
	}
	if !m.cfg.Cache.IsSynced() {
		return errors.New("the first state of the source is not complete yet")
	}
	return nil
}

// Connected implements broker.Virtual.
func (m *Mirror) Connected(bc *broker.Conn) {
	c := &conn{Conn: bc, edge: bc.Identity().Name}
	c.sender = newSender(m, c)
	m.mu.Lock()
	m.conns[c.ID()] = c
	m.mu.Unlock()
	m.check(c) // the credential may have been revoked after it was presented
}

// Revoke closes every connection whose credential does not count any more; call it after a change of that.
func (m *Mirror) Revoke() {
	m.mu.Lock()
	conns := slices.Collect(maps.Values(m.conns))
	m.mu.Unlock()
	for _, c := range conns {
		m.check(c)
	}
}

func (m *Mirror) check(c *conn) {
	if m.cfg.Current != nil && !m.cfg.Current(c.Identity()) {
		m.refuse(c, "its credential was revoked")
	}
}

// Disconnected implements broker.Virtual. The sender sees the end when it is woken.
func (m *Mirror) Disconnected(bc *broker.Conn) {
	m.mu.Lock()
	c := m.conns[bc.ID()]
	delete(m.conns, bc.ID())
	_, started := m.senders[c.sender]
	m.mu.Unlock()
	if started {
		c.wake()
	}
}

func (m *Mirror) conn(c *broker.Conn) *conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conns[c.ID()]
}

// start lets the connection's sender begin.
func (m *Mirror) start(c *conn) {
	m.mu.Lock()
	m.senders[c.sender] = struct{}{}
	m.mu.Unlock()
	c.wake()
}

// Subscribed implements broker.Virtual: it notes what is asked for and wakes the sender.
func (m *Mirror) Subscribed(bc *broker.Conn, filters []string) {
	c := m.conn(bc)
	if c == nil {
		return
	}
	for _, f := range filters {
		if err := c.subscribe(f); err != nil {
			m.refuse(c, err.Error())
			return
		}
	}
	m.start(c)
}

// Unsubscribed implements broker.Virtual.
func (m *Mirror) Unsubscribed(bc *broker.Conn, filters []string) {
	if c := m.conn(bc); c != nil {
		c.unsubscribe(filters)
	}
}

// Received implements broker.Virtual.
func (m *Mirror) Received(bc *broker.Conn, name string, payload []byte) {
	c := m.conn(bc)
	t, err := topic.Parse(name)
	if c == nil || err != nil || t.Edge != c.edge {
		return // the rights forbid it before it comes here
	}
	switch t.Kind {
	case topic.Hello:
		if err := m.hello(c, payload); err != nil {
			m.refuse(c, "hello: "+err.Error())
		}
	case topic.Reported:
		absurd, err := c.report(payload)
		if err != nil || absurd > 0 {
			m.counters.reportsRefused.Add(1)
			m.cfg.Logger.Warn("report or parts of it ignored", "edge", c.edge, "parts", absurd, "err", err)
		}
		c.wake()
	case topic.Telemetry:
		m.counters.telemetry.Add(1)
		if err := c.telemetry(payload); err != nil {
			m.counters.telemetryRefused.Add(1)
			m.cfg.Logger.Debug("telemetry refused, the edge sends it again", "edge", c.edge, "err", err)
		}
	}
}

func (m *Mirror) refuse(c *conn, reason string) {
	m.counters.refused.Add(1)
	m.cfg.Logger.Warn("connection closed", "edge", c.edge, "remote", c.Remote(), "reason", reason)
	c.Close(reason)
}

func (m *Mirror) hello(c *conn, payload []byte) error {
	hello := &longshorepb.Hello{}
	if len(payload) > maxHello {
		return errors.New("longer than any edge of this wire sends")
	}
	if err := proto.Unmarshal(payload, hello); err != nil {
		return err
	}
	if c.repeated(hello) {
		c.wake()
		return nil
	}
	var telemetry *intake.Session
	if m.cfg.Intake != nil {
		telemetry = m.cfg.Intake.Session(c.edge, hello, c.wake)
	}
	m.mu.Lock()
	before := m.record(c.edge).account()
	m.mu.Unlock()
	if err := c.open(hello, telemetry, before); err != nil {
		if telemetry != nil {
			telemetry.Close()
		}
		return err
	}
	m.start(c)
	return nil
}

// record returns an edge's record, a new one if need be; the caller holds mu.
func (m *Mirror) record(edge string) *record {
	r := m.edges[edge]
	if r == nil {
		r = &record{}
		m.edges[edge] = r
	}
	return r
}

// claim makes c the connection of its edge. An older connection of the same instance is closed, one of another instance is
// superseded. superseded says that c's own instance was superseded before; an error, that c is itself the older one.
func (m *Mirror) claim(c *conn) (superseded bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.record(c.edge)
	if slices.ContainsFunc(r.retired, func(i retired) bool { return i.Instance == c.instance() }) {
		r.outlived(c.instance(), time.Now())
		return true, nil
	}
	old := r.active
	if old == c {
		return false, nil
	}
	switch {
	case old == nil || old.hello() == nil:
	case old.instance() != c.instance():
		state := old.state()
		state.Superseded = true
		r.retired = append(r.retired, retired{EdgeState: state})
		r.retired = r.retired[max(0, len(r.retired)-maxRetired):]
		old.order("", true)
	case old.hello().Session >= c.hello().Session:
		return false, errors.New("a newer session of the same agent is connected")
	default:
		old.order("a newer session of the same agent took over", false)
	}
	r.active, r.kept = c, account{}
	return false, nil
}

// outlived notes that the superseded instance of c lives.
func (m *Mirror) outlived(c *conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.record(c.edge).outlived(c.instance(), time.Now())
}

// attend makes the connection of a plain device that of its edge, if the edge has none.
func (m *Mirror) attend(c *conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.record(c.edge); r.active == nil {
		r.active = c
	}
}

// publish notes a state of c and hands it on if c is its edge's connection.
func (m *Mirror) publish(c *conn, s EdgeState) {
	m.mu.Lock()
	r := m.record(c.edge)
	active := r.active == c
	if active {
		r.state, r.known = s, true
	}
	m.mu.Unlock()
	if active {
		m.cfg.Upstream.Report(s)
	}
}

// ended forgets c; tell says whether its end is news for the source.
func (m *Mirror) ended(c *conn, tell bool) {
	m.mu.Lock()
	delete(m.senders, c.sender)
	r := m.edges[c.edge]
	if r == nil || r.active != c {
		m.mu.Unlock()
		return
	}
	r.kept, r.active = c.keep(), nil
	r.state.Online, r.state.Synced = false, false
	r.state.LastContact = time.Now()
	state, known := r.state, r.known
	m.mu.Unlock()
	if tell && known {
		m.cfg.Upstream.Report(state)
	}
}

// Edges returns what is known of every Edge, sorted by name: those connected here, those that were, and those of which only
// the source knows. Superseded instances that live on, or did in the last ten minutes, follow the one that took over.
func (m *Mirror) Edges() []EdgeState {
	var all []EdgeState
	known := m.cfg.Cache.Edges()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range known {
		r := m.edges[e.Name]
		if r == nil || !r.known {
			all = append(all, offline(e))
			continue
		}
		s := r.state
		if r.active != nil {
			s.LastContact = time.Now()
		}
		all = append(all, s)
		all = append(all, r.rivals(time.Now())...)
	}
	return all
}

// Stats are counters since the start, for metrics.
type Stats struct {
	// Connections are MQTT connections now, Sessions those of edge hubs, InSync those whose edge holds the newest list.
	Connections, Sessions, InSync int64
	// Opened counts sessions, Refused connections closed for a reason, Superseded those told so.
	Opened, Refused, Superseded uint64
	// Heads, Chunks, Acks and Plain count messages sent down, SentBytes their payloads.
	Heads, Chunks, Acks, Plain, SentBytes uint64
	// Fetches counts requests for objects.
	Fetches uint64
	// Proofs counts views proved against the source, ProofsFailed attempts that failed.
	Proofs, ProofsFailed uint64
	// Telemetry counts messages received, TelemetryRefused those not taken; ReportsRefused counts reports ignored in whole or part.
	Telemetry, TelemetryRefused, ReportsRefused uint64
}

type counters struct {
	sessions, inSync                            atomic.Int64
	opened, refused, superseded                 atomic.Uint64
	heads, chunks, acks, plain, sentBytes       atomic.Uint64
	fetches, proofs, proofsFailed               atomic.Uint64
	telemetry, telemetryRefused, reportsRefused atomic.Uint64
}

// Stats returns the current counters.
func (m *Mirror) Stats() Stats {
	m.mu.Lock()
	connections := int64(len(m.conns))
	m.mu.Unlock()
	c := &m.counters
	return Stats{
		Connections: connections, Sessions: c.sessions.Load(), InSync: c.inSync.Load(),
		Opened: c.opened.Load(), Refused: c.refused.Load(), Superseded: c.superseded.Load(),
		Heads: c.heads.Load(), Chunks: c.chunks.Load(), Acks: c.acks.Load(), Plain: c.plain.Load(), SentBytes: c.sentBytes.Load(),
		Fetches: c.fetches.Load(), Proofs: c.proofs.Load(), ProofsFailed: c.proofsFailed.Load(),
		Telemetry: c.telemetry.Load(), TelemetryRefused: c.telemetryRefused.Load(), ReportsRefused: c.reportsRefused.Load(),
	}
}

func hexInstance(h *longshorepb.Hello) string { return hex.EncodeToString(h.GetInstance()) }

func agentVersion(h *longshorepb.Hello, n *longshorepb.NodeReport) string {
	return cmp.Or(h.GetAgentVersion(), n.GetAgentVersion())
}
