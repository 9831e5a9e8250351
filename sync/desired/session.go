package desired

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// maxFetches bounds the requests of one edge that wait for an answer. What is dropped the edge asks for again.
	maxFetches = 256
	// maxPush bounds what is sent ahead of a head, in bytes of data.
	maxPush = 24 << 10
	// headPause is the least time between a head that the edge has not reported as applied and one that supersedes it.
	headPause = time.Second
)

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
	// AccountHeld: the hub holds the account that the Hello names. Every head that names a list says so.
	AccountHeld bool
	// ResendMin and ResendMax bound the doubling pause after which a head not reported as applied is sent again (5 s, 2 min).
	ResendMin, ResendMax time.Duration
}

// proof is how far the hub is with proving its view of the edge.
type proof uint8

const (
	unproved proof = iota
	proving
	proved
)

// Session is the hub's side of one connection of one edge. It is a pure state machine: no goroutine, clock or I/O; not
// safe for concurrent use. Feed it with its methods, then call Poll until it returns nothing.
type Session struct {
	cfg   SessionConfig
	nonce []byte
	proof proof

	// newest is what the edge should hold according to the hub's cache; nil until SetList.
	newest *List
	// sent is the list of the last head; nil before the first.
	sent    *List
	counter uint64
	head    *longshorepb.SignedHead
	sentAt  time.Time
	// resendAt is when the head goes out again unless it is reported as applied; pause doubles every time.
	resendAt time.Time
	pause    time.Duration
	// again asks for the head once more, now.
	again bool

	// reported is the list the edge said it holds, at first in its Hello; heldList its entries, nil if the hub never knew.
	reported Digest
	heldList *List
	// applied is set when the edge reported the list of the last head in this session.
	applied bool

	superseded, unknown, closed bool

	fetches []fetchRequest
	// encoded is the object of the last answer: large ones are asked for piece by piece.
	encoded encodedObject
}

type fetchRequest struct {
	digest Digest
	offset uint64
}

type encodedObject struct {
	digest Digest
	kind   longshorepb.Kind
	enc    longshorepb.Encoding
	data   []byte
}

// NewSession answers a Hello. It fails, with a reason for the log and the edge's status, on a Hello no edge of this wire sends.
func NewSession(cfg SessionConfig, hello *longshorepb.Hello, _ time.Time) (*Session, error) {
	if cfg.ResendMin <= 0 {
		cfg.ResendMin = 5 * time.Second
	}
	if cfg.ResendMax < cfg.ResendMin {
		cfg.ResendMax = max(2*time.Minute, cfg.ResendMin)
	}
	if err := topic.ValidEdge(cfg.Edge); err != nil {
		return nil, err
	}
	switch w := hello.GetWire(); {
	case w == 0:
		return nil, errors.New("hello without wire version")
	case w < longshorepb.Wire:
		return nil, fmt.Errorf("the edge speaks wire version %d, this hub only %d: upgrade the edge", w, longshorepb.Wire)
	case w > longshorepb.Wire:
		return nil, fmt.Errorf("the edge speaks wire version %d, this hub only up to %d: upgrade the hub", w, longshorepb.Wire)
	case len(hello.GetNonce()) != 16 || len(hello.GetInstance()) != 16:
		return nil, errors.New("hello without nonce or instance of 16 bytes")
	case hello.GetSession() == 0:
		return nil, errors.New("hello without session number")
	}
	s := &Session{cfg: cfg, nonce: hello.GetNonce()}
	if h := hello.GetHeld(); len(h) != 0 {
		d, err := toDigest(h)
		if err != nil {
			return nil, fmt.Errorf("hello: list held: %w", err)
		}
		s.reported = d
	}
	return s, nil
}

// SetList tells the newest list according to the hub's cache. Calling it with an equal list costs nothing and sends nothing.
func (s *Session) SetList(_ time.Time, l *List) {
	s.newest = l
	if l.Digest == s.reported {
		s.heldList = l
	}
}

// Proved answers a Prove action: the hub's cache now holds at least what the source held when Prove was asked; l is the list
// then. A failed proof is retried by the caller, not reported here.
func (s *Session) Proved(now time.Time, l *List) {
	s.proof = proved
	s.SetList(now, l)
}

// Again has the head sent once more: the edge repeated its Hello (same nonce), so it has not seen one.
func (s *Session) Again(_ time.Time) { s.again = s.sent != nil }

// Fetch notes a subscription to an object or list from an offset.
func (s *Session) Fetch(now time.Time, d Digest, offset uint64) {
	s.resendAt = now.Add(max(s.pause, 4*s.cfg.ResendMin)) // the edge is at work on the head
	r := fetchRequest{d, offset}
	for _, f := range s.fetches {
		if f == r {
			return
		}
	}
	if len(s.fetches) < maxFetches {
		s.fetches = append(s.fetches, r)
	}
}

// Reported notes the list digest an edge reports as committed.
func (s *Session) Reported(_ time.Time, list []byte) {
	d, err := toDigest(list)
	if err != nil {
		return // none yet
	}
	s.reported = d
	s.applied = s.sent != nil && s.sent.Digest == d
	switch {
	case s.applied:
		s.heldList = s.sent
		s.encoded = encodedObject{}
	case s.newest != nil && s.newest.Digest == d:
		s.heldList = s.newest
	case s.heldList != nil && s.heldList.Digest != d:
		s.heldList = nil
	}
}

// Supersede makes the next Poll send a signed "superseded" head and then close.
func (s *Session) Supersede(_ time.Time) { s.superseded = true }

// Dismiss makes the next Poll send a signed head that says there is no Edge of this name, and then close.
func (s *Session) Dismiss(_ time.Time) { s.unknown = true }

// Poll returns the next things to do, at most about 32 KiB of payload, most urgent first; nil when there is nothing.
func (s *Session) Poll(now time.Time) []HubAction {
	if s.closed {
		return nil
	}
	if s.superseded {
		s.closed = true
		s.sign(&longshorepb.Head{Superseded: true})
		return []HubAction{s.sendHead(), Close{Reason: "superseded by a later instance with the same identity"}}
	}
	if s.unknown {
		s.closed = true
		s.sign(&longshorepb.Head{Unknown: true})
		return []HubAction{s.sendHead(), Close{Reason: "there is no Edge of this name"}}
	}
	if s.newest == nil {
		return nil // nothing is said before the cache knows the edge
	}
	if s.proof == unproved && !s.mayTell() {
		s.proof = proving
		return []HubAction{Prove{}}
	}
	if s.headDue(now) {
		return s.tell(now)
	}
	if len(s.fetches) > 0 {
		f := s.fetches[0]
		s.fetches = s.fetches[1:]
		return s.answer(now, f)
	}
	return nil
}

// mayTell reports whether the newest list may go out: the hub proved its view, or it changes nothing on the edge.
func (s *Session) mayTell() bool {
	return s.proof == proved || s.newest.Digest == s.reported
}

func (s *Session) headDue(now time.Time) bool {
	switch {
	case !s.mayTell():
		return false
	case s.sent == nil || s.again:
		return true
	case s.sent.Digest != s.newest.Digest:
		return s.applied || !now.Before(s.sentAt.Add(headPause))
	}
	return !s.applied && !now.Before(s.resendAt)
}

// tell sends the head of the newest list, and ahead of it what a small change needs.
func (s *Session) tell(now time.Time) []HubAction {
	var actions []HubAction
	if s.sent == nil || s.sent.Digest != s.newest.Digest {
		s.pause = 0
		if s.newest.Digest != s.reported {
			actions = s.push()
		}
	}
	s.makeHead(now)
	return append(actions, s.sendHead())
}

// makeHead signs a head for the newest list and counts it as sent.
func (s *Session) makeHead(now time.Time) {
	s.again = false
	if s.sent == nil {
		s.applied = s.newest.Digest == s.reported // its Hello said so
	} else if s.sent.Digest != s.newest.Digest {
		// Also when it is what the edge reported before: a report on its way may say otherwise.
		s.applied = false
	}
	s.sent, s.sentAt = s.newest, now
	s.arm(now)
	s.sign(&longshorepb.Head{List: s.newest.Digest[:], Account: s.cfg.AccountHeld})
}

// arm sets the time of the next resend and doubles the pause.
func (s *Session) arm(now time.Time) {
	s.pause = min(max(2*s.pause, s.cfg.ResendMin), s.cfg.ResendMax)
	s.resendAt = now.Add(s.pause)
}

func (s *Session) sign(h *longshorepb.Head) {
	s.counter++
	h.Cluster, h.Edge, h.EdgeKey, h.Nonce, h.Counter = s.cfg.Cluster, s.cfg.Edge, s.cfg.EdgeKey, s.nonce, s.counter
	s.head = signHead(s.cfg.Key, h)
}

func (s *Session) sendHead() HubAction {
	return Send{Topic: topic.Topic{Kind: topic.Index, Edge: s.cfg.Edge}.String(), Payload: marshal(s.head)}
}

// push returns the list, and the objects of a small change, as hints. The edge asks for whatever does not come this way.
func (s *Session) push() []HubAction {
	chunks := make([]*longshorepb.Chunk, 0, 4)
	room := maxPush
	add := func(e encodedObject) bool {
		if len(e.data) > chunkBytes || len(e.data) > room {
			return false
		}
		room -= len(e.data)
		chunks = append(chunks, e.chunk(0, len(e.data)))
		return true
	}
	if !add(encodeObject(longshorepb.Kind_KIND_LIST, s.newest.Digest, s.newest.Body())) {
		return nil
	}
	if s.heldList != nil && s.heldList.Digest == s.reported {
		objects := len(chunks)
		for _, e := range s.lacking() {
			o, ok := s.cfg.Objects.Object(Digest(e.GetDigest()))
			if !ok || len(o.Body) > 4*maxPush || !add(encodeObject(o.Kind, o.Digest, o.Body)) {
				chunks = chunks[:objects] // not a small change
				break
			}
		}
	}
	return s.packPush(chunks)
}

// lacking returns the entries of the newest list with objects that the held list does not name.
func (s *Session) lacking() []*longshorepb.Entry {
	held := make(map[Digest]struct{}, len(s.heldList.Entries))
	for _, e := range s.heldList.Entries {
		if !e.GetAbsent() {
			held[Digest(e.GetDigest())] = struct{}{}
		}
	}
	var l []*longshorepb.Entry
	for _, e := range s.newest.Entries {
		if e.GetAbsent() {
			continue
		}
		if _, ok := held[Digest(e.GetDigest())]; !ok {
			l = append(l, e)
		}
	}
	return l
}

// packPush puts chunks into messages of at most maxMessage.
func (s *Session) packPush(chunks []*longshorepb.Chunk) []HubAction {
	var actions []HubAction
	m := &longshorepb.Push{}
	flush := func() {
		name := topic.Topic{Kind: topic.Push, Edge: s.cfg.Edge}.String()
		actions = append(actions, Send{Topic: name, Payload: marshal(m)})
		m = &longshorepb.Push{}
	}
	for _, c := range chunks {
		m.Chunks = append(m.Chunks, c)
		if len(m.Chunks) > 1 && proto.Size(m) > maxMessage {
			m.Chunks = m.Chunks[:len(m.Chunks)-1]
			flush()
			m.Chunks = append(m.Chunks, c)
		}
	}
	flush()
	return actions
}

// answer sends what one subscription asked for.
func (s *Session) answer(now time.Time, f fetchRequest) []HubAction {
	e, ok := s.lookup(f.digest)
	if !ok {
		return s.gone(now, f)
	}
	t := topic.Topic{Kind: topic.Objects, Edge: s.cfg.Edge, Digest: f.digest[:], Offset: f.offset}
	if e.kind == longshorepb.Kind_KIND_MODEL {
		t.Kind, t.Edge = topic.Models, ""
	}
	name := t.String()
	total := uint64(len(e.data))
	if f.offset > 0 && f.offset >= total {
		// The edge has a part of another encoding: one empty chunk tells it the total of this one.
		return []HubAction{Send{Topic: name, Payload: marshal(e.chunk(len(e.data), len(e.data))), Retain: true}}
	}
	var actions []HubAction
	for at := f.offset; at == f.offset || at < min(total, f.offset+requestBytes); at += chunkBytes {
		c := e.chunk(int(at), int(min(total, at+chunkBytes)))
		actions = append(actions, Send{Topic: name, Payload: marshal(c), Retain: true})
	}
	return actions
}

// gone answers a digest that the edge should not hold (any more), with the newest head.
func (s *Session) gone(now time.Time, f fetchRequest) []HubAction {
	c := &longshorepb.Chunk{Digest: f.digest[:], Gone: true}
	if s.mayTell() {
		s.makeHead(now)
		c.Newest = s.head
	}
	t := topic.Topic{Kind: topic.Objects, Edge: s.cfg.Edge, Digest: f.digest[:], Offset: f.offset}
	return []HubAction{Send{Topic: t.String(), Payload: marshal(c), Retain: true}}
}

// lookup returns an object or list that the newest list or that of the last head names: an edge reads nothing else.
func (s *Session) lookup(d Digest) (encodedObject, bool) {
	for _, l := range []*List{s.newest, s.sent} {
		if l == nil {
			continue
		}
		if l.Digest == d {
			if s.encoded.digest != d {
				s.encoded = encodeObject(longshorepb.Kind_KIND_LIST, d, l.Body())
			}
			return s.encoded, true
		}
		if !l.Names(d) {
			continue
		}
		if s.encoded.digest == d {
			return s.encoded, true
		}
		o, ok := s.cfg.Objects.Object(d)
		if !ok {
			return encodedObject{}, false
		}
		s.encoded = encodeObject(o.Kind, d, o.Body)
		return s.encoded, true
	}
	return encodedObject{}, false
}

// Deadline is when Poll should be called again if nothing else happens; zero for never.
func (s *Session) Deadline() time.Time {
	switch {
	case s.closed || s.newest == nil || s.sent == nil || !s.mayTell():
		return time.Time{}
	case s.sent.Digest != s.newest.Digest:
		return s.sentAt.Add(headPause)
	case !s.applied:
		return s.resendAt
	}
	return time.Time{}
}

// InSync reports whether the edge has reported the newest list as committed.
func (s *Session) InSync() bool {
	return s.newest != nil && s.sent != nil && s.sent.Digest == s.newest.Digest && s.applied
}

func encodeObject(kind longshorepb.Kind, d Digest, body []byte) encodedObject {
	enc, data := encode(body)
	return encodedObject{digest: d, kind: kind, enc: enc, data: data}
}

// chunk returns bytes [from, to) of the encoded object.
func (e encodedObject) chunk(from, to int) *longshorepb.Chunk {
	return &longshorepb.Chunk{
		Digest: e.digest[:], Kind: e.kind, Encoding: e.enc, Offset: uint64(from), Total: uint64(len(e.data)), Data: e.data[from:to],
	}
}

// marshal encodes messages made here, whose strings were checked to be UTF-8 when the session began.
func marshal(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("encode %s: %v", m.ProtoReflect().Descriptor().Name(), err))
	}
	return b
}

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
