package desired

import (
	"bytes"
	"crypto/sha256"
	"testing"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

// FuzzReceive: a message that makes the replica panic would take the agent down, again at every reconnect.
func FuzzReceive(f *testing.F) {
	now := time.Unix(1e9, 0)
	o := must(FromPod(pod("a", 300)))
	l := NewList([]*longshorepb.Entry{o.Entry()})
	e := encodeObject(o.Kind, o.Digest, o.Body)
	object := topic.Topic{Kind: topic.Objects, Edge: "e1", Digest: o.Digest[:]}.String()
	f.Add(indexTopic, marshal(signHead(testKey, headFor(func(h *longshorepb.Head) { h.Counter = 5 }))))
	f.Add(object, marshal(e.chunk(0, len(e.data))))
	f.Add(object, marshal(e.chunk(5, 20)))
	f.Add(object, marshal(&longshorepb.Chunk{Digest: o.Digest[:], Gone: true}))
	f.Add("longshore/v1/nodes/e1/push", marshal(&longshorepb.Push{Chunks: []*longshorepb.Chunk{e.chunk(0, len(e.data))}}))
	f.Fuzz(func(t *testing.T, name string, payload []byte) {
		r := started(t)
		feedHead(t, r, now, 1, l)
		for range 3 {
			r.Poll(now)
		}
		_ = r.Receive(now, name, payload) // an error is fine, a panic or a foreign commit is not
		for range 10 {
			for _, a := range r.Poll(now) {
				if c, ok := a.(Commit); ok && c.List.Digest != l.Digest {
					t.Errorf("commits %s", c.List.Digest)
				}
			}
			now = now.Add(time.Minute)
		}
	})
}

// FuzzParseList: as FuzzReceive; and what is taken must be what its digest says.
func FuzzParseList(f *testing.F) {
	f.Add(NewList(nil).Body())
	f.Add(NewList([]*longshorepb.Entry{
		must(FromPod(pod("a", 3))).Entry(), AbsentEntry(longshorepb.Kind_KIND_SECRET, "default", "s", "not found"),
	}).Body())
	f.Fuzz(func(t *testing.T, body []byte) {
		l, err := parseList(body, MaxObjectBytes)
		if err == nil && l.Digest != digestOf(longshorepb.Kind_KIND_LIST, body, [32]byte{}) {
			t.Error("wrong digest")
		}
	})
}

// FuzzDecode: a compressed object could take more memory than its list allows.
func FuzzDecode(f *testing.F) {
	enc, data := encode([]byte(noise("x", 10)))
	f.Add(int32(enc), data)
	enc, data = encode(make([]byte, 5000))
	f.Add(int32(enc), data)
	f.Fuzz(func(t *testing.T, enc int32, data []byte) {
		if b, err := decode(longshorepb.Encoding(enc), data, 4096); err == nil && len(b) > 4096 {
			t.Errorf("%d bytes", len(b))
		}
	})
}

// FuzzHello: no hello may crash the hub, or make it send more than the edge's own list, in messages that fit.
func FuzzHello(f *testing.F) {
	f.Add(marshal(testHello(func(*longshorepb.Hello) {})))
	f.Add(marshal(testHello(func(h *longshorepb.Hello) { h.Held = make([]byte, 32) })))
	f.Add(marshal(testHello(func(h *longshorepb.Hello) {
		h.Outboxes = []*longshorepb.OutboxHead{{Epoch: make([]byte, 16), Streams: []*longshorepb.StreamHead{{Stream: "s", Next: 1 << 63}}}}
	})))
	mine, foreign := must(FromPod(pod("mine", 300))), must(FromPod(pod("foreign", 300)))
	list := NewList([]*longshorepb.Entry{mine.Entry()})
	f.Fuzz(func(t *testing.T, payload []byte) {
		hello := &longshorepb.Hello{}
		if proto.Unmarshal(payload, hello) != nil {
			return
		}
		now := time.Unix(1e9, 0)
		s, err := NewSession(SessionConfig{
			Cluster: "c1", Edge: "e1", EdgeKey: edgeKey, Key: testKey, Objects: objects{mine.Digest: mine, foreign.Digest: foreign},
		}, hello, now)
		if err != nil {
			return
		}
		s.SetList(now, list)
		s.Fetch(now, foreign.Digest, 0)
		for range 20 {
			for _, a := range s.Poll(now) {
				switch a := a.(type) {
				case Prove:
					s.Proved(now, list)
				case Send:
					if len(a.Payload) > maxMessage || bytes.Contains(a.Payload, []byte("foreign")) {
						t.Fatalf("%d bytes on %s: %q", len(a.Payload), a.Topic, a.Payload)
					}
				}
			}
			now = now.Add(time.Minute)
		}
	})
}

// FuzzOpenAck: an edge drops what is acknowledged to it, so nothing may count that the hub did not sign, in this session.
func FuzzOpenAck(f *testing.F) {
	nonce := [16]byte{1}
	s := must(NewSession(SessionConfig{Cluster: "c1", Edge: "e1", EdgeKey: edgeKey, Key: testKey},
		testHello(func(h *longshorepb.Hello) { h.Nonce = nonce[:] }), time.Unix(1e9, 0)))
	signed := &longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: make([]byte, 16), Streams: []*longshorepb.StreamAck{{Stream: "s", Watermark: 9}}}}}
	good := s.SignAck(signed)
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add(marshal(&longshorepb.SignedAck{Ack: marshal(signed), KeyId: []byte("12345678")}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		if a, err := started(t).OpenAck(payload); err == nil && !proto.Equal(a, signed) {
			t.Errorf("believed: %v", a)
		}
	})
}

// FuzzStore: whatever stands in the agent's database, of another version or of a bug of long ago, reading it must not crash the
// agent at every start, and its two readers must agree on what is held.
func FuzzStore(f *testing.F) {
	o := must(FromPod(pod("a", 10)))
	l := NewList([]*longshorepb.Entry{o.Entry()})
	header := func(kind longshorepb.Kind, body []byte) []byte {
		sum := sha256.Sum256(body)
		return append([]byte{byte(kind), 0, 0, 0, 0, 0, 0, 0, byte(len(body))}, sum[:]...)
	}
	f.Add(digestKey(objectKey, o.Digest), header(o.Kind, nil), []byte("c"), []byte(`{"cluster":"c1","list":"AAAA"}`))
	f.Add(digestKey(objectKey, l.Digest), header(longshorepb.Kind_KIND_LIST, l.Body()), append(digestKey(blockKey, l.Digest), 0, 0, 0, 0), l.Body())
	f.Add(append(digestKey(partKey, o.Digest), 0, 0, 0, 0, 0, 0, 0, 0), []byte("\x01\x00\x00\x00\x00\x00\x00\x00\x00\x05abc"), []byte("b"), []byte{})
	f.Add([]byte("p"), []byte("x"), []byte("bshort"), []byte("x")) // found by fuzzing: the agent crashed at each start
	f.Add([]byte("s"), []byte("1"), []byte("kx"), []byte("y"))
	dir := f.TempDir()
	s, _, err := OpenStore(dir, quiet())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2 []byte) {
		bad := func(key, value []byte) bool {
			return len(key) == 0 || len(key) > 1<<10 || len(value) > maxValue || bytes.HasPrefix(key, []byte("!badger!"))
		}
		if bad(key1, value1) || bad(key2, value2) {
			return
		}
		err := s.db.Update(func(txn *badger.Txn) error {
			if err := txn.Set(bytes.Clone(key1), value1); err != nil {
				return err
			}
			return txn.Set(bytes.Clone(key2), value2)
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			for _, key := range [][]byte{key1, key2} {
				if err := s.deleteKeys([][]byte{bytes.Clone(key)}); err != nil {
					t.Fatal(err)
				}
			}
		}()
		st, err := s.Load()
		list, held, cerr := s.Current()
		if err == nil && (st.List == nil) != (list == nil && cerr == nil) {
			t.Fatalf("loads %v, current is %v (%v)", st.List, list, cerr)
		}
		if err == nil && cerr == nil && list != nil && len(held) > len(list.Entries) {
			t.Fatal("holds more than the list names")
		}
		for d := range st.Lists {
			if _, ok := st.Objects[d]; err == nil && !ok {
				t.Fatalf("list %s is held and is no object", d)
			}
		}
		if _, err := s.NextSession(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzTables: what is read of Badger's files before Badger does must judge every file, however it is cut, without a crash.
func FuzzTables(f *testing.F) {
	f.Add([]byte("table\x00\x00\x00\x05\x08\x01\x00\x00\x00\x02"))
	f.Add(append(make([]byte, logHeader), 1, 0, 8, 0, 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = checkTable(data)
		end := logEnd(data)
		if end < logHeader || end > max(logHeader, len(data)) {
			t.Fatalf("a log of %d bytes ends at %d", len(data), end)
		}
		if again := logEnd(data[:min(end, len(data))]); again != end {
			t.Fatalf("cut at %d, the log ends at %d", end, again)
		}
	})
}
