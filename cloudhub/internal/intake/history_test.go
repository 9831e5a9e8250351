package intake

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/longshore-edge/longshore/sync/inbox"
	"github.com/longshore-edge/longshore/sync/outbox"
)

// history is a random life of some edges and a hub that crash and lose their connections.
type history struct {
	t     *testing.T
	rng   *rand.Rand
	hub   *store
	dir   string
	edges []*boxed
}

// boxed is an edge of a history.
type boxed struct {
	name string
	dir  string
	log  *outbox.Log
	link *link
	// promised are the payloads accepted, by identity.
	promised map[inbox.ID]string
	count    int
}

var historyQuotas = map[string]outbox.Quota{"small": {MaxBytes: 64 << 10}}

func (h *history) outbox(dir string) *outbox.Log {
	h.t.Helper()
	return openOutbox(h.t, dir, outbox.Config{Quotas: historyQuotas, SegmentBytes: 16 << 10})
}

// copyDir copies what a crash of the process leaves of a directory.
func (h *history) copyDir(from string) (to string) {
	h.t.Helper()
	to = filepath.Join(h.t.TempDir(), "state")
	if out, err := exec.Command("cp", "-r", "--sparse=always", from, to).CombinedOutput(); err != nil {
		h.t.Fatalf("cp: %v: %s", err, out)
	}
	return to
}

func (h *history) append(b *boxed) {
	h.t.Helper()
	stream := []string{"small", "large"}[h.rng.IntN(2)]
	var recs []outbox.Record
	for range 1 + h.rng.IntN(20) {
		b.count++
		noise := make([]byte, h.rng.IntN(2000))
		for i := range noise {
			noise[i] = byte(h.rng.Uint32())
		}
		if h.rng.IntN(40) == 0 { // needs fragments
			noise = append(noise, make([]byte, 20_000)...)
			for i := range noise {
				noise[i] = byte(h.rng.Uint32())
			}
		}
		recs = append(recs, outbox.Record{Stream: stream, Topic: "t", Payload: fmt.Appendf(nil, "%s %d %s", b.name, b.count, noise)})
	}
	heads := b.log.Heads()
	head := heads[len(heads)-1]
	id := inbox.ID{Edge: b.name, Epoch: [16]byte(head.GetEpoch()), Stream: stream, Seq: 1}
	for _, s := range head.GetStreams() {
		if s.GetStream() == stream {
			id.Seq = s.GetNext()
		}
	}
	appendAll(h.t, b.log, recs...)
	for _, r := range recs {
		b.promised[id] = string(r.Payload)
		id.Seq++
	}
}

// crash ends an edge's agent in the middle of an append of which nothing was promised.
func (h *history) crash(b *boxed) {
	h.t.Helper()
	ended := make(chan struct{})
	started := make(chan struct{})
	old := b.log
	go func() {
		defer close(ended)
		close(started)
		for i := range 5 {
			// Whatever becomes of it, nobody was told.
			_, _ = old.Append(context.Background(), []outbox.Record{{Stream: "large", Payload: fmt.Appendf(nil, "unpromised %d %d", b.count, i)}})
		}
	}()
	<-started
	b.dir = h.copyDir(b.dir)
	<-ended
	if err := old.Close(); err != nil {
		h.t.Fatal(err)
	}
	b.log = h.outbox(b.dir)
	h.cut(b)
}

// cut ends an edge's connection; what the hub has taken in stays.
func (h *history) cut(b *boxed) {
	b.link.session.Close()
	b.link = connect(h.t, h.hub, b.name, b.log)
}

// pass sends some messages of an edge: each arrives once, twice, or (with all that follow) not at all.
func (h *history) pass(b *boxed) {
	h.t.Helper()
	for range h.rng.IntN(20) {
		m := b.link.next(h.rng.IntN(2))
		if m == nil {
			continue
		}
		switch h.rng.IntN(12) {
		case 0:
			h.cut(b)
			return
		case 1:
			b.link.send(m)
		}
		if err := b.link.session.Receive(m); err != nil && h.rng.IntN(12) > 0 { // a fragment came twice
			h.cut(b)
			return
		}
	}
}

// crashHub starts the hub anew on its store; whatever was received and not committed is lost with its memory.
func (h *history) crashHub() {
	h.t.Helper()
	for _, b := range h.edges {
		b.link.session.Close()
	}
	h.hub.mu.Lock()
	h.hub.busy = nil
	h.hub.mu.Unlock()
	h.hub.stop()
	h.hub = openStore(h.t, Config{Dir: h.dir})
	for _, b := range h.edges {
		b.link = connect(h.t, h.hub, b.name, b.log)
	}
}

func (h *history) step() {
	h.t.Helper()
	b := h.edges[h.rng.IntN(len(h.edges))]
	switch n := h.rng.IntN(100); {
	case n < 45:
		h.append(b)
	case n < 75:
		h.pass(b)
	case n < 85:
		h.hub.idle(h.t)
		b.link.acks(h.rng.IntN(2) == 0)
	case n < 92:
		h.cut(b)
	case n < 98:
		h.crash(b)
	default:
		h.crashHub()
	}
}

// settle gives every edge a good connection and checks the books against what was promised.
func (h *history) settle() {
	h.t.Helper()
	for _, b := range h.edges {
		h.cut(b)
		b.link.drain()
		b.link.acks(false)
		stats, _ := b.log.Stats()
		for _, s := range stats {
			if s.Held != 0 {
				h.t.Errorf("edge %s still holds %+v", b.name, s)
			}
		}
		h.check(b)
	}
}

func (h *history) check(b *boxed) {
	h.t.Helper()
	sum := h.hub.sum(h.t, Query{Edge: b.name})
	if sum.Accepted != sum.Delivered+sum.Ledgered || sum.Duplicates != 0 || sum.Conflicts != 0 {
		h.t.Errorf("edge %s: %+v", b.name, sum)
	}
	seen := map[inbox.ID]bool{}
	for _, r := range h.hub.records(h.t, Query{Edge: b.name}) {
		if seen[r.ID] {
			h.t.Errorf("record %+v is stored twice", r.ID)
		}
		seen[r.ID] = true
		if want, ok := b.promised[r.ID]; ok && want != string(r.Payload) {
			h.t.Errorf("record %+v has another content", r.ID)
		}
	}
	if uint64(len(seen)) != sum.Delivered {
		h.t.Errorf("edge %s: %d records stored, %d booked", b.name, len(seen), sum.Delivered)
	}
	_, entries, err := h.hub.Ledger(context.Background(), Query{Edge: b.name})
	if err != nil {
		h.t.Fatal(err)
	}
	var ledgered uint64
	for _, e := range entries {
		for seq := e.First; seq <= e.Last; seq++ {
			id := inbox.ID{Edge: e.Edge, Epoch: e.Epoch, Stream: e.Stream, Seq: seq}
			if seen[id] {
				h.t.Errorf("record %+v is delivered and ledgered", id)
			}
			if b.promised[id] != "" && (e.Reason != "QuotaBytes" || e.Stream != "small") {
				h.t.Errorf("record %+v is lost: %s", id, e.Reason)
			}
			seen[id] = true
			ledgered++
		}
	}
	if ledgered != sum.Ledgered {
		h.t.Errorf("edge %s: %d records in the ledger, %d booked", b.name, ledgered, sum.Ledgered)
	}
	for id := range b.promised {
		if !seen[id] {
			h.t.Errorf("promised record %+v is neither delivered nor ledgered", id)
		}
	}
}

// G3: outbox, books and store together, through random connection cuts, duplicates, lost acknowledgements, quota drops and
// crashes of edges and hub: accepted = delivered + ledgered, nothing twice, nothing lost in silence.
func TestG3RandomHistories(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			h := &history{t: t, rng: rand.New(rand.NewPCG(seed, 3)), dir: t.TempDir()}
			h.hub = openStore(t, Config{Dir: h.dir})
			for _, name := range []string{"edge-a", "edge-a.b"} {
				b := &boxed{name: name, dir: filepath.Join(t.TempDir(), "state"), promised: map[inbox.ID]string{}}
				if err := os.Mkdir(b.dir, 0o700); err != nil {
					t.Fatal(err)
				}
				b.log = h.outbox(b.dir)
				b.link = connect(t, h.hub, name, b.log)
				h.edges = append(h.edges, b)
			}
			for range 120 {
				h.step()
			}
			h.settle()
			total := h.hub.sum(t, Query{})
			t.Logf("%+v", total)
			if total.Delivered == 0 {
				t.Error("the history is void")
			}
		})
	}
}
