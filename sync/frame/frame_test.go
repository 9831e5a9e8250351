package frame

import (
	"bytes"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

func codec(t testing.TB) (*Encoder, *Decoder) {
	t.Helper()
	e, err := NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return e, d
}

func sample(n int) *Frame {
	f := &Frame{Stream: "vibration", First: 7, Count: uint32(n), BootID: "b"}
	for i := range n {
		f.Records = AppendRecord(f.Records, Record{MonoNs: int64(i), WallNs: -int64(i), Topic: []byte("a/b"), Payload: bytes.Repeat([]byte{byte(i)}, i)})
	}
	return f
}

// Records must come out as they went in, also those with empty fields and negative times, and match the generated
// messages: other programs read the wire by the .proto file.
func TestRoundTrip(t *testing.T) {
	e, d := codec(t)
	for _, n := range []int{1, 3, 200} {
		f := sample(n)
		b, err := e.Encode(f)
		if err != nil {
			t.Fatal(err)
		}
		got, err := d.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Records, f.Records) || got.Stream != f.Stream || got.First != 7 || got.Last() != f.Last() || got.BootID != "b" {
			t.Fatalf("decoded %+v", got)
		}
		var p longshorepb.Records
		if err := proto.Unmarshal(got.Records, &p); err != nil {
			t.Fatal(err)
		}
		i := 0
		err = got.Walk(func(seq uint64, r Record) bool {
			q := p.GetRecords()[i]
			if seq != 7+uint64(i) || r.MonoNs != q.GetMonoNs() || r.WallNs != q.GetWallNs() || string(r.Topic) != q.GetTopic() ||
				!bytes.Equal(r.Payload, q.GetPayload()) {
				t.Fatalf("record %d: %+v, generated code reads %+v", i, r, q)
			}
			i++
			return true
		})
		if err != nil || i != n || len(p.GetRecords()) != n {
			t.Fatalf("walked %d records of %d: %v", i, n, err)
		}
	}
}

// A decompression bomb must not take the hub's memory: 64 MiB of zeros fit in a few KiB of zstd.
func TestBombIsRefused(t *testing.T) {
	_, d := codec(t)
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	bomb := z.EncodeAll(make([]byte, 64<<20), nil)
	b, err := proto.Marshal(&longshorepb.Frame{Stream: "s", First: 1, Count: 1, Encoding: longshorepb.Encoding_ENCODING_ZSTD, Records: bomb})
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > MaxFrame {
		t.Fatalf("the bomb is refused for its own size of %d bytes", len(b))
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := d.Decode(b); err == nil || !strings.Contains(err.Error(), "decompress") {
		t.Errorf("Decode gave %v", err)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 8<<20 {
		t.Errorf("%d bytes allocated for a refused frame", got)
	}
}

// What a broken or hostile edge sends must be an error that says why.
func TestBadFramesAreRefused(t *testing.T) {
	_, d := codec(t)
	one := AppendRecord(nil, Record{MonoNs: 1})
	for name, p := range map[string]*longshorepb.Frame{
		"no stream":        {First: 1, Count: 1, Records: one},
		"control":          {Stream: "a\x00b", First: 1, Count: 1, Records: one},
		"sequence 0":       {Stream: "s", Count: 1, Records: one},
		"sequence absurd":  {Stream: "s", First: 1<<64 - 1, Count: 1, Records: one},
		"no records":       {Stream: "s", First: 1},
		"fewer than said":  {Stream: "s", First: 1, Count: 2, Records: one},
		"more than said":   {Stream: "s", First: 1, Count: 1, Records: append(one, one...)},
		"garbage":          {Stream: "s", First: 1, Count: 1, Records: []byte{0xff, 0xff}},
		"unknown encoding": {Stream: "s", First: 1, Count: 1, Encoding: 9, Records: one},
		"not zstd":         {Stream: "s", First: 1, Count: 1, Encoding: 1, Records: one},
		"topic not UTF-8":  {Stream: "s", First: 1, Count: 1, Records: AppendRecord(nil, Record{Topic: []byte{0xff}})},
	} {
		b, err := proto.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Decode(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// No bytes from the network may crash the hub.
func FuzzDecode(f *testing.F) {
	e, d := codec(f)
	for _, n := range []int{1, 50} {
		b, err := e.Encode(sample(n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := d.Decode(b)
		if err != nil {
			return
		}
		if got.Count == 0 || got.First == 0 || len(got.Records) > MaxRecords {
			t.Fatalf("accepted %+v", got)
		}
		walked, next := uint32(0), got.First
		err = got.Walk(func(seq uint64, _ Record) bool {
			if seq != next {
				t.Fatalf("sequence %d after %d", seq, next-1)
			}
			walked, next = walked+1, next+1
			return true
		})
		if err != nil || walked != got.Count {
			t.Fatalf("%d records of %d: %v", walked, got.Count, err)
		}
		if boot, err := BootID(b); err != nil || boot != got.BootID {
			t.Fatalf("boot %q, want %q: %v", boot, got.BootID, err)
		}
	})
}
