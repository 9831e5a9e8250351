package uplink

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// G1: without this, an edge would not get what Kubernetes says for it, or the hub not learn that it has.
func TestListIsFetchedCommittedAndReported(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	first := h.hold("1", "1", strings.Repeat("long", 30_000))
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the first list is applied", h.inSync)
	got, objects, err := e.store.Current()
	if err != nil || got == nil || got.Digest != first.Digest || len(objects) != 3 {
		t.Fatalf("committed %v with %d objects, error %v", got, len(objects), err)
	}
	<-e.committed
	second := h.hold("2", "1")
	eventually(t, "the second list is applied", h.inSync)
	eventually(t, "the status says so", func() bool {
		s := e.Status()
		return s.Replica.Committed == second.Digest && s.Replica.Synced && s.Link.Connected && s.BytesIn > 0 && s.BytesOut > 0
	})
}

// G1, G2: without this, an edge whose link is cut again and again, or whose hub or agent restarts, would stay behind, or
// fetch anew what it has.
func TestCutLinkAndRestartsConverge(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.hold("1")
	dir := t.TempDir()
	e := newEdge(t, h, dir)
	eventually(t, "the first list is applied", h.inSync)

	h.stop()
	eventually(t, "the edge sees the cut", func() bool { s := e.Status(); return !s.Link.Connected && s.Link.Err != nil })
	h.hold("2")
	h.start()
	eventually(t, "the list that changed meanwhile is applied", h.inSync)

	e.stop()
	third := h.hold("3")
	e = newEdge(t, h, dir)
	eventually(t, "the restarted agent applies the newest list", func() bool { return h.inSync() && e.Status().Replica.Committed == third.Digest })
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := 1; i < len(h.hellos); i++ {
		a, b := h.hellos[i-1], h.hellos[i]
		if b.GetSession() <= a.GetSession() || string(a.GetNonce()) == string(b.GetNonce()) {
			t.Errorf("session %d follows %d, nonces %x and %x", b.GetSession(), a.GetSession(), a.GetNonce(), b.GetNonce())
		}
	}
	if len(h.hellos) < 3 || len(h.hellos[len(h.hellos)-1].GetHeld()) == 0 {
		t.Error("the restarted agent does not say what it holds")
	}
}

// G3: without this, readings taken while the link was down would be lost or counted twice.
func TestTelemetryOfAnOfflineTimeArrivesOnce(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	dir := t.TempDir()
	h.stop()
	e := newEdge(t, h, dir)
	var want []string
	for i := range 500 {
		want = append(want, fmt.Sprintf("offline %d %s", i, strings.Repeat("x", 200)))
	}
	for part := range slices.Chunk(want, 25) {
		e.append("vibration", part...)
	}
	e.stop() // the agent restarts while it is offline: a new epoch
	e = newEdge(t, h, dir)
	h.start()
	eventually(t, "the link is up", func() bool { return e.Status().Link.Connected })
	for i := range 50 {
		want = append(want, fmt.Sprintf("online %d", i))
		e.append("vibration", want[len(want)-1])
	}
	eventually(t, "everything is acknowledged", func() bool {
		streams, _ := e.outbox.Stats()
		return len(streams) == 1 && streams[0].Held == 0 && streams[0].Acked == uint64(len(want))
	})
	got := look(h, func() []string { return slices.Sorted(slices.Values(h.records["vibration"])) })
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d records arrived of %d", len(got), len(want))
	}
	eventually(t, "nothing counts as on its way", func() bool { return e.Status().Outstanding == 0 })
}

// G3, G5: without this, a hub that cannot prove itself, such as one with another signing key or a thief of the address, could
// have the edge drop readings for good by acknowledging them.
func TestTelemetryWaitsForAHubThatProvesItself(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	trusted := h.key
	_, foreign, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	e := newEdge(t, h, t.TempDir(), func(*Config) { h.mu.Lock(); h.key = foreign; h.mu.Unlock() })
	want := []string{"one", "two", "three"}
	e.append("vibration", want...)
	eventually(t, "the foreign head is refused", func() bool { return e.Status().Rejected > 0 })
	forged := &longshorepb.Ack{}
	for _, o := range e.outbox.Heads() {
		forged.Epochs = append(forged.Epochs, &longshorepb.EpochAck{
			Epoch: o.GetEpoch(), Streams: []*longshorepb.StreamAck{{Stream: "vibration", Watermark: 100}},
		})
	}
	payload, err := proto.Marshal(forged)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the acknowledgement is refused", func() bool {
		c := look(h, func() *hubConn { return h.conn })
		if err := c.Send(topic.Topic{Kind: topic.Ack, Edge: edgeName}.String(), payload, false); err != nil {
			t.Fatal(err)
		}
		if streams, _ := e.outbox.Stats(); streams[0].Held != uint64(len(want)) {
			t.Fatalf("%d records held after a forged acknowledgement, want %d", streams[0].Held, len(want))
		}
		return errors.Is(e.Status().RejectedErr, errUnproved)
	})
	if kinds := look(h, func() []topic.Kind { return slices.Clone(h.order) }); slices.Contains(kinds, topic.Telemetry) {
		t.Error("telemetry went to a hub that did not prove itself")
	}

	h.stop()
	h.mu.Lock()
	h.key = trusted
	h.mu.Unlock()
	h.start()
	eventually(t, "the true hub gets everything", func() bool {
		streams, _ := e.outbox.Stats()
		return streams[0].Held == 0 && slices.Equal(look(h, func() []string { return slices.Clone(h.records["vibration"]) }), want)
	})
}

// G3, G5: without this, whoever sits on an unencrypted link could acknowledge readings in the hub's name.
func TestForgedAcknowledgementIsRefused(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.withhold = true
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the link is up", h.inSync)
	e.append("s", "one")
	eventually(t, "the hub has the record", func() bool { return look(h, func() bool { return len(h.records["s"]) == 1 }) })
	forged, err := proto.Marshal(&longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{
		Epoch: e.outbox.Heads()[0].GetEpoch(), Streams: []*longshorepb.StreamAck{{Stream: "s", Watermark: 100}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	c := look(h, func() *hubConn { return h.conn })
	if err := c.Send(topic.Topic{Kind: topic.Ack, Edge: edgeName}.String(), forged, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the acknowledgement is refused", func() bool { return e.Status().Rejected > 0 })
	if streams, _ := e.outbox.Stats(); streams[0].Held != 1 {
		t.Errorf("%d records held, want 1", streams[0].Held)
	}
	h.mu.Lock()
	h.withhold = false
	signal(h.conn.wake)
	h.mu.Unlock()
	eventually(t, "the true one counts", func() bool { streams, _ := e.outbox.Stats(); return streams[0].Held == 0 })
}

// G4: without this, a hub that does not acknowledge would be sent an edge's whole backlog, and specs would wait behind it.
func TestWindowBoundsWhatIsNotAcknowledged(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.withhold = true
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the link is up", h.inSync)
	for range 40 {
		e.append("s", randomText(t, 8<<10))
	}
	eventually(t, "the window is full", func() bool { s := e.Status(); return s.Outstanding > s.Window-(8<<10) })
	h.hold("1") // specs still get through
	eventually(t, "the list is applied", h.inSync)
	if s := e.Status(); s.Outstanding > windowMin {
		t.Errorf("%d bytes on their way, more than %d", s.Outstanding, windowMin)
	}
	h.mu.Lock()
	h.withhold = false
	h.mu.Unlock()
	signal(h.conn.wake)
	eventually(t, "the rest arrives", func() bool { return look(h, func() int { return len(h.records["s"]) }) == 40 })
}

// G3: without this, a batch that a busy hub dropped would stay on the edge until the link breaks.
func TestDroppedBatchIsSentAgain(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.deaf = 2
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the link is up", h.inSync)
	e.append("s", "lost at first")
	eventually(t, "it was sent", func() bool { return e.Status().Outstanding > 0 })
	e.Uplink.mu.Lock()
	e.flow.patience = 10 * time.Millisecond // instead of waiting for half a minute
	e.Uplink.mu.Unlock()
	eventually(t, "it arrives", func() bool {
		signal(e.changed)
		return look(h, func() int { return len(h.records["s"]) }) == 1
	})
}

// Without this, an edge would tell only half of its pods and models, or tell everything again with each change.
func TestReportsAreFullOnceThenChanges(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.hold("1")
	e := newEdge(t, h, t.TempDir())
	e.report(func(a *Account) {
		for i := range 100 {
			status, err := (&corev1.PodStatus{Phase: corev1.PodPending, Message: strings.Repeat("m", 500)}).Marshal()
			if err != nil {
				t.Error(err)
			}
			a.Pods = append(a.Pods, &longshorepb.PodReport{Namespace: "n", Name: fmt.Sprint(i), Uid: fmt.Sprint(i), Status: status})
		}
		a.Models = []*longshorepb.ModelReport{{Namespace: "n", Name: "m", Message: strings.Repeat("é", 40_000)}}
	})
	pods := func() map[string]bool {
		seen := map[string]bool{}
		for _, r := range h.reports {
			for _, p := range r.GetPods() {
				seen[p.GetUid()] = true
			}
			for _, uid := range r.GetGonePods() {
				delete(seen, uid)
			}
		}
		return seen
	}
	eventually(t, "all pods are reported", func() bool { return look(h, func() int { return len(pods()) }) == 100 })
	e.report(func(a *Account) { a.Pods = a.Pods[:99] })
	eventually(t, "the pod that went is reported", func() bool { return look(h, func() int { return len(pods()) }) == 99 })
	h.mu.Lock()
	defer h.mu.Unlock()
	reports, complete := 0, 0
	var last uint64
	for i, r := range h.reports {
		if r.GetSequence() != last+1 || r.GetSession() != h.hellos[0].GetSession() {
			t.Errorf("report %d has session %d and sequence %d after %d", i, r.GetSession(), r.GetSequence(), last)
		}
		last = r.GetSequence()
		if r.GetReset_() != (i == 0) {
			t.Errorf("report %d: reset is %v", i, r.GetReset_())
		}
		if r.GetComplete() {
			complete++
		}
		reports += len(r.GetPods())
	}
	if complete != 1 || reports != 100 {
		t.Errorf("%d reports complete the account (want 1), %d pod reports were sent for 100 pods", complete, reports)
	}
}

// Without this, two boxes with one credential would take the link from each other for ever, and nobody would see why.
func TestSupersededStopsSyncing(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the link is up", h.inSync)
	h.mu.Lock()
	h.conn.session.Supersede(time.Now())
	signal(h.conn.wake)
	n := len(h.hellos)
	h.mu.Unlock()
	eventually(t, "the edge stops", func() bool { s := e.Status(); return s.Superseded && !s.Link.Connected })
	e.append("s", "kept") // work on the box goes on
	if got := look(h, func() int { return len(h.hellos) }); got != n {
		t.Errorf("the edge came back %d times", got-n)
	}
}

// G2: without this, a box whose Edge was deleted by mistake would blame the network, or stop what it runs.
func TestUnknownEdgeIsShownAndKeepsWhatItHolds(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	first := h.hold("1")
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the list is applied", h.inSync)
	h.mu.Lock()
	h.unknown = true
	h.conn.session.Dismiss(time.Now())
	signal(h.conn.wake)
	h.mu.Unlock()
	// It goes on asking, and is refused each time: between the tries, which become rarer, the status says why.
	eventually(t, "the status says why", func() bool {
		s := e.Status()
		return !s.Link.Connected && s.Link.Err != nil && strings.Contains(s.Link.Err.Error(), "knows no Edge \"edge-1\"")
	})
	if s := e.Status(); s.Superseded || s.Replica.Committed != first.Digest {
		t.Errorf("status %+v, want the list held", s)
	}
	h.mu.Lock()
	h.unknown = false
	h.mu.Unlock()
	second := h.hold("2")
	eventually(t, "it comes back by itself", func() bool { return e.Status().Replica.Committed == second.Digest && h.inSync() })
}

// fullDisk fails as a full disk does, from the given action on.
type fullDisk struct {
	Store
	fail func(desired.EdgeAction) error
}

func (f fullDisk) Apply(a desired.EdgeAction) error {
	if err := f.fail(a); err != nil {
		return err
	}
	return f.Store.Apply(a)
}

// G1: without this, an edge whose disk was full for a while would claim to hold what it does not, or never catch up.
func TestFullDiskIsShownAndOvercome(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	want := h.hold("1")
	left := make(chan error, 1)
	left <- errors.New("no space left on device")
	e := newEdge(t, h, t.TempDir(), func(c *Config) {
		c.Store = fullDisk{c.Store, func(a desired.EdgeAction) error {
			if _, ok := a.(desired.Commit); !ok {
				return nil
			}
			select {
			case err := <-left:
				return err
			default:
				return nil
			}
		}}
	})
	eventually(t, "the status says why", func() bool {
		err := e.Status().StoreErr
		return err != nil && strings.Contains(err.Error(), "no space left")
	})
	for _, r := range look(h, func() []*longshorepb.Reported { return slices.Clone(h.reports) }) {
		if len(r.GetList()) != 0 {
			t.Error("a list was reported as committed that is not")
		}
	}
	eventually(t, "the edge catches up", func() bool { return h.inSync() && e.Status().Replica.Committed == want.Digest })
	if err := e.Status().StoreErr; err != nil {
		t.Errorf("the status still says %v", err)
	}
}

// Without this, a wrong token would look like a dead network.
func TestRefusedCredentialIsExplained(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	e := newEdge(t, h, t.TempDir(), func(c *Config) { c.Token = "wrong" })
	eventually(t, "the status says what to do", func() bool {
		s := e.Status()
		return !s.Link.Connected && s.Link.Err != nil && strings.Contains(s.Link.Err.Error(), "credential") && !s.Link.NextTry.IsZero()
	})
}

// Specs and reports must not wait behind a backlog: a change of a model could otherwise take days on a slow link.
func TestHelloAndReportPrecedeTelemetry(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.stop()
	e := newEdge(t, h, t.TempDir())
	for range 20 {
		e.append("s", randomText(t, 100<<10)) // more than a message or the window holds: sent in fragments
	}
	h.start()
	eventually(t, "telemetry arrives", func() bool { return look(h, func() int { return len(h.records["s"]) }) == 20 })
	order := look(h, func() []topic.Kind { return h.order })
	if order[0] != topic.Hello || slices.Index(order, topic.Reported) > slices.Index(order, topic.Telemetry) {
		t.Errorf("order of messages: %v", order[:min(len(order), 6)])
	}
}

// G1: without this, a change would wait for days behind an offline week's backlog on a slow link, and a live alarm too.
func TestSpecsAndLiveReadingsPassTheBacklogOnASlowLink(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	slow := newLink(t, h.addr, 24<<10)
	e := newEdge(t, h, t.TempDir(), func(c *Config) { c.URL = "tcp://127.0.0.1:1" }) // no link yet
	const backlog = 150
	for range backlog {
		e.append("backlog", randomText(t, 12<<10)) // 900 KiB compressed: forty seconds of this link
	}
	dir := e.dir
	e.stop()
	e = newEdge(t, h, dir, func(c *Config) { c.URL = "tcp://" + slow.Addr().String() })
	arrived := func(stream string) int { return look(h, func() int { return len(h.records[stream]) }) }
	eventually(t, "the replay has begun", func() bool { return arrived("backlog") > 2 })
	h.hold("1", strings.Repeat("v", 20_000))
	eventually(t, "the list is applied", h.inSync)
	if n := arrived("backlog"); n > backlog/2 {
		t.Errorf("%d of %d records came before the list", n, backlog)
	}
	e.append("live", "alarm")
	eventually(t, "the live reading arrives", func() bool { return arrived("live") == 1 })
	if n := arrived("backlog"); n > backlog*3/4 {
		t.Errorf("%d of %d records came before the live one", n, backlog)
	}
}

// G1: without this, the hub would show an edge as behind for ever because one message was lost.
func TestLostReportIsRepeated(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.lostReports = 1
	h.hold("1")
	newEdge(t, h, t.TempDir())
	eventually(t, "the hub learns that the list is applied", h.inSync)
	if n := look(h, func() int { return h.lostReports }); n != 0 {
		t.Error("no report was lost")
	}
}

// Without this, a model download would begin anew after each cut, or hang for ever without a link.
func TestFetchResumesAndExplains(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	file := strings.Repeat("0123456789", 1000)
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") != "Bearer "+edgeName+":"+h.token:
			http.Error(w, "who are you", http.StatusUnauthorized)
		case r.URL.Path == "/models/sha256:elsewhere":
			http.Redirect(w, r, "http://attacker.example/", http.StatusFound)
		case r.URL.Path != "/models/sha256:abc":
			http.Error(w, "not fetched from its source yet", http.StatusServiceUnavailable)
		default:
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader(file))
		}
	}))
	t.Cleanup(files.Close)
	e := newEdge(t, h, t.TempDir(), func(c *Config) { c.FilesURL = files.URL + "/" })
	eventually(t, "the link is up", h.inSync)
	for _, offset := range []int64{0, 1, 9_999} {
		r, err := e.Fetch(t.Context(), "sha256:abc", offset)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil || string(b) != file[offset:] {
			t.Errorf("from byte %d: %d bytes, error %v", offset, len(b), err)
		}
	}
	for digest, want := range map[string]string{"sha256:missing": "not fetched from its source yet", "sha256:elsewhere": "302"} {
		if _, err := e.Fetch(t.Context(), digest, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", digest, err, want)
		}
	}
	h.stop()
	eventually(t, "the link is down", func() bool { return !e.Status().Link.Connected })
	eventually(t, "fetching says so at once", func() bool {
		_, err := e.Fetch(t.Context(), "sha256:abc", 0)
		return errors.Is(err, ErrNoLink)
	})
}

// G5: without this, somebody on the link could make an edge hold what he likes, or stop it with garbage.
func TestForgedMessagesAreRejected(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	want := h.hold("1")
	e := newEdge(t, h, t.TempDir())
	eventually(t, "the list is applied", h.inSync)
	conn := look(h, func() *hubConn { return h.conn })
	forged := look(h, func() []byte {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Error(err)
		}
		hello := h.hellos[len(h.hellos)-1]
		s, err := desired.NewSession(desired.SessionConfig{Cluster: "test", Edge: edgeName, EdgeKey: h.digest[:], Key: key, Objects: hubObjects{h}}, hello, time.Now())
		if err != nil {
			t.Error(err)
			return nil
		}
		s.SetList(time.Now(), want)
		for _, a := range s.Poll(time.Now()) {
			if m, ok := a.(desired.Send); ok {
				return m.Payload
			}
		}
		return nil
	})
	index := topic.Topic{Kind: topic.Index, Edge: edgeName}.String()
	sent := 0
	for _, m := range []desired.Send{
		{Topic: index, Payload: forged},
		{Topic: index, Payload: []byte("garbage")},
		{Topic: "longshore/v1/nodes/edge-2/index", Payload: forged},
		{Topic: "longshore/v1/nonsense", Payload: forged},
		{Topic: topic.Topic{Kind: topic.Ack, Edge: edgeName}.String(), Payload: []byte("\xff\xff\xff")},
		{Topic: topic.Topic{Kind: topic.Push, Edge: edgeName}.String(), Payload: []byte("\xff\xff\xff")},
	} {
		sent++
		if err := conn.Send(m.Topic, m.Payload, false); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are rejected", func() bool { return e.Status().Rejected == uint64(sent) })
	next := h.hold("2")
	eventually(t, "the session goes on", func() bool { return h.inSync() && e.Status().Replica.Committed == next.Digest })
}
