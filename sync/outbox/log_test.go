package outbox

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/inbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openLog(t testing.TB, dir string, cfg Config) *Log {
	t.Helper()
	l, err := Open(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func appendAll(t testing.TB, l *Log, recs ...Record) {
	t.Helper()
	verdicts, err := l.Append(context.Background(), recs)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range verdicts {
		if v != nil {
			t.Fatal(v)
		}
	}
}

func rec(stream, payload string) Record {
	return Record{Stream: stream, Topic: "t/" + stream, Payload: []byte(payload)}
}

// cloud is a sink in memory, kept the dumb way: every record by its identity, and the accounts.
type cloud struct {
	t       testing.TB
	decoder *frame.Decoder
	parts   map[string][]byte
	books   map[string]map[string]*inbox.Account // by epoch and stream
	records map[string]string
	order   []string // payloads as they came first
	losses  []*longshorepb.Loss
}

func newCloud(t testing.TB) *cloud {
	d, err := frame.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return &cloud{t: t, decoder: d, parts: map[string][]byte{}, books: map[string]map[string]*inbox.Account{}, records: map[string]string{}}
}

func (c *cloud) account(epoch []byte, stream string) *inbox.Account {
	streams := c.books[string(epoch)]
	if streams == nil {
		streams = map[string]*inbox.Account{}
		c.books[string(epoch)] = streams
	}
	if streams[stream] == nil {
		streams[stream] = new(inbox.Account)
	}
	return streams[stream]
}

// receive takes a message as the hub would.
func (c *cloud) receive(m *longshorepb.Telemetry) {
	c.t.Helper()
	if size := proto.Size(m); size > frame.MaxMessage {
		c.t.Fatalf("message of %d bytes", size)
	}
	for _, b := range m.GetFrames() {
		c.frame(m.GetEpoch(), b)
	}
	if p := m.GetFragment(); p != nil {
		key := fmt.Sprintf("%x %s %d", m.GetEpoch(), p.GetStream(), p.GetFirst())
		if p.GetOffset() == 0 {
			c.parts[key] = nil
		}
		if len(c.parts[key]) == int(p.GetOffset()) {
			c.parts[key] = append(c.parts[key], p.GetData()...)
		}
		if len(c.parts[key]) == int(p.GetTotal()) {
			c.frame(m.GetEpoch(), c.parts[key])
			delete(c.parts, key)
		}
	}
	for _, x := range m.GetLedger() {
		c.losses = append(c.losses, x)
		if _, err := c.account(m.GetEpoch(), x.GetStream()).Lose(x.GetFirst(), x.GetLast()); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *cloud) frame(epoch, b []byte) {
	c.t.Helper()
	f, err := c.decoder.Decode(b)
	if err != nil {
		c.t.Fatal(err)
	}
	fresh, err := c.account(epoch, f.Stream).Book(f.First, f.Last())
	if err != nil {
		c.t.Fatal(err)
	}
	err = f.Walk(func(seq uint64, r frame.Record) bool {
		key := fmt.Sprintf("%x %s %d", epoch, f.Stream, seq)
		for _, g := range fresh {
			if g.First <= seq && seq <= g.Last {
				c.records[key] = string(r.Payload)
				c.order = append(c.order, string(r.Payload))
			}
		}
		if have, ok := c.records[key]; ok && have != string(r.Payload) {
			c.t.Fatalf("record %s came as %q and as %q", key, have, r.Payload)
		}
		return true
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cloud) ack() *longshorepb.Ack {
	a := &longshorepb.Ack{}
	for epoch, streams := range c.books {
		e := &longshorepb.EpochAck{Epoch: []byte(epoch)}
		for name, account := range streams {
			e.Streams = append(e.Streams, account.Ack(name))
		}
		a.Epochs = append(a.Epochs, e)
	}
	return a
}

// sums over all accounts.
func (c *cloud) sums() (accepted, delivered, ledgered, duplicates uint64) {
	for _, streams := range c.books {
		for _, a := range streams {
			accepted += a.Accepted()
			delivered += a.Delivered()
			ledgered += a.Ledgered()
			duplicates += a.Duplicates()
		}
	}
	return
}

// drain sends everything a reader has.
func drain(t testing.TB, r *Reader, c *cloud) (messages int) {
	t.Helper()
	for {
		m, err := r.Next(frame.MaxMessage)
		if err != nil {
			t.Fatal(err)
		}
		if m == nil {
			return messages
		}
		messages++
		c.receive(m)
	}
}

// G3: what was accepted before a restart is sent after it, in order, once; acknowledged, it costs no disk any more.
func TestG3AppendRestartReplay(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir, Config{})
	var want []string
	for i := range 200 {
		p := fmt.Sprintf("reading %d", i)
		want = append(want, p)
		appendAll(t, l, rec("vibration", p))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openLog(t, dir, Config{})
	live, backlog := l.NewReaders()
	appendAll(t, l, rec("vibration", "live"))
	c := newCloud(t)
	if n := drain(t, live, c); n != 1 || len(c.order) != 1 || c.order[0] != "live" {
		t.Fatalf("live lane sent %d messages: %q", n, c.order)
	}
	c.order = nil
	drain(t, backlog, c)
	if strings.Join(c.order, ",") != strings.Join(want, ",") {
		t.Fatalf("replayed %d records, or in another order", len(c.order))
	}
	if err := l.Ack(c.ack()); err != nil {
		t.Fatal(err)
	}
	stats, disk := l.Stats()
	if len(stats) != 1 || stats[0].Accepted != 201 || stats[0].Acked != 201 || stats[0].Held != 0 || disk > blockSize {
		t.Errorf("stats %+v, %d bytes on disk", stats, disk)
	}
	if heads := l.Heads(); len(heads) != 1 || heads[0].GetStreams()[0].GetNext() != 2 {
		t.Errorf("heads %v", heads)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openLog(t, dir, Config{})
	if stats, disk := l.Stats(); len(stats) != 1 || stats[0].Accepted != 201 || stats[0].Acked != 201 || disk != 0 {
		t.Errorf("after a restart: %+v, %d bytes on disk", stats, disk)
	}
}

// Records too large for a message, and streams with odd names, must arrive like others.
func TestLargeRecordsGoInFragments(t *testing.T) {
	l := openLog(t, t.TempDir(), Config{})
	big := randomText(frame.MaxPayload)
	live, _ := l.NewReaders()
	appendAll(t, l, rec("a/b.c %", "small"), Record{Stream: "a/b.c %", Payload: big}, rec("a/b.c %", "after"))
	c := newCloud(t)
	for m, err := live.Next(1000); m != nil || err != nil; m, err = live.Next(1000) {
		if err != nil || proto.Size(m) > 1000 {
			t.Fatal(err, proto.Size(m))
		}
		c.receive(m)
	}
	if len(c.order) != 3 || c.order[1] != string(big) || c.order[2] != "after" {
		t.Fatalf("%d records arrived", len(c.order))
	}
	verdicts, err := l.Append(context.Background(), []Record{{Stream: "s", Payload: append(big, 0)}, rec("s", "ok"), rec("", "x")})
	if err != nil || verdicts[0] == nil || verdicts[1] != nil || verdicts[2] == nil {
		t.Errorf("verdicts %v, %v", verdicts, err)
	}
}

// G4: a stream must stay inside its quota whatever is appended; G3: what was dropped for it stands in the ledger until
// the cloud has confirmed that, over restarts.
func TestG4QuotaDropsOldestAndLedgers(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Quotas: map[string]Quota{"small": {MaxBytes: 64 << 10}}}
	l := openLog(t, dir, cfg)
	payload := strings.Repeat("x", 900)
	n := 0
	for range 5 {
		for range 50 {
			appendAll(t, l, Record{Stream: "small", Payload: fmt.Appendf(nil, "%d %d %s", n, time.Now().UnixNano(), randomText(900))}, rec("other", payload))
			n++
			for _, s := range first(l.Stats()) {
				if s.Stream == "small" && s.HeldBytes > 64<<10 {
					t.Fatalf("%d bytes on disk", s.HeldBytes)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = openLog(t, dir, cfg)
	}
	if size := diskUsage(t, dir, "small"); size > 64<<10 {
		t.Errorf("%d bytes of files", size)
	}
	c := newCloud(t)
	_, backlog := l.NewReaders()
	drain(t, backlog, c)
	accepted, delivered, ledgered, duplicates := c.sums()
	if accepted != uint64(2*n) || delivered+ledgered != accepted || ledgered == 0 || duplicates != 0 {
		t.Errorf("accepted %d of %d, delivered %d, ledgered %d, duplicates %d", accepted, 2*n, delivered, ledgered, duplicates)
	}
	if m, err := backlog.Next(1 << 14); m != nil || err != nil {
		t.Errorf("the ledger is sent twice: %v %v", m, err)
	}
	_, backlog = l.NewReaders()
	drain(t, backlog, c)
	if err := l.Ack(c.ack()); err != nil {
		t.Fatal(err)
	}
	_, backlog = l.NewReaders()
	if n := drain(t, backlog, c); n != 0 {
		t.Errorf("%d messages after everything is acknowledged", n)
	}
	if a2, d2, l2, dup := c.sums(); a2 != accepted || d2 != delivered || l2 != ledgered || dup != 0 {
		t.Errorf("sums changed by sending again: %d %d %d %d", a2, d2, l2, dup)
	}
}

func first[A, B any](a A, _ B) A { return a }

// randomText returns n bytes that do not compress.
func randomText(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

func diskUsage(t testing.TB, dir, stream string) (n int64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "epochs", "*", stream+".*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

// A producer must hear that its record was not taken, and be served again once there is room.
func TestRefuseWhenFull(t *testing.T) {
	l := openLog(t, t.TempDir(), Config{Default: Quota{MaxBytes: 64 << 10, Policy: Refuse}})
	refused := false
	for range 200 {
		verdicts, err := l.Append(context.Background(), []Record{{Stream: "s", Payload: randomText(1000)}})
		if err != nil {
			t.Fatal(err)
		}
		if refused = verdicts[0] != nil; refused {
			if !errors.Is(verdicts[0], ErrFull) {
				t.Fatal(verdicts[0])
			}
			break
		}
	}
	if !refused {
		t.Fatal("200 KB went into 64 KiB")
	}
	c := newCloud(t)
	_, backlog := l.NewReaders()
	drain(t, backlog, c)
	if err := l.Ack(c.ack()); err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, rec("s", "again"))
	s, _ := l.Stats()
	if s[0].Refused != 1 || s[0].Dropped != 0 || s[0].Accepted != s[0].Acked+1 {
		t.Errorf("stats %+v", s[0])
	}
}

// G3, G4: a device that believes accepted what can never be stored would make the books of the cloud wrong; and one that sends
// such records for ever would fill the disk with what is said about them.
func TestTooLargeIsLedgered(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{MaxRecord: 1000, Quotas: map[string]Quota{"small": {MaxBytes: 64 << 10}}}
	l := openLog(t, dir, cfg)
	for name, r := range map[string]Record{
		"payload": rec("s", string(make([]byte, 1001))), "topic": {Stream: "s", Topic: string(make([]byte, frame.MaxTopic+1))},
	} {
		if verdicts, err := l.Append(t.Context(), []Record{r}); err != nil || !errors.Is(verdicts[0], ErrTooLarge) {
			t.Errorf("%s: %v %v", name, verdicts, err)
		}
	}
	appendAll(t, l, rec("s", "one"))
	if err := l.LoseTooLarge("s", 3); err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, rec("s", "two"))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openLog(t, dir, cfg)
	c := newCloud(t)
	_, backlog := l.NewReaders()
	drain(t, backlog, c)
	if len(c.losses) != 1 || c.losses[0].GetReason() != "TooLarge" || c.losses[0].GetFirst() != 2 || c.losses[0].GetLast() != 4 {
		t.Errorf("ledgered %v", c.losses)
	}
	if a, d, lost, _ := c.sums(); a != 5 || d != 2 || lost != 3 {
		t.Errorf("accepted %d, delivered %d, ledgered %d", a, d, lost)
	}
	var err error
	n := 0
	for ; err == nil && n < 2*maxLargeLosses; n++ {
		if err = l.LoseTooLarge("s", 1); err == nil {
			appendAll(t, l, rec("s", "between"))
		}
	}
	if err == nil || n < maxLargeLosses {
		t.Errorf("%d entries, %v", n, err)
	}
	appendAll(t, l, rec("s", "goes on"))
}

// A hub whose disk was rolled back, or a foreign one, must not make the edge forget records.
func TestImplausibleAcksAreRefused(t *testing.T) {
	l := openLog(t, t.TempDir(), Config{})
	appendAll(t, l, rec("s", "1"), rec("s", "2"))
	id := l.Heads()[0].GetEpoch()
	for name, s := range map[string]*longshorepb.StreamAck{
		"watermark":      {Stream: "s", Watermark: 4},
		"range beyond":   {Stream: "s", Watermark: 1, Above: []*longshorepb.Range{{First: 2, Last: 3}}},
		"range reversed": {Stream: "s", Watermark: 1, Above: []*longshorepb.Range{{First: 2, Last: 1}}},
		"unknown stream": {Stream: "t", Watermark: 2},
	} {
		ok := &longshorepb.StreamAck{Stream: "s", Watermark: 2}
		err := l.Ack(&longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: id, Streams: []*longshorepb.StreamAck{ok, s}}}})
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	foreign := &longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: bytes.Repeat([]byte{1}, 16), Streams: []*longshorepb.StreamAck{{Stream: "s", Watermark: 9}}}}}
	if err := l.Ack(foreign); err != nil {
		t.Errorf("an epoch that is gone: %v", err)
	}
	if s, _ := l.Stats(); s[0].Held != 2 {
		t.Errorf("stats %+v", s[0])
	}
}

// Two agents on one directory would write over each other.
func TestDirectoryInUse(t *testing.T) {
	dir := t.TempDir()
	openLog(t, dir, Config{})
	if _, err := Open(dir, Config{}); err == nil || !strings.Contains(err.Error(), "in use by another agent") {
		t.Errorf("second Open: %v", err)
	}
}

// Many producers at once: each record is accepted once, in each producer's order, and a caller that gives up in the
// queue was not accepted.
func TestConcurrentAppends(t *testing.T) {
	l := openLog(t, t.TempDir(), Config{SegmentBytes: 64 << 10})
	live, _ := l.NewReaders()
	const producers, each = 16, 60
	accepted := make([]map[string]bool, producers)
	var wg sync.WaitGroup
	for p := range producers {
		accepted[p] = map[string]bool{}
		wg.Go(func() {
			for i := range each {
				ctx, cancel := context.WithCancel(context.Background())
				if i%7 == 3 {
					cancel()
				}
				name := fmt.Sprintf("%02d-%03d", p, i)
				stream := fmt.Sprintf("s%d", p%3)
				verdicts, err := l.Append(ctx, []Record{rec(stream, name)})
				cancel()
				if err == nil && verdicts[0] == nil {
					accepted[p][name] = true
				} else if !errors.Is(verdicts[0], context.Canceled) {
					t.Errorf("append: %v %v", verdicts, err)
				}
			}
		})
	}
	wg.Wait()
	c := newCloud(t)
	drain(t, live, c)
	last := map[string]string{}
	total := 0
	for _, a := range accepted {
		total += len(a)
	}
	for _, name := range c.order {
		var p int
		if _, err := fmt.Sscanf(name, "%d-", &p); err != nil {
			t.Fatal(err)
		}
		if !accepted[p][name] {
			t.Errorf("%s was not accepted", name)
		}
		if name <= last[name[:2]] {
			t.Errorf("%s came after %s", name, last[name[:2]])
		}
		last[name[:2]] = name
	}
	if len(c.order) != total {
		t.Errorf("%d of %d records", len(c.order), total)
	}
}
