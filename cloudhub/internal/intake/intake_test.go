package intake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	"github.com/longshore-edge/longshore/sync/outbox"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// store is an Intake that runs until stop.
type store struct {
	*Intake
	stop func()
}

func openStore(t testing.TB, cfg Config) *store {
	t.Helper()
	i, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- i.Run(ctx) }()
	s := &store{Intake: i}
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(s.stop)
	return s
}

// idle waits until everything received is committed.
func (s *store) idle(t testing.TB) {
	t.Helper()
	eventually(t, "telemetry received is committed", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		var parts int64
		for _, e := range s.edges {
			for session := range e.sessions {
				for _, p := range session.parts {
					parts += int64(len(p.data))
				}
			}
		}
		return s.pending == parts
	})
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

func openOutbox(t testing.TB, dir string, cfg outbox.Config) *outbox.Log {
	t.Helper()
	l, err := outbox.Open(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func appendAll(t testing.TB, l *outbox.Log, recs ...outbox.Record) {
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

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// link is one connection of an edge: a session, and readers of the edge's outbox.
type link struct {
	t       testing.TB
	store   *store
	log     *outbox.Log
	session *Session
	lanes   []*outbox.Reader
}

func connect(t testing.TB, s *store, edge string, l *outbox.Log) *link {
	live, backlog := l.NewReaders()
	return &link{t, s, l, s.Session(edge, &longshorepb.Hello{Outboxes: l.Heads()}, func() {}), []*outbox.Reader{live, backlog}}
}

// next returns the next message of a lane, nil if there is none.
func (c *link) next(lane int) []byte {
	c.t.Helper()
	m, err := c.lanes[lane].Next(frame.MaxMessage)
	if err != nil {
		c.t.Fatal(err)
	}
	if m == nil {
		return nil
	}
	return marshal(c.t, m)
}

// drain sends everything in both lanes and waits for the commit.
func (c *link) drain() {
	c.t.Helper()
	for lane := range c.lanes {
		for b := c.next(lane); b != nil; b = c.next(lane) {
			c.send(b)
		}
	}
	c.store.idle(c.t)
}

func (c *link) send(b []byte) {
	c.t.Helper()
	for err := c.session.Receive(b); err != nil; err = c.session.Receive(b) {
		if !errors.Is(err, ErrBusy) {
			c.t.Fatal(err)
		}
		c.store.idle(c.t)
	}
}

// acks passes acknowledgements to the outbox.
func (c *link) acks(full bool) (n int) {
	c.t.Helper()
	for a := c.session.Ack(full); a != nil; a = c.session.Ack(false) {
		if size := proto.Size(a); size > frame.MaxMessage {
			c.t.Fatalf("acknowledgement of %d bytes", size)
		}
		if err := c.log.Ack(a); err != nil {
			c.t.Fatal(err)
		}
		n++
	}
	return n
}

func (s *store) records(t testing.TB, q Query) (out []inbox.Record) {
	t.Helper()
	err := s.Records(context.Background(), q, func(r inbox.Record) error {
		r.Payload = append([]byte(nil), r.Payload...)
		out = append(out, r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// sum adds up the accounts that q selects.
func (s *store) sum(t testing.TB, q Query) (total Sum) {
	t.Helper()
	sums, _, err := s.Ledger(context.Background(), q)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range sums {
		total.Accepted += n.Accepted
		total.Delivered += n.Delivered
		total.Ledgered += n.Ledgered
		total.Duplicates += n.Duplicates
		total.Resent += n.Resent
		total.Conflicts += n.Conflicts
	}
	return total
}

// G3: every record accepted at the edge is in the sink once, in order, also after a restart of either side, and the edge
// gives its disk back.
func TestG3RecordsReachTheSinkOnce(t *testing.T) {
	dir, edgeDir := t.TempDir(), t.TempDir()
	s := openStore(t, Config{Dir: dir})
	l := openOutbox(t, edgeDir, outbox.Config{})
	var want []string
	for i := range 300 {
		p := fmt.Sprintf("reading %d", i)
		want = append(want, p)
		appendAll(t, l, outbox.Record{Stream: "vibration", Topic: "plant/1", Payload: []byte(p)})
	}
	c := connect(t, s, "press-7", l)
	if b := c.session.Ack(true); b != nil {
		t.Errorf("acknowledged before anything was sent: %v", b)
	}
	c.drain()
	if l.Close(); s.sum(t, Query{}) != (Sum{Accepted: 300, Delivered: 300}) {
		t.Fatalf("sum %+v", s.sum(t, Query{}))
	}
	c.session.Close()
	s.stop()

	// The acknowledgements were lost; both sides start again.
	s = openStore(t, Config{Dir: dir})
	l = openOutbox(t, edgeDir, outbox.Config{})
	appendAll(t, l, outbox.Record{Stream: "vibration", Payload: []byte("new")})
	c = connect(t, s, "press-7", l)
	c.drain()
	if got := s.sum(t, Query{}); got != (Sum{Accepted: 301, Delivered: 301, Resent: 300}) {
		t.Errorf("sum %+v", got)
	}
	c.acks(false)
	if stats, _ := l.Stats(); stats[0].Held != 0 {
		t.Errorf("the edge still holds %d records", stats[0].Held)
	}
	got := s.records(t, Query{Edge: "press-7", Stream: "vibration"})
	for i, r := range got {
		if i < 300 && (string(r.Payload) != want[i] || r.Topic != "plant/1" || !r.Historical) {
			t.Fatalf("record %d is %+v", i, r)
		}
	}
	if len(got) != 301 || string(got[300].Payload) != "new" {
		t.Fatalf("%d records", len(got))
	}
	if n := c.acks(false); n != 0 {
		t.Errorf("%d acknowledgements of nothing new", n)
	}
	if n := c.acks(true); n != 1 {
		t.Errorf("%d acknowledgements where all were asked for", n)
	}
}

func discard() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// A user whose hub does not start must read why, and what to do.
func TestOpenErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	openStore(t, Config{Dir: dir, Logger: discard()})
	if _, err := Open(Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "in use by another cloud hub") {
		t.Errorf("store in use: %v", err)
	}
	file := dir + "/KEYREGISTRY"
	if _, err := Open(Config{Dir: file}); err == nil || !strings.Contains(err.Error(), "choose a data folder") {
		t.Errorf("a file in place of the folder: %v", err)
	}
	damaged := t.TempDir()
	if err := os.WriteFile(damaged+"/MANIFEST", []byte("not a manifest"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Dir: damaged}); err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Errorf("damaged store: %v", err)
	}
	if _, err := Open(Config{Dir: t.TempDir(), MaxBytes: -1}); err == nil {
		t.Error("negative retention accepted")
	}
}

// G3 and G6: a power cut or a kill may leave a log of Badger without a byte. The hub must start with it.
func TestUnfinishedFiles(t *testing.T) {
	dir := t.TempDir()
	openStore(t, Config{Dir: dir}).stop()
	for _, name := range []string{"00077.mem", "000077.vlog", "000077.sst"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	openStore(t, Config{Dir: dir}).stop()
}
