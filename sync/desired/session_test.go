package desired

import (
	"crypto/ed25519"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

func testHello(change func(h *longshorepb.Hello)) *longshorepb.Hello {
	h := &longshorepb.Hello{Wire: longshorepb.Wire, Nonce: make([]byte, 16), Instance: make([]byte, 16), Session: 1}
	change(h)
	return h
}

func testSession(t *testing.T, o objects, change func(h *longshorepb.Hello)) *Session {
	t.Helper()
	s, err := NewSession(SessionConfig{Cluster: "c1", Edge: "e1", EdgeKey: edgeKey, Key: testKey, Objects: o},
		testHello(change), time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestBadHello: a hub would answer what it does not understand, and the edge would never know why nothing comes.
func TestBadHello(t *testing.T) {
	for name, change := range map[string]func(h *longshorepb.Hello){
		"newer wire": func(h *longshorepb.Hello) { h.Wire = longshorepb.Wire + 1 },
		"no wire":    func(h *longshorepb.Hello) { h.Wire = 0 },
		"nonce":      func(h *longshorepb.Hello) { h.Nonce = h.Nonce[:3] },
		"instance":   func(h *longshorepb.Hello) { h.Instance = nil },
		"session":    func(h *longshorepb.Hello) { h.Session = 0 },
		"held":       func(h *longshorepb.Hello) { h.Held = []byte("x") },
	} {
		if _, err := NewSession(SessionConfig{Cluster: "c1", Edge: "e1", Key: testKey}, testHello(change), time.Time{}); err == nil {
			t.Errorf("%s: the hello is taken", name)
		}
	}
}

// TestG5ForeignDigest: an edge could read another edge's Secrets from the same cache by asking for their digests.
func TestG5ForeignDigest(t *testing.T) {
	now := time.Unix(1e9, 0)
	mine, foreign := must(FromPod(pod("mine", 10))), must(FromPod(pod("foreign", 10)))
	s := testSession(t, objects{mine.Digest: mine, foreign.Digest: foreign}, func(*longshorepb.Hello) {})
	s.SetList(now, NewList([]*longshorepb.Entry{mine.Entry()}))
	for _, a := range s.Poll(now) {
		if _, ok := a.(Prove); !ok {
			t.Fatalf("before the proof the hub sends %v", a)
		}
	}
	s.Proved(now, s.newest)
	for s.Poll(now) != nil {
	}
	s.Fetch(now, foreign.Digest, 0)
	acts := s.Poll(now)
	var c longshorepb.Chunk
	if len(acts) != 1 || proto.Unmarshal(acts[0].(Send).Payload, &c) != nil || !c.GetGone() || len(c.GetData()) > 0 || c.GetNewest() == nil {
		t.Errorf("a foreign digest is answered with %v", &c)
	}
}

// TestFetchesAreBounded: an edge that asks without end would take the hub's memory (G4).
func TestFetchesAreBounded(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := testSession(t, nil, func(*longshorepb.Hello) {})
	for i := range uint64(10_000) {
		s.Fetch(now, Digest{1}, i)
		s.Fetch(now, Digest{1}, i) // and the same again costs nothing
	}
	if len(s.fetches) != maxFetches {
		t.Errorf("%d requests wait, at most %d should", len(s.fetches), maxFetches)
	}
}

// TestOneHeadInFlight: a Deployment that changes ten times a second would flood a slow link with heads.
func TestOneHeadInFlight(t *testing.T) {
	now := time.Unix(1e9, 0)
	empty := NewList(nil)
	o := objects{}
	s := testSession(t, o, func(h *longshorepb.Hello) { h.Held = empty.Digest[:] })
	s.SetList(now, empty)
	heads := 0
	poll := func() {
		for {
			acts := s.Poll(now)
			if acts == nil {
				return
			}
			for _, a := range acts {
				switch a := a.(type) {
				case Prove:
					s.Proved(now, s.newest)
				case Send:
					if strings.HasSuffix(a.Topic, "/index") {
						heads++
					}
				}
			}
		}
	}
	poll()
	if heads != 1 || !s.InSync() {
		t.Fatalf("%d heads for an edge that is up to date, in sync %v", heads, s.InSync())
	}
	var last *List
	for i := range 100 {
		x := must(FromPod(pod("a", i+1)))
		o[x.Digest] = x
		last = NewList([]*longshorepb.Entry{x.Entry()})
		s.SetList(now, last)
		poll()
	}
	if heads != 2 || s.InSync() {
		t.Errorf("%d heads while the first change is not applied, want 2; in sync %v", heads, s.InSync())
	}
	now = s.Deadline()
	poll()
	if heads != 3 || s.sent.Digest != last.Digest {
		t.Errorf("%d heads, the newest list sent: %v", heads, s.sent.Digest == last.Digest)
	}
	// Not reported: sent again, with growing pauses.
	var pauses []time.Duration
	for range 8 {
		at := s.Deadline()
		pauses = append(pauses, at.Sub(now))
		now = at
		poll()
	}
	if heads != 11 || pauses[0] != 5*time.Second || pauses[7] != 2*time.Minute {
		t.Errorf("%d heads, pauses %v", heads, pauses)
	}
	s.Reported(now, last.Digest[:])
	if !s.InSync() || !s.Deadline().IsZero() {
		t.Error("a reported list is sent again")
	}
}

// TestSupersededIsSigned: whoever is in the middle could stop an edge by saying that it was superseded.
func TestSupersededIsSigned(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := testSession(t, nil, func(h *longshorepb.Hello) { h.Nonce[0] = 1 })
	s.Supersede(now)
	acts := s.Poll(now)
	if len(acts) != 2 || s.Poll(now) != nil {
		t.Fatalf("actions %v", acts)
	}
	send, closed := acts[0].(Send), acts[1].(Close)
	if closed.Reason == "" {
		t.Error("no reason for the log")
	}
	r := started(t)
	forged := ed25519.NewKeyFromSeed(make([]byte, 32))
	if err := r.Receive(now, send.Topic, marshal(signHead(forged, headFor(func(h *longshorepb.Head) { h.Superseded = true })))); err == nil {
		t.Error("a forged superseded is taken")
	}
	if err := r.Receive(now, send.Topic, send.Payload); err != nil {
		t.Fatal(err)
	}
	if !r.Status().Superseded || r.Poll(now) != nil || !r.Deadline().IsZero() {
		t.Errorf("the replica goes on: %+v", r.Status())
	}
}

// TestUnknownIsSigned: a box whose Edge was deleted would look as if its network were broken; and whoever is in the middle
// could make it say so of a healthy fleet.
func TestUnknownIsSigned(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := testSession(t, nil, func(h *longshorepb.Hello) { h.Nonce[0] = 1 })
	s.Dismiss(now)
	acts := s.Poll(now)
	if len(acts) != 2 || acts[1].(Close).Reason == "" || s.Poll(now) != nil {
		t.Fatalf("actions %v", acts)
	}
	r := started(t)
	forged := ed25519.NewKeyFromSeed(make([]byte, 32))
	send := acts[0].(Send)
	if err := r.Receive(now, send.Topic, marshal(signHead(forged, headFor(func(h *longshorepb.Head) { h.Unknown = true })))); err == nil {
		t.Error("a forged unknown is taken")
	}
	if r.Status().Unknown {
		t.Error("a forged unknown counts")
	}
	before := r.Status().Committed
	if err := r.Receive(now, send.Topic, send.Payload); err != nil {
		t.Fatal(err)
	}
	if st := r.Status(); !st.Unknown || st.Synced || st.Superseded || st.Committed != before || r.Poll(now) != nil || !r.Deadline().IsZero() {
		t.Errorf("the replica goes on, or dropped what it holds: %+v", st)
	}
	r.Start(now, [16]byte{2}, 2, nil, nil)
	if r.Status().Unknown {
		t.Error("unknown outlives its session")
	}
}

// TestAckIsSigned (G3): whoever is in the middle of an open link could have the edge drop readings that no sink has.
func TestAckIsSigned(t *testing.T) {
	s := testSession(t, nil, func(h *longshorepb.Hello) { h.Nonce[0] = 1 })
	ack := &longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: make([]byte, 16), Streams: []*longshorepb.StreamAck{{Stream: "s", Watermark: 7}}}}}
	payload := s.SignAck(ack)
	r := started(t)
	got, err := r.OpenAck(payload)
	if err != nil || !proto.Equal(got, ack) {
		t.Fatalf("opened %v, error %v", got, err)
	}
	altered := func(f func(*longshorepb.SignedAck)) []byte {
		var m longshorepb.SignedAck
		if err := proto.Unmarshal(payload, &m); err != nil {
			t.Fatal(err)
		}
		f(&m)
		return marshal(&m)
	}
	for name, forged := range map[string][]byte{
		"bare": marshal(ack), "nothing": nil, "not a message": {0xff},
		"another content": altered(func(m *longshorepb.SignedAck) { m.Ack = marshal(&longshorepb.Ack{}) }),
		"an unknown key":  altered(func(m *longshorepb.SignedAck) { m.KeyId[0]++ }),
		"no signature":    altered(func(m *longshorepb.SignedAck) { m.Signature = nil }),
		"a wrong one":     altered(func(m *longshorepb.SignedAck) { m.Signature[0]++ }),
		"another session": testSession(t, nil, func(h *longshorepb.Hello) { h.Nonce[0] = 2 }).SignAck(ack),
		"a head's domain": altered(func(m *longshorepb.SignedAck) {
			m.Signature = ed25519.Sign(s.cfg.Key, append([]byte(headTag), m.Ack...))
		}),
	} {
		if _, err := r.OpenAck(forged); err == nil {
			t.Errorf("%s is believed", name)
		}
	}
}

// TestBackAndForth: a change that is taken back while it is on its way would leave the edge on it for good, if the head that
// takes it back got lost.
func TestBackAndForth(t *testing.T) {
	now := time.Unix(1e9, 0)
	x := must(FromPod(pod("a", 1)))
	before, after := NewList(nil), NewList([]*longshorepb.Entry{x.Entry()})
	s := testSession(t, objects{x.Digest: x}, func(h *longshorepb.Hello) { h.Held = before.Digest[:] })
	poll := func() {
		for acts := s.Poll(now); acts != nil; acts = s.Poll(now) {
			if _, ok := acts[0].(Prove); ok {
				s.Proved(now, s.newest)
			}
		}
	}
	s.SetList(now, before)
	poll()
	s.SetList(now, after)
	poll()
	now = now.Add(headPause)
	s.SetList(now, before)
	poll()
	if s.sent.Digest != before.Digest || s.InSync() || s.Deadline().IsZero() {
		t.Fatalf("the hub counts a list as applied that the edge reported before the other one: %v", s.InSync())
	}
	s.Reported(now, after.Digest[:])
	if s.InSync() {
		t.Error("in sync with the wrong list")
	}
	s.Reported(now, before.Digest[:])
	if !s.InSync() {
		t.Error("not in sync with the right list")
	}
}
