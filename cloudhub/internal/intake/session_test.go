package intake

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
)

var (
	testEpoch   = [16]byte{1, 2, 3}
	testEncoder = sync.OnceValues(frame.NewEncoder)
)

// makeFrame returns a serialized frame of one record for each payload.
func makeFrame(t testing.TB, stream string, first uint64, payloads ...string) []byte {
	t.Helper()
	e, err := testEncoder()
	if err != nil {
		t.Fatal(err)
	}
	f := &frame.Frame{Stream: stream, First: first, Count: uint32(len(payloads)), BootID: "boot-1"}
	for i, p := range payloads {
		mono := int64(first) + int64(i)
		f.Records = frame.AppendRecord(f.Records, frame.Record{MonoNs: mono * 1e9, WallNs: 5 + mono, Topic: []byte("t"), Payload: []byte(p)})
	}
	b, err := e.Encode(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func message(t testing.TB, frames ...[]byte) []byte {
	t.Helper()
	return marshal(t, &longshorepb.Telemetry{Epoch: testEpoch[:], Frames: frames})
}

func (s *store) hello(edge string) *Session { return s.Session(edge, &longshorepb.Hello{}, func() {}) }

func mustReceive(t testing.TB, s *Session, b []byte) {
	t.Helper()
	if err := s.Receive(b); err != nil {
		t.Fatal(err)
	}
}

// What a broken or hostile edge sends is an error with a reason, and nothing of it is booked: neither the good parts of the
// same message nor anything of other edges.
func TestMalformedTelemetryChangesNothing(t *testing.T) {
	s := openStore(t, Config{Dir: t.TempDir()})
	bad, good := s.hello("bad"), s.hello("good")
	ok := makeFrame(t, "s", 1, "a", "b")
	tele := func(f func(m *longshorepb.Telemetry)) []byte {
		m := &longshorepb.Telemetry{Epoch: testEpoch[:], Frames: [][]byte{ok}}
		f(m)
		return marshal(t, m)
	}
	for name, b := range map[string][]byte{
		"garbage":       []byte("\xff\xff\xff"),
		"too long":      make([]byte, frame.MaxMessage+1),
		"no epoch":      tele(func(m *longshorepb.Telemetry) { m.Epoch = nil }),
		"bad frame":     tele(func(m *longshorepb.Telemetry) { m.Frames = append(m.Frames, []byte{1, 2, 3}) }),
		"flipped frame": tele(func(m *longshorepb.Telemetry) { m.Frames = append(m.Frames, ok[:len(ok)-1]) }),
		"loss of nothing": tele(func(m *longshorepb.Telemetry) {
			m.Ledger = []*longshorepb.Loss{{Stream: "s", First: 3, Last: 2}}
		}),
		"loss of everything": tele(func(m *longshorepb.Telemetry) {
			m.Ledger = []*longshorepb.Loss{{Stream: "s", First: 1, Last: math.MaxUint64}}
		}),
		"loss without a stream": tele(func(m *longshorepb.Telemetry) { m.Ledger = []*longshorepb.Loss{{First: 1, Last: 2}} }),
		"long reason": tele(func(m *longshorepb.Telemetry) {
			m.Ledger = []*longshorepb.Loss{{Stream: "s", First: 1, Last: 2, Reason: strings.Repeat("x", 65)}}
		}),
		"stream with NUL": tele(func(m *longshorepb.Telemetry) { m.Low = []*longshorepb.StreamLow{{Stream: "a\x00b", Low: 1}} }),
		"boot with NUL":   tele(func(m *longshorepb.Telemetry) { m.Clocks = []*longshorepb.Clock{{BootId: "a\x00b"}} }),
		"clock quality":   tele(func(m *longshorepb.Telemetry) { m.Clocks = []*longshorepb.Clock{{BootId: "b", Quality: 77}} }),
		"many clocks": tele(func(m *longshorepb.Telemetry) {
			for range maxClocks + 1 {
				m.Clocks = append(m.Clocks, &longshorepb.Clock{BootId: "b"})
			}
		}),
		"fragment beyond its frame": tele(func(m *longshorepb.Telemetry) {
			m.Fragment = &longshorepb.Fragment{Stream: "s", First: 1, Offset: 9, Total: 10, Data: []byte("abc")}
		}),
		"fragment of a huge frame": tele(func(m *longshorepb.Telemetry) {
			m.Fragment = &longshorepb.Fragment{Stream: "s", First: 1, Total: math.MaxUint32, Data: []byte("abc")}
		}),
		"fragment without a start": tele(func(m *longshorepb.Telemetry) {
			m.Fragment = &longshorepb.Fragment{Stream: "s", First: 1, Offset: 5, Total: 10, Data: []byte("abc")}
		}),
		"fragments of another frame": tele(func(m *longshorepb.Telemetry) {
			m.Fragment = &longshorepb.Fragment{Stream: "s", First: 7, Total: uint32(len(ok)), Data: ok}
		}),
	} {
		if err := bad.Receive(b); err == nil || errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v", name, err)
		}
	}
	mustReceive(t, good, message(t, ok))
	s.idle(t)
	sums, entries, err := s.Ledger(context.Background(), Query{})
	if err != nil || len(entries) != 0 || len(sums) != 1 || sums[0] != (Sum{Edge: "good", Stream: "s", Accepted: 2, Delivered: 2}) {
		t.Errorf("books %+v %+v %v", sums, entries, err)
	}
	mustReceive(t, bad, message(t, ok))
	s.idle(t)
	if got := s.sum(t, Query{Edge: "bad"}); got != (Sum{Accepted: 2, Delivered: 2}) {
		t.Errorf("after bad messages a good one is not taken: %+v", got)
	}
}

// G4: what edges send faster than the disk takes it must not fill the memory; and an edge that does so must not shut
// others out.
func TestG4PendingTelemetryIsBounded(t *testing.T) {
	i, err := Open(Config{Dir: t.TempDir(), PendingBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	wake := func() {}
	greedy, modest := i.Session("greedy", &longshorepb.Hello{}, wake), i.Session("modest", &longshorepb.Hello{}, wake)
	noise := make([]byte, 10_000)
	_, _ = rand.Read(noise)
	n := uint64(0)
	for err = nil; err == nil && n < 1000; n++ { // nobody commits: Run is not called
		err = greedy.Receive(message(t, makeFrame(t, "s", 1+n, string(noise))))
	}
	if !errors.Is(err, ErrBusy) || n < 5 || n > 13 {
		t.Fatalf("after %d messages of 10 KB: %v", n, err)
	}
	mustReceive(t, modest, message(t, makeFrame(t, "s", 1, "x")))

	// Fragments of frames never completed count as well, and are given back when the connection ends.
	var leaky []*Session
	for err = nil; err == nil && len(leaky) < 1000; {
		f := i.Session(fmt.Sprint("leaky-", len(leaky)), &longshorepb.Hello{}, wake)
		leaky = append(leaky, f)
		part := &longshorepb.Fragment{Stream: "s", First: 1, Total: 200_000, Data: noise}
		err = f.Receive(marshal(t, &longshorepb.Telemetry{Epoch: testEpoch[:], Fragment: part}))
	}
	if !errors.Is(err, ErrBusy) {
		t.Fatalf("after %d unfinished frames: %v", len(leaky), err)
	}
	for _, f := range leaky {
		f.Close()
	}
	greedy.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := i.Run(ctx); err != nil { // commits what is left
		t.Fatal(err)
	}
	modest.Close()
	if len(i.edges) != 0 || i.pending != 0 && len(i.busy) != 0 {
		t.Errorf("%d edges and %d bytes are kept of edges that are gone", len(i.edges), i.pending)
	}
}

// A flood of one edge must not hold up another's records: each has its share of every commit.
func TestEdgesTakeTurns(t *testing.T) {
	i, err := Open(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	flood, other := i.Session("flood", &longshorepb.Hello{}, func() {}), i.Session("other", &longshorepb.Hello{}, func() {})
	noise := make([]byte, 12_000)
	_, _ = rand.Read(noise)
	for n := range uint64(200) {
		mustReceive(t, flood, message(t, makeFrame(t, "s", 1+n, string(noise))))
	}
	mustReceive(t, other, message(t, makeFrame(t, "s", 1, "x")))
	var size int64
	found := false
	for _, u := range i.gather() {
		size += u.cost
		found = found || u.edge.name == "other"
	}
	if !found || size > groupBytes {
		t.Errorf("first commit of %d bytes holds the other edge's record: %v", size, found)
	}
}

// G3: a commit that failed must leave no trace in the books: what is acknowledged from them would be lost, and tried again the
// records would count as there already. A group too large for the store fails so, and then goes in parts.
func TestG3FailedCommitLeavesNoTrace(t *testing.T) {
	i, err := Open(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	s := &store{Intake: i}
	defer i.Close()
	c := i.Session("e", &longshorepb.Hello{}, func() {})
	mustReceive(t, c, message(t, makeFrame(t, "s", 1, "x")))
	if err := i.commit(i.gather()); err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 12_000)
	_, _ = rand.Read(noise)
	const more = 150
	for n := range uint64(more) {
		mustReceive(t, c, message(t, makeFrame(t, "s", 2+n, string(noise))))
	}
	var group []*unit
	for g := i.gather(); len(g) > 0; g = i.gather() {
		group = append(group, g...)
	}
	if err := i.commitOnce(group); !errors.Is(err, badger.ErrTxnTooBig) {
		t.Fatalf("commit of %d messages: %v", len(group), err)
	}
	if a := c.Ack(true); a.GetEpochs()[0].GetStreams()[0].GetWatermark() != 2 {
		t.Errorf("acknowledged before the commit: %v", a)
	}
	if err := i.commit(group); err != nil {
		t.Fatal(err)
	}
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 1 + more, Delivered: 1 + more}) || len(s.records(t, Query{})) != 1+more {
		t.Errorf("sum %+v", got)
	}
	if a := c.Ack(false); a.GetEpochs()[0].GetStreams()[0].GetWatermark() != more+2 {
		t.Errorf("acknowledgement %v", a)
	}
}

// A cloned edge writes other records under the same names: both must be seen, and nobody's overwritten.
func TestConflictsAreKeptAndCounted(t *testing.T) {
	s := openStore(t, Config{Dir: t.TempDir()})
	c := s.hello("e")
	mustReceive(t, c, message(t, makeFrame(t, "s", 1, "a", "b", "c")))
	mustReceive(t, c, message(t, makeFrame(t, "s", 1, "a", "X", "c"))) // the same commit or the next
	s.idle(t)
	mustReceive(t, c, message(t, makeFrame(t, "s", 1, "a", "X", "c"))) // not counted again
	mustReceive(t, c, message(t, makeFrame(t, "s", 2, "b", "c")))      // other boundaries, same content
	mustReceive(t, c, message(t, makeFrame(t, "s", 3, "Y", "d", "e"))) // a part is new
	s.idle(t)
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 5, Delivered: 5, Resent: 9, Conflicts: 2}) {
		t.Errorf("sum %+v", got)
	}
	var text []string
	for _, r := range s.records(t, Query{}) {
		text = append(text, fmt.Sprint(r.Seq, string(r.Payload)))
	}
	if got := strings.Join(text, " "); got != "1a 2b 3c 4d 5e" {
		t.Errorf("records %s", got)
	}
}

// Records written before the clock was set must show the right time once the edge knows it, and say how good it is.
func TestClockMappingCorrectsTime(t *testing.T) {
	s := openStore(t, Config{Dir: t.TempDir()})
	c := s.hello("e")
	mustReceive(t, c, message(t, makeFrame(t, "s", 1, "a", "b")))
	s.idle(t)
	if r := s.records(t, Query{}); len(r) != 2 || r[0].WallNs != 6 || r[0].Quality != longshorepb.ClockQuality_CLOCK_QUALITY_UNSET {
		t.Fatalf("before any mapping: %+v", r)
	}
	base := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	for _, m := range []struct {
		offset  time.Time
		quality longshorepb.ClockQuality
	}{
		{base.Add(time.Hour), longshorepb.ClockQuality_CLOCK_QUALITY_PLAUSIBLE},
		{base, longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED},
		{base.Add(time.Minute), longshorepb.ClockQuality_CLOCK_QUALITY_PLAUSIBLE}, // worse than what is known
		{time.Unix(0, 0), longshorepb.ClockQuality_CLOCK_QUALITY_UNSET},
	} {
		mustReceive(t, c, marshal(t, &longshorepb.Telemetry{
			Epoch: testEpoch[:], Clocks: []*longshorepb.Clock{{BootId: "boot-1", OffsetNs: m.offset.UnixNano(), Quality: m.quality}},
		}))
	}
	s.idle(t)
	r := s.records(t, Query{From: base.Add(2 * time.Second), To: base.Add(3 * time.Second)})
	if len(r) != 1 || string(r[0].Payload) != "b" || r[0].WallNs != base.Add(2*time.Second).UnixNano() || r[0].Quality != longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED {
		t.Errorf("in the second second: %+v", r)
	}
	if r := s.records(t, Query{To: base}); len(r) != 0 {
		t.Errorf("before the mapping's start: %+v", r)
	}
}

// G4: records leave by age and by bytes, the books stay: what was deleted is neither lost in the sums nor stored again when
// it comes again.
func TestG4RetentionKeepsTheBooks(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, Config{Dir: dir, MaxBytes: 100_000})
	c := s.hello("e")
	noise := make([]byte, 10_000)
	var sent [][]byte
	for n := range uint64(40) {
		_, _ = rand.Read(noise)
		sent = append(sent, message(t, makeFrame(t, "s", 1+n, string(noise))))
		mustReceive(t, c, sent[n])
		s.idle(t)
	}
	c.Close()
	s.stop()
	s = openStore(t, Config{Dir: dir, MaxBytes: 100_000})
	r := s.records(t, Query{})
	if len(r) == 0 || len(r) > 10 || r[len(r)-1].Seq != 40 || r[0].Seq != uint64(41-len(r)) {
		t.Fatalf("%d records are kept of 100 KB", len(r))
	}
	c = s.hello("e")
	mustReceive(t, c, sent[0])
	s.idle(t)
	if a := c.Ack(false); len(a.GetEpochs()) != 1 || a.GetEpochs()[0].GetStreams()[0].GetWatermark() != 41 {
		t.Errorf("acknowledgement %v", a)
	}
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 40, Delivered: 40, Resent: 1}) {
		t.Errorf("sum %+v", got)
	}
	c.Close()
	s.stop()
	s = openStore(t, Config{Dir: dir, MaxAge: time.Nanosecond})
	eventually(t, "old records are deleted", func() bool { return len(s.records(t, Query{})) == 0 })
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 40, Delivered: 40, Resent: 1}) {
		t.Errorf("sum %+v", got)
	}
}

// G4: deleted records must leave the disk, not only the listing: otherwise the hub's disk fills up however small the
// retention.
func TestG4RetentionGivesDiskBack(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, Config{Dir: dir, MaxBytes: 4 << 20})
	c := s.hello("e")
	noise := make([]byte, 15_000)
	const messages = 3500
	for n := range uint64(messages) {
		_, _ = rand.Read(noise)
		b := message(t, makeFrame(t, "s", 1+n, string(noise)))
		for err := c.Receive(b); err != nil; err = c.Receive(b) {
			s.idle(t)
		}
	}
	c.Close()
	s.idle(t)
	s.stop()
	var used int64
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Stat(path, &st)
		}
		used += st.Blocks * 512
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if used > 40<<20 {
		t.Errorf("%d MiB on disk of %d MiB received, with a retention of 4 MiB", used>>20, messages*len(noise)>>20)
	}
}

// G3: the hub must take nothing in while its disk is nearly full, rather than crash or acknowledge; the records come later.
func TestG3NothingIsAcknowledgedWithoutDisk(t *testing.T) {
	dir := t.TempDir()
	i, err := Open(Config{Dir: dir, MinFreeBytes: math.MaxInt64})
	if err != nil {
		t.Fatal(err)
	}
	c := i.Session("e", &longshorepb.Hello{}, func() {})
	mustReceive(t, c, message(t, makeFrame(t, "s", 1, "a")))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := i.Run(ctx); err == nil || !strings.Contains(err.Error(), "free space") {
		t.Errorf("Run: %v", err)
	}
	if a := c.Ack(true); a != nil {
		t.Errorf("acknowledged: %v", a)
	}
	s := openStore(t, Config{Dir: dir})
	mustReceive(t, s.hello("e"), message(t, makeFrame(t, "s", 1, "a")))
	s.idle(t)
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 1, Delivered: 1}) {
		t.Errorf("sum %+v", got)
	}
}

// Without it, nobody would see from outside that a hub takes no telemetry in: it goes on serving specs, and is ready.
func TestBlockedSaysWhatToDo(t *testing.T) {
	dir := t.TempDir()
	i, err := Open(Config{Dir: dir, MinFreeBytes: math.MaxInt64})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	mustReceive(t, i.Session("e", &longshorepb.Hello{}, func() {}), message(t, makeFrame(t, "s", 1, "a")))
	eventually(t, "the store is blocked", func() bool { return i.Blocked() != nil })
	if err := i.Blocked(); !strings.Contains(err.Error(), "free space or lower the retention") {
		t.Error(err)
	}
	cancel()
	<-done // with the same error, as the record is still there
	s := openStore(t, Config{Dir: dir})
	mustReceive(t, s.hello("e"), message(t, makeFrame(t, "s", 1, "a")))
	if s.idle(t); s.Blocked() != nil {
		t.Errorf("with room: %v", s.Blocked())
	}
}

// The hello tells what the edge has accepted, before the records come: what is still missing shows in the sums. Many
// streams need several acknowledgements, none above the limit of a message.
func TestHelloAndLargeAcknowledgements(t *testing.T) {
	s := openStore(t, Config{Dir: t.TempDir()})
	head := &longshorepb.OutboxHead{Epoch: testEpoch[:]}
	const streams = 600
	for n := range streams {
		head.Streams = append(head.Streams, &longshorepb.StreamHead{Stream: fmt.Sprintf("a-stream-with-a-rather-long-name-%03d", n), Low: 1, Next: 11})
	}
	woken := make(chan struct{}, 1)
	c := s.Session("e", &longshorepb.Hello{Outboxes: []*longshorepb.OutboxHead{head}}, func() {
		select {
		case woken <- struct{}{}:
		default:
		}
	})
	for n := range streams {
		mustReceive(t, c, message(t, makeFrame(t, head.GetStreams()[n].GetStream(), 1, "a", "b")))
	}
	s.idle(t)
	select {
	case <-woken:
	default:
		t.Error("the sender was not woken")
	}
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 10 * streams, Delivered: 2 * streams}) {
		t.Errorf("sum %+v", got)
	}
	messages, acked := 0, map[string]bool{}
	for a := c.Ack(true); a != nil; a = c.Ack(false) {
		if size := proto.Size(a); size > frame.MaxMessage {
			t.Errorf("acknowledgement of %d bytes", size)
		}
		messages++
		for _, e := range a.GetEpochs() {
			for _, st := range e.GetStreams() {
				acked[st.GetStream()] = st.GetWatermark() == 3 && bytes.Equal(e.GetEpoch(), testEpoch[:])
			}
		}
	}
	if messages < 2 || len(acked) != streams {
		t.Errorf("%d messages acknowledge %d streams", messages, len(acked))
	}
}

// No bytes from the network may crash the hub, or be booked without being well-formed.
func FuzzReceive(f *testing.F) {
	f.Add(message(f, makeFrame(f, "s", 1, "a", "b")))
	f.Add(marshal(f, &longshorepb.Telemetry{
		Epoch: testEpoch[:], Ledger: []*longshorepb.Loss{{Stream: "s", First: 1, Last: 2, Reason: "QuotaBytes"}},
		Low: []*longshorepb.StreamLow{{Stream: "s", Low: 3}}, Clocks: []*longshorepb.Clock{{BootId: "b", OffsetNs: 1}},
		Fragment: &longshorepb.Fragment{Stream: "s", First: 9, Total: 4, Data: []byte("ab")},
	}))
	s := openStore(f, Config{Dir: f.TempDir()})
	c := s.hello("e")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := c.Receive(b); err != nil {
			return
		}
		s.idle(t)
		if sum := s.sum(t, Query{}); sum.Accepted < sum.Delivered+sum.Ledgered || sum.Duplicates != 0 {
			t.Fatalf("sum %+v", sum)
		}
	})
}
