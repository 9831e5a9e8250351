package desired

import (
	"testing"
	"time"

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
	f.Add(NewList(nil).Body)
	f.Add(NewList([]*longshorepb.Entry{
		must(FromPod(pod("a", 3))).Entry(), AbsentEntry(longshorepb.Kind_KIND_SECRET, "default", "s", "not found"),
	}).Body)
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
