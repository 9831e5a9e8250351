package desired

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// helloMin and helloMax bound the doubling pause after which a Hello that no head answered is sent again.
	helloMin = 30 * time.Second
	helloMax = 5 * time.Minute
	// maxHints bounds objects sent ahead that no head has named yet, in bytes of data.
	maxHints = 4 * maxPush
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
type Replica struct {
	cfg       ReplicaConfig
	keys      map[[8]byte]ed25519.PublicKey
	secretKey [32]byte

	// What the store holds, as far as is known.
	committed, previous *List
	cluster             string
	have                map[Digest]struct{}
	lists               map[Digest]*List // those of have that are lists, until they are dropped
	parts               map[Digest]Part
	// maybe and unsure are what the last actions before a Stop would have stored; nobody said whether they did.
	maybe  map[Digest]struct{}
	unsure *List
	// unconfirmed are the actions of the last Poll: executed once the owner calls anything but Stop.
	unconfirmed []EdgeAction

	// The session.
	running            bool
	nonce              [16]byte
	session            uint64
	outboxes           []*longshorepb.OutboxHead
	account            []byte // digest that the Hello names
	accountHeld        bool   // what the newest head says
	counter            uint64
	helloAt            time.Time
	helloPause         time.Duration
	subscribed         bool
	synced, superseded bool
	unknown            bool // what the newest head says
	problem            string

	target *target
	hints  hints
	flow   flow
	out    []EdgeAction
}

// target is the list being fetched.
type target struct {
	digest Digest
	// cluster that the head named; the first commit pins it.
	cluster string
	list    *List // nil until it is here
	// missing are the entries whose objects are not stored yet, by digest; todo is their order.
	missing map[Digest]*longshorepb.Entry
	todo    []*longshorepb.Entry
	// want and done count canonical bytes of what was missing when the list came.
	want, done uint64
	// refused is set when the list or an object is not what an honest hub makes: only another head helps.
	refused bool
}

// NewReplica continues from what the store holds.
func NewReplica(cfg ReplicaConfig, stored Stored) *Replica {
	if cfg.MaxListBytes == 0 || cfg.MaxListBytes > MaxListBytes {
		cfg.MaxListBytes = MaxListBytes
	}
	if cfg.MaxObjectBytes == 0 || cfg.MaxObjectBytes > MaxObjectBytes {
		cfg.MaxObjectBytes = MaxObjectBytes
	}
	r := &Replica{
		cfg: cfg, keys: make(map[[8]byte]ed25519.PublicKey, len(cfg.HubKeys)), secretKey: SecretKey(cfg.EdgeKey),
		committed: stored.List, previous: stored.Previous, cluster: stored.Cluster,
		have: make(map[Digest]struct{}, len(stored.Objects)), lists: make(map[Digest]*List), parts: make(map[Digest]Part),
		maybe: make(map[Digest]struct{}),
	}
	for _, k := range cfg.HubKeys {
		r.keys[KeyID(k)] = k
	}
	for d := range stored.Objects {
		r.have[d] = struct{}{}
	}
	for d, l := range stored.Lists {
		r.lists[d] = l
	}
	for d, p := range stored.Parts {
		r.parts[d] = p
	}
	return r
}

// Start begins a session on a fresh connection. nonce must be random, session higher than ever before; account is the digest of
// what was reported in an earlier session, nil if nothing was.
func (r *Replica) Start(now time.Time, nonce [16]byte, session uint64, outboxes []*longshorepb.OutboxHead, account []byte) {
	r.Stop()
	r.running, r.nonce, r.session, r.outboxes, r.account = true, nonce, session, outboxes, account
	r.counter, r.synced, r.superseded, r.unknown, r.subscribed, r.problem = 0, false, false, false, false, ""
	r.accountHeld = false
	r.helloAt, r.helloPause = now, helloMin
	r.flow.reset()
}

// Stop ends the session; partial objects are kept for the next.
func (r *Replica) Stop() {
	for _, a := range r.unconfirmed {
		switch a := a.(type) {
		case SaveObject:
			r.maybe[a.Object.Digest] = struct{}{}
		case Commit:
			r.unsure = a.List
		case Drop:
			for _, d := range a.Digests {
				r.maybe[d] = struct{}{}
			}
		}
	}
	r.unconfirmed, r.out = nil, nil
	for _, f := range r.flow.fetches {
		r.keepPart(f)
	}
	r.flow.fetches = nil
	r.target, r.hints = nil, hints{}
	r.running, r.synced = false, false
}

// confirm books the actions of the last Poll as executed.
func (r *Replica) confirm() {
	for _, a := range r.unconfirmed {
		switch a := a.(type) {
		case SaveObject:
			d := a.Object.Digest
			r.have[d] = struct{}{}
			delete(r.parts, d)
			if t := r.target; t != nil && t.missing != nil {
				delete(t.missing, d)
			}
		case Commit:
			if r.committed != nil && r.committed.Digest != a.List.Digest {
				r.previous = r.committed
			}
			r.committed, r.cluster, r.unsure = a.List, a.Cluster, nil
			r.synced = true
			if r.target != nil && r.target.digest == a.List.Digest {
				r.target = nil
			}
			r.collect()
		}
	}
	r.unconfirmed = nil
}

// collect drops what neither the committed list, nor the one before, nor the target names.
func (r *Replica) collect() {
	lists := []*List{r.committed, r.previous, r.unsure}
	if r.target != nil {
		lists = append(lists, r.target.list)
	}
	keep := make(map[Digest]struct{})
	for _, l := range lists {
		if l == nil {
			continue
		}
		keep[l.Digest] = struct{}{}
		for _, e := range l.Entries {
			if !e.GetAbsent() {
				keep[Digest(e.GetDigest())] = struct{}{}
			}
		}
	}
	var drop []Digest
	dropFrom := func(d Digest) {
		if _, kept := keep[d]; !kept {
			drop = append(drop, d)
		}
	}
	for d := range r.have {
		dropFrom(d)
	}
	for d := range r.maybe {
		dropFrom(d)
	}
	for d := range r.parts {
		dropFrom(d)
	}
	for _, d := range drop {
		delete(r.have, d)
		delete(r.maybe, d)
		delete(r.parts, d)
		delete(r.lists, d)
	}
	if len(drop) > 0 {
		slices.SortFunc(drop, func(a, b Digest) int { return bytes.Compare(a[:], b[:]) })
		r.out = append(r.out, Drop{Digests: drop})
	}
}

// Receive takes a message of the topics index, objects, models and push. An error says what was wrong with it, for a
// counter and the log; nothing of such a message is kept.
func (r *Replica) Receive(now time.Time, name string, payload []byte) error {
	if !r.running {
		return errors.New("message outside a session")
	}
	r.confirm()
	t, err := topic.Parse(name)
	if err != nil {
		return err
	}
	if t.Edge != r.cfg.Edge && t.Kind != topic.Models {
		return fmt.Errorf("message for edge %q", t.Edge)
	}
	if len(payload) > 2*maxMessage {
		return fmt.Errorf("message of %d bytes, at most %d are sent", len(payload), maxMessage)
	}
	switch t.Kind {
	case topic.Index:
		var h longshorepb.SignedHead
		if err := proto.Unmarshal(payload, &h); err != nil {
			return fmt.Errorf("decode index: %w", err)
		}
		return r.receiveHead(&h)
	case topic.Objects, topic.Models:
		var c longshorepb.Chunk
		if err := proto.Unmarshal(payload, &c); err != nil {
			return fmt.Errorf("decode chunk: %w", err)
		}
		if string(c.GetDigest()) != string(t.Digest) {
			return errors.New("chunk of another object than its topic names")
		}
		return r.receiveChunk(now, &c)
	case topic.Push:
		var p longshorepb.Push
		if err := proto.Unmarshal(payload, &p); err != nil {
			return fmt.Errorf("decode push: %w", err)
		}
		return r.hints.add(p.GetChunks())
	}
	return fmt.Errorf("topic %q is not for a replica", name)
}

// receiveHead takes a head that is signed, for this edge and session, and newer than the last.
func (r *Replica) receiveHead(s *longshorepb.SignedHead) error {
	h, err := openHead(r.keys, s)
	if err != nil {
		return err
	}
	if err := r.checkHead(h); err != nil {
		r.problem = err.Error()
		return err
	}
	r.problem = ""
	r.counter = h.GetCounter()
	r.helloAt = time.Time{}
	r.unknown = h.GetUnknown()
	r.accountHeld = h.GetAccount() && len(r.account) > 0
	if h.GetSuperseded() || r.unknown {
		r.superseded = r.superseded || h.GetSuperseded()
		r.target, r.synced = nil, false
		return nil
	}
	d := Digest(h.GetList())
	switch {
	case r.superseded:
		return errors.New("head after the edge was superseded")
	case r.committed != nil && r.committed.Digest == d:
		r.synced = true
		r.target = nil
	case r.target != nil && r.target.digest == d && !r.target.refused:
	default:
		r.synced = false
		r.target = &target{digest: d, cluster: h.GetCluster()}
		r.flow.onlyList(d, r.keepPart)
		r.flow.wake()
	}
	return nil
}

// Poll returns the next actions; nil when there is nothing to do. Calling it again says that they were executed.
func (r *Replica) Poll(now time.Time) []EdgeAction {
	if !r.running {
		return nil
	}
	r.confirm()
	if !r.subscribed {
		r.subscribed = true
		r.out = append(r.out, Subscribe{Topics: []string{
			topic.Topic{Kind: topic.Index, Edge: r.cfg.Edge}.String(), topic.Topic{Kind: topic.Push, Edge: r.cfg.Edge}.String(),
		}})
	}
	if !r.helloAt.IsZero() && !now.Before(r.helloAt) {
		r.hello(now)
	}
	if len(r.out) == 0 && !r.superseded {
		r.advance(now)
	}
	r.unconfirmed, r.out = r.out, nil
	return r.unconfirmed
}

func (r *Replica) hello(now time.Time) {
	h := &longshorepb.Hello{
		Wire: longshorepb.Wire, Nonce: r.nonce[:], Session: r.session, Instance: r.cfg.Instance[:],
		Outboxes: r.outboxes, AgentVersion: r.cfg.AgentVersion, Account: r.account,
	}
	if r.committed != nil {
		h.Held = r.committed.Digest[:]
	}
	r.out = append(r.out, Publish{Topic: topic.Topic{Kind: topic.Hello, Edge: r.cfg.Edge}.String(), Payload: marshal(h)})
	r.helloAt = now.Add(r.helloPause)
	r.helloPause = min(2*r.helloPause, helloMax)
}

// advance does the next step towards the target.
func (r *Replica) advance(now time.Time) {
	t := r.target
	if t == nil || t.refused {
		return
	}
	if t.list == nil {
		r.findList()
		if len(r.out) > 0 || t.refused {
			return
		}
	}
	if t.list == nil {
		r.flow.want(t.digest, longshorepb.Kind_KIND_LIST, nil, r.cfg.MaxListBytes, r.parts)
		r.request(now)
		return
	}
	r.useHints()
	if _, stored := r.have[t.digest]; !stored && len(r.out) == 0 {
		r.saveList(t.list)
	}
	if len(r.out) > 0 {
		return
	}
	if len(t.missing) == 0 {
		r.out = append(r.out, Commit{List: t.list, Cluster: t.cluster})
		return
	}
	r.request(now)
}

// useHints takes objects of the target that were sent ahead.
func (r *Replica) useHints() {
	t := r.target
	for _, c := range slices.Clone(r.hints.chunks) {
		d := Digest(c.GetDigest())
		e := t.missing[d]
		if e == nil {
			continue
		}
		r.hints.take(d)
		if o, err := r.open(c, e, e.GetSize()); err == nil { // a hint that is no good costs a fetch
			r.save(o)
		}
	}
}

// findList takes the target's list from what is stored or was sent ahead.
func (r *Replica) findList() {
	t := r.target
	for _, l := range []*List{r.committed, r.previous, r.lists[t.digest]} {
		if l != nil && l.Digest == t.digest {
			r.setList(l)
			return
		}
	}
	if c := r.hints.take(t.digest); c != nil && c.GetKind() == longshorepb.Kind_KIND_LIST {
		if body, err := decode(c.GetEncoding(), c.GetData(), r.cfg.MaxListBytes); err == nil {
			_ = r.takeList(t.digest, body) // a hint that is no good costs a fetch; a refused list shows in the status
		}
	}
}

// takeList verifies a list that arrived and stores it.
func (r *Replica) takeList(d Digest, body []byte) error {
	if digestOf(longshorepb.Kind_KIND_LIST, body, [32]byte{}) != d {
		return fmt.Errorf("list: %w", errWrongDigest)
	}
	l, err := parseList(body, r.cfg.MaxObjectBytes)
	if err != nil {
		r.refuse(d, err)
		return refusal{err}
	}
	r.lists[d] = l
	r.saveList(l)
	if r.target != nil && r.target.digest == d {
		r.setList(l)
	}
	return nil
}

func (r *Replica) saveList(l *List) {
	r.out = append(r.out, SaveObject{Object{Ref: Ref{Kind: longshorepb.Kind_KIND_LIST}, Digest: l.Digest, Body: l.Body()}})
}

// setList starts fetching what the list names and the store lacks.
func (r *Replica) setList(l *List) {
	t := r.target
	t.list, t.missing = l, make(map[Digest]*longshorepb.Entry)
	for _, e := range l.Entries {
		if e.GetAbsent() {
			continue
		}
		d := Digest(e.GetDigest())
		if _, ok := r.have[d]; ok {
			continue
		}
		t.missing[d] = e
		t.todo = append(t.todo, e)
		t.want += e.GetSize()
	}
	r.flow.keepOnly(t.missing, r.keepPart)
	r.collect()
}

// refuse gives up the target of digest d, or that names d, until another head comes.
func (r *Replica) refuse(d Digest, err error) {
	t := r.target
	if t != nil && (t.digest == d || t.missing[d] != nil) {
		t.refused = true
		r.problem = err.Error()
	}
}

// open decodes a complete object and verifies it against its entry.
func (r *Replica) open(c *longshorepb.Chunk, e *longshorepb.Entry, limit uint64) (Object, error) {
	if c.GetKind() != e.GetKind() {
		return Object{}, fmt.Errorf("the list names a %s, what came is a %s", kindName(e.GetKind()), kindName(c.GetKind()))
	}
	body, err := decode(c.GetEncoding(), c.GetData(), limit)
	if err != nil {
		return Object{}, err
	}
	return verifyObject(e, body, r.secretKey)
}

func (r *Replica) save(o Object) {
	r.out = append(r.out, SaveObject{Object: o})
	r.flow.remove(o.Digest)
	if r.target != nil {
		r.target.done += uint64(len(o.Body))
	}
}

// keepPart keeps what is here of a fetch that ends, for when the object is wanted again.
func (r *Replica) keepPart(f *fetch) {
	if len(f.part.Data) == 0 {
		delete(r.parts, f.digest)
		r.maybe[f.digest] = struct{}{} // a part saved before the fetch began anew may be stored
		return
	}
	f.part.unsaved = len(f.part.Data) - f.saved
	r.parts[f.digest] = f.part
}

// Deadline is when Poll should be called again if nothing else happens; zero for never.
func (r *Replica) Deadline() time.Time {
	if !r.running {
		return time.Time{}
	}
	d := r.helloAt
	if r.target != nil && !r.target.refused {
		if f := r.flow.deadline(); d.IsZero() || !f.IsZero() && f.Before(d) {
			d = f
		}
	}
	return d
}

// Status for people and reports.
func (r *Replica) Status() ReplicaStatus {
	s := ReplicaStatus{
		Synced: r.synced, Superseded: r.superseded, Unknown: r.unknown, Cluster: r.cluster, Head: r.counter, Problem: r.problem,
		AccountHeld: r.accountHeld,
	}
	if r.committed != nil {
		s.Committed = r.committed.Digest
	}
	if t := r.target; t != nil {
		s.Target, s.Have, s.Want = t.digest, t.done, t.want
		for _, f := range r.flow.fetches {
			s.Have += uint64(len(f.part.Data))
			if t.list == nil {
				s.Want += f.part.Total
			}
		}
		s.Want = max(s.Want, s.Have)
	}
	return s
}

// ReplicaStatus says where the replica stands.
type ReplicaStatus struct {
	// Committed is the list that holds; Target the one being fetched, zero if none.
	Committed, Target Digest
	// Synced is set when in this session a head named the committed list.
	Synced bool
	// Superseded is set when a later instance took over: the owner closes the connection and does not come back by itself.
	Superseded bool
	// Unknown is set when the hub says that there is no Edge of this name: the owner closes the connection, keeps what is
	// held, and comes back later.
	Unknown bool
	// Have and Want count bytes of the objects being fetched.
	Have, Want uint64
	Cluster    string
	// Head is the counter of the last head taken in this session. When it grows while Synced holds, the hub has not heard
	// that the list is committed: report it again.
	Head uint64
	// AccountHeld is set when the hub holds the account that the Hello named: what differs from it is all that is to be reported.
	AccountHeld bool
	// Problem says, for people, why the last head or its list was refused; empty if it was not.
	Problem string
}

// EdgeAction is one of Publish, Subscribe, SaveObject, SavePart, Commit and Drop.
type EdgeAction interface{ edgeAction() }

// Publish sends a message up.
type Publish struct {
	Topic   string
	Payload []byte
}

// Subscribe asks for topics.
type Subscribe struct{ Topics []string }

// SavePart keeps a part of an object, so that fetching resumes after a crash. It need not be synced to disk. Offset 0
// replaces the parts saved before.
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

// Commit makes a list the current one, in one transaction, durably. The list and every object it names are stored.
type Commit struct {
	List    *List
	Cluster string
}

// Drop forgets objects, lists and parts that neither the committed list, nor the last good one, nor a list in flight names.
type Drop struct{ Digests []Digest }

func (Publish) edgeAction()    {}
func (Subscribe) edgeAction()  {}
func (SavePart) edgeAction()   {}
func (SaveObject) edgeAction() {}
func (Commit) edgeAction()     {}
func (Drop) edgeAction()       {}
