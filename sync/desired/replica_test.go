package desired

import (
	"crypto/ed25519"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

const indexTopic = "longshore/v1/nodes/e1/index"

// started returns a replica with an empty store that has said hello with the nonce 1.
func started(t *testing.T) *Replica {
	t.Helper()
	r := NewReplica(ReplicaConfig{
		Edge: "e1", EdgeKey: edgeKey, HubKeys: []ed25519.PublicKey{testKey.Public().(ed25519.PublicKey)},
	}, Stored{})
	r.Start(time.Unix(1e9, 0), [16]byte{1}, 1, nil, nil)
	if len(r.Poll(time.Unix(1e9, 0))) != 2 {
		t.Fatal("no subscription and hello at the start")
	}
	return r
}

func headFor(change func(h *longshorepb.Head)) *longshorepb.Head {
	nonce := [16]byte{1}
	h := &longshorepb.Head{
		Cluster: "c1", Edge: "e1", EdgeKey: edgeKey, Nonce: nonce[:], Counter: 1, List: make([]byte, 32),
	}
	change(h)
	return h
}

// TestG5Heads: an edge would run what somebody in the middle made up, or repeated from another day or another edge.
func TestG5Heads(t *testing.T) {
	now := time.Unix(1e9, 0)
	other := ed25519.NewKeyFromSeed(make([]byte, 32))
	signed := func(change func(h *longshorepb.Head)) []byte { return marshal(signHead(testKey, headFor(change))) }
	tampered := signHead(testKey, headFor(func(*longshorepb.Head) {}))
	tampered.Head = marshal(headFor(func(h *longshorepb.Head) { h.List = []byte(strings.Repeat("x", 32)) }))
	foreignTag := signHead(testKey, headFor(func(*longshorepb.Head) {}))
	foreignTag.Signature = ed25519.Sign(testKey, foreignTag.GetHead())
	posing := signHead(other, headFor(func(*longshorepb.Head) {}))
	posing.KeyId = tampered.GetKeyId()
	for name, payload := range map[string][]byte{
		"malformed":          []byte("\xff\xff\xff"),
		"empty":              nil,
		"unknown key":        marshal(signHead(other, headFor(func(*longshorepb.Head) {}))),
		"another key's name": marshal(posing),
		"tampered":           marshal(tampered),
		"no domain tag":      marshal(foreignTag),
		"another edge":       signed(func(h *longshorepb.Head) { h.Edge = "e2" }),
		"another credential": signed(func(h *longshorepb.Head) { h.EdgeKey = make([]byte, 32) }),
		"another session":    signed(func(h *longshorepb.Head) { h.Nonce = make([]byte, 16) }),
		"counter zero":       signed(func(h *longshorepb.Head) { h.Counter = 0 }),
		"no cluster":         signed(func(h *longshorepb.Head) { h.Cluster = "" }),
		"short list digest":  signed(func(h *longshorepb.Head) { h.List = h.List[:31] }),
	} {
		r := started(t)
		if err := r.Receive(now, indexTopic, payload); err == nil {
			t.Errorf("%s: the head is taken", name)
		}
		if s := r.Status(); !s.Target.IsZero() || s.Head != 0 || r.Poll(now) != nil {
			t.Errorf("%s: the replica moved: %+v", name, s)
		}
	}
	r := started(t)
	good := signed(func(h *longshorepb.Head) { h.Counter = 7; h.List[0] = 1 })
	if err := r.Receive(now, indexTopic, good); err != nil {
		t.Fatal(err)
	}
	if err := r.Receive(now, indexTopic, good); err == nil {
		t.Error("a repeated head is taken")
	}
	if err := r.Receive(now, indexTopic, signed(func(h *longshorepb.Head) { h.Counter = 6 })); err == nil {
		t.Error("an older head is taken")
	}
	r.Stop()
	if err := r.Receive(now, indexTopic, good); err == nil {
		t.Error("a head is taken outside a session")
	}
}

// TestClusterIsPinned: an edge pointed at another cluster by mistake would stop everything it runs.
func TestClusterIsPinned(t *testing.T) {
	p := newPair(t, t.TempDir())
	p.setObjects(must(FromPod(pod("a", 1))))
	p.connect()
	p.run()
	payload := marshal(signHead(testKey, headFor(func(h *longshorepb.Head) { h.Cluster = "c2"; h.Counter = 99 })))
	err := p.replica.Receive(p.now, indexTopic, payload)
	if err == nil || !strings.Contains(err.Error(), "edgehub leave") {
		t.Errorf("err = %v, want one that says what to do", err)
	}
	if s := p.replica.Status(); s.Problem == "" || !s.Synced {
		t.Errorf("the status does not show it, or the replica moved: %+v", s)
	}
}

// TestBadChunks: a damaged or hostile answer would be stored, or take the memory of a small box.
func TestBadChunks(t *testing.T) {
	now := time.Unix(1e9, 0)
	o := must(FromPod(pod("a", 100)))
	list := NewList([]*longshorepb.Entry{o.Entry()})
	bomb := must(zstd.NewWriter(nil)).EncodeAll(make([]byte, 64<<20), nil)
	zstdEnc := longshorepb.Encoding_ENCODING_ZSTD
	podKind, listKind := longshorepb.Kind_KIND_POD, longshorepb.Kind_KIND_LIST
	for name, c := range map[string]*longshorepb.Chunk{
		"another kind":     {Kind: listKind, Total: uint64(len(o.Body)), Data: o.Body},
		"huge total":       {Kind: podKind, Total: 1 << 40, Data: o.Body},
		"beyond its total": {Kind: podKind, Total: 3, Data: o.Body},
		"offset overflow":  {Kind: podKind, Total: 3, Offset: 1<<64 - 1, Data: o.Body},
		"no data":          {Kind: podKind, Total: 3},
		"wrong content":    {Kind: podKind, Total: 3, Data: []byte("abc")},
		"zstd bomb":        {Kind: podKind, Total: uint64(len(bomb)), Data: bomb, Encoding: zstdEnc},
		"zstd rubbish":     {Kind: podKind, Total: 5, Data: []byte("\x28\xb5\x2f\xfd\x00"), Encoding: zstdEnc},
		"unknown encoding": {Kind: podKind, Total: uint64(len(o.Body)), Data: o.Body, Encoding: 9},
	} {
		r := started(t)
		feedHead(t, r, now, 1, list)
		r.Poll(now) // asks for the object
		r.Poll(now)
		c.Digest = o.Digest[:]
		tp := topic.Topic{Kind: topic.Objects, Edge: "e1", Digest: o.Digest[:]}.String()
		if err := r.Receive(now, tp, marshal(c)); err == nil {
			t.Errorf("%s: the chunk is taken", name)
		}
		for _, a := range r.Poll(now.Add(time.Hour)) {
			if s, ok := a.(SaveObject); ok && s.Object.Kind != listKind {
				t.Errorf("%s: it is stored", name)
			}
		}
		// The right answer is still taken.
		good := &longshorepb.Chunk{Digest: o.Digest[:], Kind: podKind, Total: uint64(len(o.Body)), Data: o.Body}
		if err := r.Receive(now.Add(time.Hour), tp, marshal(good)); err != nil {
			t.Errorf("%s: afterwards: %v", name, err)
		}
		if acts := r.Poll(now.Add(time.Hour)); len(acts) != 1 {
			t.Errorf("%s: afterwards the right answer is not stored: %v", name, acts)
		}
	}
	r := started(t)
	for name, tp := range map[string]string{
		"another edge's topic": "longshore/v1/nodes/e2/index", "no topic of ours": "devices/x", "a topic up": "longshore/v1/nodes/e1/hello",
		"hostile": "longshore/v1/nodes/../index", "wildcard": "longshore/v1/nodes/+/index",
	} {
		if err := r.Receive(now, tp, nil); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if err := r.Receive(now, indexTopic, make([]byte, 1<<20)); err == nil {
		t.Error("a message of 1 MiB is taken")
	}
}

// feedHead gives r the head of a list, the list sent ahead.
func feedHead(t *testing.T, r *Replica, now time.Time, counter uint64, l *List) {
	t.Helper()
	e := encodeObject(longshorepb.Kind_KIND_LIST, l.Digest, l.Body())
	push := marshal(&longshorepb.Push{Chunks: []*longshorepb.Chunk{e.chunk(0, len(e.data))}})
	head := marshal(signHead(testKey, headFor(func(h *longshorepb.Head) { h.Counter, h.List = counter, l.Digest[:] })))
	if err := r.Receive(now, "longshore/v1/nodes/e1/push", push); err != nil {
		t.Fatal(err)
	}
	if err := r.Receive(now, indexTopic, head); err != nil {
		t.Fatal(err)
	}
}

// TestHostileListIsRefused: an edge would loop on a list it can't take, or the next good one would not help.
func TestHostileListIsRefused(t *testing.T) {
	now := time.Unix(1e9, 0)
	e := must(FromPod(pod("a", 100))).Entry()
	e.Name = "../../a"
	r := started(t)
	bad := NewList([]*longshorepb.Entry{e})
	feedHead(t, r, now, 1, bad)
	if acts := r.Poll(now); acts != nil {
		t.Errorf("actions for a hostile list: %v", acts)
	}
	if s := r.Status(); !strings.Contains(s.Problem, "DNS") || !r.Deadline().IsZero() {
		t.Errorf("status %+v, deadline %v", s, r.Deadline())
	}
	feedHead(t, r, now, 2, NewList(nil))
	if acts := r.Poll(now); len(acts) != 1 {
		t.Errorf("a good list after a hostile one: %v", acts)
	}
}

// TestHintsAreBounded: whoever can write to the push topic would fill the memory of a small box.
func TestHintsAreBounded(t *testing.T) {
	r := started(t)
	for i := range 1000 {
		d := digestOf(1, []byte{byte(i), byte(i >> 8)}, [32]byte{})
		data := make([]byte, 10_000)
		push := marshal(&longshorepb.Push{Chunks: []*longshorepb.Chunk{{Digest: d[:], Total: uint64(len(data)), Data: data}}})
		if err := r.Receive(time.Unix(1e9, 0), "longshore/v1/nodes/e1/push", push); err != nil {
			t.Fatal(err)
		}
	}
	if r.hints.bytes > maxHints || len(r.hints.chunks) > 20 {
		t.Errorf("%d hints of %d bytes are kept", len(r.hints.chunks), r.hints.bytes)
	}
}

// TestStopDuringActions: after a full disk the replica would believe that it holds what was never written, and commit it (G2).
func TestStopDuringActions(t *testing.T) {
	p := newPair(t, t.TempDir())
	p.setObjects(must(FromPod(pod("a", 100))))
	p.connect()
	for range 100 {
		acts := p.replica.Poll(p.now)
		for _, a := range acts {
			switch a := a.(type) {
			case Publish:
				h := &longshorepb.Hello{}
				if err := proto.Unmarshal(a.Payload, h); err != nil {
					t.Fatal(err)
				}
				p.hello(h)
			case Commit:
				t.Fatal("a commit, although nothing was stored")
			case SaveObject:
				p.connect() // nothing of it was executed
			case Subscribe:
				for _, name := range a.Topics {
					if tp := must(topic.Parse(name)); len(tp.Digest) > 0 {
						p.session.Fetch(p.now, Digest(tp.Digest), tp.Offset)
					}
				}
			}
		}
		p.hub()
	}
	p.run()
	p.wantCommitted()
}

// TestCollects: disks would fill with every version an edge ever held (G4).
func TestCollects(t *testing.T) {
	p := newPair(t, t.TempDir())
	p.connect()
	for i := range 20 {
		p.setObjects(must(FromPod(pod("a", 100+i))), must(FromPod(pod("b", 100))))
		p.connect()
		p.run()
		p.wantCommitted()
		if n := len(must(p.store.Load()).Objects); n > 5 {
			t.Fatalf("%d objects after change %d: two lists and three pods are in use", n, i)
		}
	}
}

// TestOtherEncoding: after a hub upgrade that compresses in another way, an edge that resumes a large object would put two
// halves together that don't match, for ever.
func TestOtherEncoding(t *testing.T) {
	now := time.Unix(1e9, 0)
	o := must(FromPod(pod("a", 100_000)))
	l := NewList([]*longshorepb.Entry{o.Entry()})
	for name, part := range map[string]Part{
		"shorter before":        {Data: make([]byte, 20_000), Total: 30_000, Kind: o.Kind, Enc: longshorepb.Encoding_ENCODING_ZSTD},
		"longer before":         {Data: make([]byte, 99_999), Total: uint64(len(o.Body)) - 1, Kind: o.Kind},
		"same size, other data": {Data: make([]byte, 50_000), Total: uint64(len(o.Body)), Kind: o.Kind},
		"another kind":          {Data: make([]byte, 50_000), Total: uint64(len(o.Body)), Kind: longshorepb.Kind_KIND_MODEL},
	} {
		r := NewReplica(ReplicaConfig{
			Edge: "e1", EdgeKey: edgeKey, HubKeys: []ed25519.PublicKey{testKey.Public().(ed25519.PublicKey)},
		}, Stored{Parts: map[Digest]Part{o.Digest: part}})
		s := testSession(t, objects{o.Digest: o}, func(h *longshorepb.Hello) { h.Nonce[0] = 1 })
		s.SetList(now, l)
		s.Poll(now)
		s.Proved(now, l)
		r.Start(now, [16]byte{1}, 1, nil, nil)
		done := false
		for range 200 {
			for acts := r.Poll(now); acts != nil; acts = r.Poll(now) {
				for _, a := range acts {
					if _, ok := a.(Commit); ok {
						done = true
					}
					if sub, ok := a.(Subscribe); ok {
						for _, n := range sub.Topics {
							if tp := must(topic.Parse(n)); len(tp.Digest) > 0 {
								s.Fetch(now, Digest(tp.Digest), tp.Offset)
							}
						}
					}
				}
			}
			for acts := s.Poll(now); acts != nil; acts = s.Poll(now) {
				for _, a := range acts {
					if send, ok := a.(Send); ok {
						_ = r.Receive(now, send.Topic, send.Payload) // the one that completes the wrong bytes is refused
					}
				}
			}
			now = now.Add(time.Second)
		}
		if !done {
			t.Errorf("%s: never complete: %+v", name, r.Status())
		}
	}
}
