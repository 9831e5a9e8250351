package broker

import (
	"slices"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

const (
	// flightWindow bounds messages sent to one client and not yet acknowledged by it.
	flightWindow = 64
	// maxUnreleased bounds QoS 2 messages of one client between PUBREC and PUBREL.
	maxUnreleased = 1024
	// warnEvery is the least time between two lines in the log about one full queue.
	warnEvery = time.Minute
	// messageOverhead is what a queued message costs beside its payload, in bytes, roughly.
	messageOverhead = 256
)

// message is one PUBLISH on its way; immutable once made, shared by all queues that hold it.
type message struct {
	origin  string // session key of the publisher
	from    Identity
	client  string
	topic   string
	payload []byte
	qos     byte
	retain  bool
	version byte                // of the publisher's protocol; 0: a will or the broker's own
	expiry  int64               // Unix seconds; 0: never (MQTT 5 message expiry)
	props   *packets.Properties // nil if none
}

func (m *message) size() int { return len(m.payload) + len(m.topic) + messageOverhead }

func (m *message) expired(now time.Time) bool { return m.expiry > 0 && m.expiry <= now.Unix() }

// delivery is a message for one session.
type delivery struct {
	m      *message
	qos    byte
	retain bool
	ids    []int // subscription identifiers
	replay []*message
	sub    packets.Subscription // for replay
}

// flight is a delivery with QoS 1 or 2 that the client has not finished acknowledging.
type flight struct {
	delivery
	id       uint16
	sent     bool // on this connection
	released bool // PUBREC received, PUBREL sent
}

// inbound is a QoS 2 message between PUBLISH and PUBREL.
type inbound struct {
	conn   *Conn // who is owed the PUBREC
	stored bool
}

// session is what outlives a connection: subscriptions, the queue towards the client, what is in flight each way.
// Broker.mu guards owner and next; mu guards the rest. A session discarded by a clean start is never used again: the
// new one is another value.
type session struct {
	key  string // identity and client id
	subs *mqtt.Subscriptions

	owner, next *Conn // who has it; who waits for it

	mu       sync.Mutex
	conn     *Conn // attached: deliveries wake it
	queue    []delivery
	bytes    int
	flights  []*flight
	lastID   uint16
	received map[uint16]*inbound
	window   int
	warned   time.Time // of the full queue
	// set while nobody is attached
	awaySince time.Time
	expiry    time.Duration // < 0: never
	will      *message
	willAt    time.Time
}

func newSession(key string) *session {
	return &session{key: key, subs: mqtt.NewSubscriptions(), received: map[uint16]*inbound{}}
}

// attach makes c the connection that deliveries go to; all in flight is sent again on it.
func (s *session) attach(c *Conn, window int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn, s.window, s.will = c, window, nil
	for _, f := range s.flights {
		f.sent = false
	}
	if len(s.flights)+len(s.queue) > 0 {
		c.poke()
	}
}

// detach is the end of attach; from now on only QoS 1 and 2 are queued.
func (s *session) detach(now time.Time, expiry time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn, s.awaySince, s.expiry = nil, now, expiry
}

// leaveWill keeps a will until it is due; attach withdraws it.
func (s *session) leaveWill(m *message, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.will, s.willAt = m, at
}

// due says whether the session of an absent client has expired, and hands out its will when that is due.
func (s *session) due(now time.Time) (expired bool, will *message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.will != nil && !now.Before(s.willAt) {
		will, s.will = s.will, nil
	}
	return s.expiry >= 0 && now.Sub(s.awaySince) >= s.expiry, will
}

// attached says whether a connection takes deliveries now.
func (s *session) attached() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != nil
}

// offer queues a delivery and says whether it was taken. QoS 0 for an absent client is taken by forgetting it, as
// MQTT has it. warn says that the refusal is worth a line in the log.
func (s *session) offer(d delivery, maxMessages, maxBytes int) (taken, warn bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil && d.qos == 0 {
		return true, false
	}
	size := d.m.size()
	if len(s.queue) >= maxMessages || s.bytes+size > maxBytes {
		now := time.Now()
		if warn = now.Sub(s.warned) > warnEvery; warn {
			s.warned = now
		}
		return false, warn
	}
	s.bytes += size
	s.queue = append(s.queue, d)
	if s.conn != nil {
		s.conn.poke()
	}
	return true, false
}

// replay queues retained messages behind what is queued already. It says false if the client has asked for more
// than limit without taking them.
func (s *session) replay(ms []*message, sub packets.Subscription, limit int) bool {
	if len(ms) == 0 {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting := len(ms)
	for _, d := range s.queue {
		waiting += len(d.replay)
	}
	if waiting > limit {
		return false
	}
	s.queue = append(s.queue, delivery{replay: ms, sub: sub})
	if s.conn != nil {
		s.conn.poke()
	}
	return true
}

// take returns the next packet to write, in order: first what is to be sent again, then the queue as far as the
// window goes. Expired messages are skipped and counted in expired.
func (s *session) take(now time.Time) (pk packets.Packet, ok bool, expired int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.flights {
		if !f.sent {
			f.sent = true
			return f.packet(true), true, 0
		}
	}
	for {
		d, ok := s.head()
		if !ok {
			return pk, false, expired
		}
		if d.m.expired(now) {
			expired++
			s.pop()
			continue
		}
		if d.qos == 0 {
			s.pop()
			return d.packet(), true, expired
		}
		if len(s.flights) >= s.window {
			return pk, false, expired
		}
		s.pop()
		f := &flight{delivery: d, id: s.freeID(), sent: true}
		s.flights = append(s.flights, f)
		return f.packet(false), true, expired
	}
}

// head returns the first delivery of the queue; a replay stands for its first message.
func (s *session) head() (delivery, bool) {
	if len(s.queue) == 0 {
		return delivery{}, false
	}
	d := s.queue[0]
	if d.replay != nil {
		m := d.replay[0]
		return delivery{m: m, qos: min(m.qos, d.sub.Qos), retain: true, ids: identifiers(d.sub)}, true
	}
	return d, true
}

func (s *session) pop() {
	d := &s.queue[0]
	if len(d.replay) > 1 {
		d.replay = d.replay[1:]
		return
	}
	if d.replay == nil {
		s.bytes -= d.m.size()
	}
	*d = delivery{}
	s.queue = s.queue[1:]
	if len(s.queue) == 0 {
		s.queue = nil
	}
}

// freeID returns a packet id that nothing in flight has.
func (s *session) freeID() uint16 {
	for {
		s.lastID++
		if s.lastID != 0 && !slices.ContainsFunc(s.flights, func(f *flight) bool { return f.id == s.lastID }) {
			return s.lastID
		}
	}
}

// acknowledged takes a PUBACK, PUBREC or PUBCOMP of the client and says whether the id was in flight.
func (s *session) acknowledged(kind byte, id uint16, failed bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.flights, func(f *flight) bool { return f.id == id })
	if i < 0 {
		return false
	}
	f := s.flights[i]
	if kind == packets.Pubrec && f.qos == 2 && !failed {
		f.released = true
		f.delivery = delivery{qos: 2}
		return true
	}
	if kind == packets.Pubcomp && !f.released || kind == packets.Puback && f.qos != 1 || kind == packets.Pubrec && f.qos != 2 {
		return false
	}
	s.flights = slices.Delete(s.flights, i, i+1)
	if s.conn != nil {
		s.conn.poke()
	}
	return true
}

// verdict on an arriving QoS 2 PUBLISH.
type verdict byte

const (
	fresh    verdict = iota // store it
	repeated                // stored before: acknowledge again
	waiting                 // being stored: the acknowledgement will go to the newest connection
	excess                  // too many without PUBREL
)

// receive registers a QoS 2 PUBLISH with this id from c. held says that c already waits for this very id.
func (s *session) receive(c *Conn, id uint16) (v verdict, held bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in, ok := s.received[id]
	switch {
	case !ok && len(s.received) >= maxUnreleased:
		return excess, false
	case !ok:
		s.received[id] = &inbound{conn: c}
		return fresh, false
	case in.stored:
		return repeated, false
	}
	held = in.conn == c
	in.conn = c
	return waiting, held
}

// stored ends the storing of a QoS 2 message and returns the connection that is owed the PUBREC; if it was refused the
// id is forgotten, so that a repetition is tried again.
func (s *session) stored(id uint16, ok bool) *Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.received[id]
	if in == nil {
		return nil
	}
	if !ok {
		delete(s.received, id)
	}
	in.stored = true
	return in.conn
}

// release takes a PUBREL and says whether the id was known.
func (s *session) release(id uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.received[id]
	if in == nil || !in.stored {
		return false
	}
	delete(s.received, id)
	return true
}

// waitingMessages counts QoS 1 and 2 messages that would be lost with the session.
func (s *session) waitingMessages() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.queue {
		n += int64(max(1, len(d.replay)))
	}
	return n + int64(len(s.flights))
}

func (f *flight) packet(dup bool) packets.Packet {
	if f.released {
		return packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel, Qos: 1}, PacketID: f.id}
	}
	pk := f.delivery.packet()
	pk.PacketID = f.id
	pk.FixedHeader.Dup = dup
	return pk
}

func (d delivery) packet() packets.Packet {
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: d.qos, Retain: d.retain},
		TopicName:   d.m.topic,
		Payload:     d.m.payload,
		Expiry:      d.m.expiry,
	}
	if d.m.props != nil {
		pk.Properties = *d.m.props
	}
	pk.Properties.SubscriptionIdentifier = d.ids
	return pk
}

// identifiers returns the MQTT 5 subscription identifiers to send along, in order.
func identifiers(sub packets.Subscription) (ids []int) {
	if sub.Identifiers == nil && sub.Identifier > 0 {
		return []int{sub.Identifier}
	}
	for _, id := range sub.Identifiers {
		if id > 0 {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}
