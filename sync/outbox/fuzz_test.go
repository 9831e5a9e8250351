package outbox

import (
	"fmt"
	"hash/crc32"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
)

// readAll reads both lanes to their end, so that whatever stands in the log is sent once.
func readAll(t *testing.T, l *Log) (frames int) {
	t.Helper()
	live, backlog := l.NewReaders()
	for _, r := range []*Reader{live, backlog} {
		for messages := 0; ; messages++ {
			m, err := r.Next(frame.MaxMessage)
			if err != nil {
				t.Fatal(err)
			}
			if m == nil {
				break
			}
			if size := proto.Size(m); size > frame.MaxMessage {
				t.Fatalf("a message of %d bytes", size)
			}
			if messages > 10_000 {
				t.Fatal("the lane has no end")
			}
			frames += len(m.GetFrames())
		}
	}
	return frames
}

// A state file whose checksum is right and whose content is not (another version's, a tool's) may cost the account, and must
// neither keep the agent from starting nor from recording.
func FuzzState(f *testing.F) {
	seedBox := newBox(f, 1, Config{})
	seedBox.open()
	if err := seedBox.append("s", 3, func(i int) string { return fmt.Sprint(i) }); err != nil {
		f.Fatal(err)
	}
	seedBox.log.mu.Lock()
	if err := seedBox.log.save(); err != nil {
		f.Fatal(err)
	}
	seedBox.log.mu.Unlock()
	_, good, _ := strings.Cut(string(seedBox.disk.now["/state/state"].data), "\n")
	id := strings.Repeat("ab", 16)
	f.Add(good)
	f.Add(strings.Replace(good, `"next":4`, `"next":18446744073709551615`, 1))
	f.Add(`{"version":1,"epochs":[{"id":"` + id + `","streams":[{"stream":"s","next":9,"losses":[{"first":1,"last":8,"reason":"QuotaBytes"}]}]}]}`)
	f.Add(`{"version":1,"epochs":[{"id":"` + id + `","streams":[{"stream":"s","next":9,"losses":[null]}]}]}`)
	f.Add(`{"version":1,"epochs":[{"id":"` + id + `"},{"id":"` + id + `"}]}`)
	f.Add(`{"version":2}`)
	f.Fuzz(func(t *testing.T, body string) {
		b := newBox(t, 1, Config{})
		b.corrupt = true
		b.open()
		if err := b.append("s", 2, func(i int) string { return fmt.Sprint(i) }); err != nil {
			t.Fatal(err)
		}
		if err := b.log.Close(); err != nil {
			t.Fatal(err)
		}
		in := b.disk.now[filepath.Join("/state", "state")]
		in.data = fmt.Appendf(nil, "%08x\n%s", crc32.Checksum([]byte(body), castagnoli), body)
		l, err := open("/state", b.cfg, b.disk, b.clock)
		if err != nil {
			if !strings.Contains(err.Error(), "version") {
				t.Fatalf("the agent does not start: %v", err)
			}
			return
		}
		b.log = l
		readAll(t, l)
		if err := b.append("s", 1, func(int) string { return "after" }); err != nil {
			t.Fatalf("nothing can be recorded: %v", err)
		}
		if frames := readAll(t, l); frames == 0 {
			t.Fatal("what was recorded is not sent")
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// An acknowledgement, also one that its hub got wrong, must never make the edge forget what it does not name, nor break its
// account: accepted = acknowledged + dropped + held.
func FuzzAck(f *testing.F) {
	add := func(a *longshorepb.StreamAck) {
		b, err := proto.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	add(&longshorepb.StreamAck{Stream: "s", Watermark: 4})
	add(&longshorepb.StreamAck{Stream: "s", Watermark: 1, Above: []*longshorepb.Range{{First: 2, Last: 3}, {First: 3, Last: 6}}})
	add(&longshorepb.StreamAck{Stream: "s", Watermark: 1 << 63, Above: []*longshorepb.Range{{First: 5, Last: 4}, nil}})
	f.Fuzz(func(t *testing.T, payload []byte) {
		a := new(longshorepb.StreamAck)
		if proto.Unmarshal(payload, a) != nil {
			return
		}
		b := newBox(t, 1, Config{})
		b.open()
		const records = 6
		for range records {
			if err := b.append("s", 1, func(i int) string { return fmt.Sprint(i) }); err != nil {
				t.Fatal(err)
			}
		}
		h, next := b.next("s")
		err := b.log.Ack(&longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: h.GetEpoch(), Streams: []*longshorepb.StreamAck{a}}}})
		named := map[uint64]bool{} // by a dumb reading of the acknowledgement
		for seq := uint64(1); err == nil && a.GetStream() == "s" && seq < next; seq++ {
			named[seq] = seq < a.GetWatermark()
			for _, r := range a.GetAbove() {
				named[seq] = named[seq] || r.GetFirst() <= seq && seq <= r.GetLast()
			}
		}
		acked := uint64(0)
		for _, n := range named {
			if n {
				acked++
			}
		}
		stats, _ := b.log.Stats()
		if len(stats) != 1 || stats[0].Accepted != records || stats[0].Acked != acked || stats[0].Dropped != 0 || stats[0].Held != records-acked {
			t.Fatalf("%v (%v): %+v, %d are acknowledged", a, err, stats, acked)
		}
		if frames := readAll(t, b.log); frames != records-int(acked) {
			t.Fatalf("%d frames of a record each are sent, %d records are held", frames, records-acked)
		}
	})
}
