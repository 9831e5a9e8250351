package simtest

import (
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// World is a cluster, hubs, edges and the links between them. The same seed and commands give the same history.
type World struct {
	now     time.Time
	rng     *rand.Rand
	cluster *cluster
	hubs    []*hub
	boxes   []*box
	// owners are the newest sessions of each identity, as Kubernetes would have them.
	owners map[string]*conn
	conns  int
	link   link
	key    ed25519.PrivateKey
	// heads are those that were delivered, by anyone who listens on the way.
	heads [][]byte
	// late are messages of ended connections that still arrive.
	late []lateMessage

	// Quiet spares the work of telling what happens.
	Quiet  bool
	traced []string
	// failures are broken promises.
	failures []error
}

// link is how connections behave.
type link struct {
	delay time.Duration
	// rate in bytes a second; 0 for no limit.
	rate int
	// lose, repeat and damage are probabilities of a message.
	lose, repeat, damage float64
}

type lateMessage struct {
	box     *box
	at      time.Time
	message message
}

type message struct {
	topic   string
	payload []byte
	// subscribe marks a subscription to topic, end the end of the connection.
	subscribe, end bool
}

// box is an edge: one installation with a disk.
type box struct {
	w        *World
	name     string
	edge     string
	disk     *disk
	replica  *desired.Replica
	instance [16]byte
	conn     *conn
	on       bool
	session  uint64
	// told is what was reported last in this session.
	told struct {
		list desired.Digest
		head uint64
		any  bool
	}
	sequence uint64
}

// conn is one connection.
type conn struct {
	id       int
	box      *box
	hub      *hub
	open     bool
	up, down lane
	session  *desired.Session // nil before the Hello and after a Close
	hello    *longshorepb.Hello
	reported uint64
	bytes    int
}

// lane is one direction: messages arrive in order.
type lane struct {
	last    time.Time
	waiting []arrival
}

type arrival struct {
	at time.Time
	message
}

// NewWorld returns an empty world.
func NewWorld(seed uint64) *World {
	seed32 := sha256.Sum256([]byte("hub key"))
	return &World{
		now: time.Unix(1_700_000_000, 0), rng: rand.New(rand.NewPCG(seed, 1)), cluster: newCluster(),
		owners: make(map[string]*conn), link: link{delay: 20 * time.Millisecond}, key: ed25519.NewKeyFromSeed(seed32[:]),
	}
}

func edgeKey(edge string) []byte {
	k := sha256.Sum256([]byte("credential of " + edge))
	return k[:]
}

func (w *World) trace(format string, a ...any) {
	if !w.Quiet {
		w.traced = append(w.traced, fmt.Sprintf(format, a...))
	}
}

func (w *World) fail(format string, a ...any) {
	err := fmt.Errorf(format, a...)
	w.failures = append(w.failures, err)
	w.trace("FAILURE %v", err)
}

func (w *World) random16() (b [16]byte) {
	for i := range b {
		b[i] = byte(w.rng.Uint32())
	}
	return b
}

// boot starts an edge's agent from its disk.
func (b *box) boot() {
	b.on = true
	b.instance = b.w.random16()
	b.replica = desired.NewReplica(desired.ReplicaConfig{
		Edge: b.edge, EdgeKey: edgeKey(b.edge), HubKeys: []ed25519.PublicKey{b.w.key.Public().(ed25519.PublicKey)},
		Instance: b.instance,
	}, b.disk.load())
}

// down ends the agent; with cut, so does the power.
func (b *box) down(cut bool) {
	b.disconnect()
	b.on, b.replica = false, nil
	if cut {
		b.disk.cut(b.w.rng)
	} else {
		b.disk.sync()
	}
	if err := b.disk.whole(b.w.cluster); err != nil {
		b.w.fail("G2: %s after it went down: %v", b.name, err)
	}
}

func (b *box) connect(h *hub) {
	b.disconnect()
	b.w.conns++
	c := &conn{id: b.w.conns, box: b, hub: h, open: true}
	b.conn = c
	h.conns = append(h.conns, c)
	b.session = b.disk.nextSession()
	b.sequence = 0
	b.told.any = false
	b.replica.Start(b.w.now, b.w.random16(), b.session, nil, nil)
	b.work()
}

// disconnect ends the connection. What is on its way is lost, or arrives when nobody waits for it any more.
func (b *box) disconnect() {
	if b.conn == nil {
		return
	}
	c := b.conn
	c.open, b.conn = false, nil
	for _, m := range c.down.waiting {
		if !m.end && b.w.rng.IntN(4) == 0 {
			b.w.late = append(b.w.late, lateMessage{b, b.w.now.Add(time.Duration(b.w.rng.IntN(20_000)) * time.Millisecond), m.message})
		}
	}
	if b.replica != nil {
		b.replica.Stop()
	}
	h := c.hub
	for i, x := range h.conns {
		if x == c {
			h.conns = append(h.conns[:i:i], h.conns[i+1:]...)
		}
	}
}

// work carries out what the replica wants.
func (b *box) work() {
	for b.on && b.conn != nil {
		actions := b.replica.Poll(b.w.now)
		if actions == nil {
			break
		}
		for _, a := range actions {
			if !b.do(a) {
				return
			}
		}
	}
	b.report()
	if b.on && b.conn != nil && b.replica.Status().Superseded {
		b.w.trace("%s stops: superseded", b.name)
		b.disconnect()
	}
}

// do carries out one action; false if it failed and ended the session.
func (b *box) do(a desired.EdgeAction) bool {
	switch a := a.(type) {
	case desired.Publish:
		b.w.send(b.conn, &b.conn.up, message{topic: a.Topic, payload: a.Payload})
		return true
	case desired.Subscribe:
		for _, t := range a.Topics {
			b.w.send(b.conn, &b.conn.up, message{topic: t, subscribe: true})
		}
		return true
	}
	if err := b.disk.apply(a); err != nil {
		b.w.trace("%s cannot write: %v", b.name, err)
		b.disconnect()
		return false
	}
	if c, ok := a.(desired.Commit); ok {
		b.committed(c)
	}
	return true
}

// committed checks a commit against the history of the cluster.
func (b *box) committed(c desired.Commit) {
	w := b.w
	w.trace("%s commits %s", b.name, w.cluster.name(c.List.Digest))
	if err := b.disk.whole(w.cluster); err != nil {
		w.fail("G2: %v", err)
	}
	pos := w.cluster.follows(b.disk.reached, b.edge, c.List.Digest)
	if pos < 0 {
		w.fail("G1: %s went back in time to %s, it was at %d", b.name, w.cluster.name(c.List.Digest), b.disk.reached)
		return
	}
	b.disk.reached = pos
}

// report tells the hub what is committed, as an uplink does.
func (b *box) report() {
	if !b.on || b.conn == nil {
		return
	}
	s := b.replica.Status()
	if b.told.any && b.told.list == s.Committed && (b.told.head == s.Head || !s.Synced) {
		return
	}
	b.told.list, b.told.head, b.told.any = s.Committed, s.Head, true
	b.sequence++
	r := &longshorepb.Reported{Session: b.session, Sequence: b.sequence, Reset_: b.sequence == 1}
	if !s.Committed.IsZero() {
		r.List = s.Committed[:]
	}
	payload, err := account.Encode(r)
	if err != nil {
		panic(err)
	}
	b.w.send(b.conn, &b.conn.up, message{topic: topic.Topic{Kind: topic.Reported, Edge: b.edge}.String(), payload: payload})
}

// send puts a message on its way.
func (w *World) send(c *conn, l *lane, m message) {
	size := len(m.topic) + len(m.payload) + 8
	c.bytes += size
	if !w.Quiet {
		w.traceMessage(c, l, m)
	}
	times := 1
	switch p := w.rng.Float64(); {
	case p < w.link.lose:
		return
	case p < w.link.lose+w.link.repeat:
		times = 2
	}
	for range times {
		start := w.now
		if l.last.After(start) {
			start = l.last
		}
		l.last = start
		if w.link.rate > 0 {
			l.last = start.Add(time.Duration(size) * time.Second / time.Duration(w.link.rate))
		}
		l.waiting = append(l.waiting, arrival{l.last.Add(w.link.delay), m})
	}
}

// changed lets the caches that do not lag follow the cluster.
func (w *World) changed() {
	for _, h := range w.hubs {
		if !h.lag {
			h.watch(w.cluster.newest())
		}
	}
}

// run lets d pass.
func (w *World) run(d time.Duration) {
	end := w.now.Add(d)
	for steps := 0; ; steps++ {
		at, step := w.next()
		if step == nil || at.After(end) {
			break
		}
		if steps > 200_000 {
			w.fail("G4: %d steps in %s: somebody is too busy", steps, d)
			break
		}
		if at.After(w.now) {
			w.now = at
		}
		step()
	}
	w.now = end
}

// next returns what happens next.
func (w *World) next() (at time.Time, step func()) {
	consider := func(t time.Time, f func()) {
		if !t.IsZero() && (step == nil || t.Before(at)) {
			at, step = t, f
		}
	}
	for _, b := range w.boxes {
		c := b.conn
		if c == nil {
			continue
		}
		if len(c.up.waiting) > 0 {
			consider(c.up.waiting[0].at, func() { c.hub.receive(c, c.up.take()) })
		}
		if len(c.down.waiting) > 0 {
			consider(c.down.waiting[0].at, func() { b.receive(c.down.take()) })
		}
		consider(b.replica.Deadline(), b.work)
		if c.session != nil {
			consider(c.session.Deadline(), func() { c.hub.work(c) })
		}
	}
	if len(w.late) > 0 {
		l := w.late[0]
		consider(l.at, func() {
			w.late = w.late[1:]
			if l.box.on && l.box.conn != nil {
				l.box.receive(l.message)
			}
		})
	}
	return at, step
}

func (l *lane) take() message {
	m := l.waiting[0].message
	l.waiting = l.waiting[1:]
	return m
}

// receive hands a message to the replica, damaged now and then.
func (b *box) receive(m message) {
	if m.end {
		b.w.trace("%s is disconnected", b.name)
		b.disconnect()
		return
	}
	if b.w.rng.Float64() < b.w.link.damage && len(m.payload) > 0 {
		m.payload = append([]byte(nil), m.payload...)
		m.payload[b.w.rng.IntN(len(m.payload))] ^= byte(1 + b.w.rng.IntN(255))
	}
	if t, err := topic.Parse(m.topic); err == nil && t.Kind == topic.Index && len(b.w.heads) < 1000 {
		b.w.heads = append(b.w.heads, m.payload)
	}
	if err := b.replica.Receive(b.w.now, m.topic, m.payload); err != nil {
		b.w.trace("%s refuses: %v", b.name, err)
	}
	b.work()
}

// forge gives a connected box heads that it must not take: all that were delivered before, and damaged ones.
func (b *box) forge() {
	if !b.on || b.conn == nil {
		return
	}
	name := topic.Topic{Kind: topic.Index, Edge: b.edge}.String()
	heads := b.w.heads
	if len(heads) > 8 {
		heads = append(append([][]byte(nil), heads[:3]...), heads[len(heads)-5:]...)
	}
	for _, h := range heads {
		bad := append([]byte(nil), h...)
		bad[b.w.rng.IntN(len(bad))] ^= byte(1 + b.w.rng.IntN(255))
		for _, payload := range [][]byte{h, bad} {
			before := b.replica.Status()
			err := b.replica.Receive(b.w.now, name, payload)
			after := b.replica.Status()
			after.Problem = before.Problem
			if err == nil || before != after {
				b.w.fail("G5: %s took a head that was not for it now: %v, %+v", b.name, err, after)
			}
		}
	}
}

// heal ends all faults, connects every edge to a hub that is up to date, and expects that all converge.
func (w *World) heal() {
	w.link = link{delay: 20 * time.Millisecond}
	if len(w.hubs) == 0 {
		return
	}
	for _, h := range w.hubs {
		h.lag = false
	}
	w.changed()
	identities := make(map[string]*box)
	for _, b := range w.boxes {
		b.disk.fail = false
		if !b.on {
			b.boot()
		}
		if other := identities[b.edge]; other != nil {
			b.down(false) // of two installations with one identity one is taken off
			continue
		}
		identities[b.edge] = b
		if b.conn == nil {
			if b.replica.Status().Superseded {
				b.down(false)
				b.boot()
			}
			b.connect(w.hubs[w.rng.IntN(len(w.hubs))])
		}
	}
	for range 60 {
		w.run(time.Minute)
		if w.converged(identities) == nil {
			return
		}
		for _, b := range identities {
			if b.conn != nil {
				continue
			}
			if b.replica.Status().Superseded { // by the other one, before that was taken off
				b.down(false)
				b.boot()
			}
			b.connect(w.hubs[0])
		}
	}
	if err := w.converged(identities); err != nil {
		w.fail("G1: after an hour with a good link: %v", err)
	}
}

func (w *World) converged(boxes map[string]*box) error {
	for edge, b := range boxes {
		want := w.cluster.at(w.cluster.newest(), edge).list.Digest
		if l := b.disk.kept.list; l == nil || l.Digest != want {
			return fmt.Errorf("%s does not hold %s: %+v", b.name, w.cluster.name(want), b.replica.Status())
		}
		if b.conn == nil || !b.replica.Status().Synced || b.conn.session == nil || !b.conn.session.InSync() {
			return errors.New(b.name + " and its hub do not know that it is in sync")
		}
		if err := b.disk.whole(w.cluster); err != nil {
			return err
		}
	}
	return nil
}
