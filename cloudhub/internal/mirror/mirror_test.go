package mirror_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// G1: without it, an edge would not get its pods, what they name, and its models, or would miss a later change.
func TestG1EdgeFollowsEveryChange(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.Batch(func(c *mirror.Cache) {
		p := pod("e1", "web", "web:1")
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}},
			{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "password"}}},
		}
		c.SetPod(p)
		c.SetConfigMap(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "settings"}, Data: map[string]string{"a": "b"}})
		c.SetSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "password"}, Data: map[string][]byte{"p": []byte("swordfish")}})
		c.SetModel(model("bearing", "1", map[string]string{"name": "e1"}))
		c.SetModel(model("other", "1", map[string]string{"name": "e2"}))
	})
	b := f.box(t, "e1")
	b.connect(h.address)
	b.waitFor("POD/web", "CONFIG_MAP/settings", "SECRET/password", "MODEL/bearing")

	h.cache.SetModel(model("bearing", "2", map[string]string{"name": "e1"}))
	eventually(t, "the new version of the model", func() bool { return strings.Contains(string(b.objects()["MODEL/bearing"]), "\x22\x012") })
	h.cache.DeletePod("default", "web", "uid-web")
	b.waitFor("MODEL/bearing")
	eventually(t, "the hub knows that the edge is in step", func() bool { return h.source.state("e1").Synced })
}

// G1: without it, every change would cost a head of its own, and a burst would flood a slow link.
func TestOneChangeMakesOneHead(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	b := f.box(t, "e1")
	b.connect(h.address)
	synced := func() bool { return h.Stats().InSync == 1 }
	eventually(t, "in step", synced)

	before := b.heads.Load()
	h.cache.SetPod(pod("e1", "p0", "a:1"))
	b.waitFor("POD/p0")
	eventually(t, "in step", synced)
	if n := b.heads.Load() - before; n != 1 {
		t.Errorf("one change made %d heads, want 1", n)
	}
	before = b.heads.Load()
	want := []string{"POD/p0"}
	for i := range 200 {
		name := fmt.Sprintf("q%03d", i)
		h.cache.SetPod(pod("e1", name, "a:1"))
		want = append(want, "POD/"+name)
	}
	b.waitFor(want...)
	if n := b.heads.Load() - before; n > 20 {
		t.Errorf("a burst of 200 changes made %d heads", n)
	}
}

// G7: without it, the status that an edge reports would come back to it as a change, again and again.
func TestStatusPatchesSendNothing(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	b := f.box(t, "e1")
	b.connect(h.address)
	b.waitFor("POD/web")
	before := b.heads.Load()
	for i := range 200 {
		p := pod("e1", "web", "web:1")
		p.ResourceVersion = fmt.Sprint(i)
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning, Message: fmt.Sprint("patch ", i)}
		p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: fmt.Sprint(i)}}
		h.cache.SetPod(p)
	}
	// A real change behind them: once it arrived, so would have whatever the patches caused.
	h.cache.SetPod(pod("e1", "zweb", "web:1"))
	b.waitFor("POD/web", "POD/zweb")
	if n := b.heads.Load() - before; n != 1 {
		t.Errorf("200 status patches and one change made %d heads, want 1", n)
	}
}

// G5: without it, one stolen token would give away every other edge's specs and Secrets.
func TestG5EdgeReadsNothingOfOthers(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1", "e2"), &source{}, nil)
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "password"}, Data: map[string][]byte{"p": []byte("swordfish")}}
	p := pod("e2", "web", "web:1")
	p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "password"}}
	h.cache.SetPod(p)
	h.cache.SetSecret(secret)
	h.cache.SetModel(model("bearing", "1", map[string]string{"name": "e2"}))
	h.cache.SetPod(pod("e1", "mine", "web:1"))
	b := f.box(t, "e1")
	cut := b.connect(h.address)
	b.waitFor("POD/mine")
	other := f.box(t, "e2")
	other.connect(h.address)
	other.waitFor("POD/web", "SECRET/password", "MODEL/bearing")

	for _, filter := range []string{
		"longshore/v1/nodes/e2/index", "longshore/v1/nodes/e2/plain/#", "longshore/v1/nodes/+/plain/#", "longshore/v1/#", "#", "+/#",
		"longshore/v1/nodes/e1/#", "longshore/v1/nodes/e1/objects/+", "longshore/v1/models/+", "longshore/v1/nodes/e2/ack",
		"$share/g/longshore/v1/nodes/e2/index", "longshore/v1/nodes/e1/hello",
	} {
		b.mu.Lock()
		conn := b.conn
		b.mu.Unlock()
		if err := conn.Subscribe(t.Context(), filter); err == nil {
			t.Errorf("e1 may subscribe to %s", filter)
		}
	}
	cut()
	// e1 asks for e2's objects by their digests, below its own name and among the models.
	other.mu.Lock()
	foreign := other.list
	other.mu.Unlock()
	digests := map[string][]byte{"the list": foreign.Digest[:]}
	for _, e := range foreign.Entries {
		digests[e.Name] = e.Digest
	}
	for what, d := range digests {
		for _, at := range []topic.Topic{{Kind: topic.Objects, Edge: "e1", Digest: d}, {Kind: topic.Models, Digest: d}} {
			answer := ask(t, f, h, "e1", at.String())
			if !answer.Gone || len(answer.Data) != 0 {
				t.Errorf("e1 got %s of e2 at %s", what, at)
			}
		}
	}
}

// ask opens a session of its own as a hostile client would, and returns the answer to one subscription.
func ask(t *testing.T, f *fleet, h *hub, edge, name string) *longshorepb.Chunk {
	t.Helper()
	b := f.box(t, edge)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var answer *longshorepb.Chunk
	err := mqttconn.Run(ctx, client(t, edge, h.address), func(ctx context.Context, s *mqttconn.Session) error {
		hello := &longshorepb.Hello{Wire: longshorepb.Wire, Nonce: make([]byte, 16), Session: 1 << 40, Instance: b.instance[:]}
		if err := s.Publish(ctx, topic.Topic{Kind: topic.Hello, Edge: edge}.String(), marshal(t, hello)); err != nil {
			return err
		}
		if err := s.Subscribe(ctx, name); err != nil {
			return err
		}
		for m := range s.Messages() {
			if m.Topic == name || strings.Contains(m.Topic, "/objects/") {
				answer = &longshorepb.Chunk{}
				unmarshal(t, m.Payload, answer)
				cancel()
				return nil
			}
		}
		return nil
	}, nil)
	if err != nil || answer == nil {
		t.Fatalf("no answer to %s (%v)", name, err)
	}
	return answer
}

// Without it, a box restored from an image of another would run beside it under one name, and both would overwrite each
// other's reports.
func TestLaterInstanceSupersedes(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	first, second := f.box(t, "e1"), f.box(t, "e1")
	first.connect(h.address)
	first.waitFor("POD/web")
	cutSecond := second.connect(h.address)
	second.waitFor("POD/web")
	eventually(t, "the first instance is told", first.isSuperseded)

	// It comes back all the same, as one that did not get the message would: still superseded, and the second undisturbed.
	links := first.links.Load()
	eventually(t, "the first instance came back and was sent away", func() bool { return first.links.Load() > links+1 })
	h.cache.SetPod(pod("e1", "zweb", "web:1"))
	second.waitFor("POD/web", "POD/zweb")
	if second.isSuperseded() {
		t.Error("the second instance was superseded by the first")
	}
	edges := h.Edges()
	if len(edges) != 2 || edges[0].Superseded || !edges[1].Superseded || edges[0].Instance == edges[1].Instance {
		t.Errorf("edges = %+v, want the second instance, then the first as superseded", edges)
	}
	cutSecond()
	eventually(t, "the end of the second is reported", func() bool { return !h.source.state("e1").Online })
}

// Without it, every power cut would leave a row "Superseded" for ever, and nobody would look at a real one any more.
func TestDeadInstanceIsNotShownAsSuperseded(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	before, after := f.box(t, "e1"), f.box(t, "e1")
	address, freeze := mortalLink(t, h.address)
	before.connect(address)
	before.waitFor("POD/web")
	freeze()
	after.connect(h.address)
	after.waitFor("POD/web")
	eventually(t, "the dead connection is given up", func() bool { s := h.Stats(); return s.Superseded == 1 && s.Connections == 1 })
	if edges := h.Edges(); len(edges) != 1 || edges[0].Superseded || !edges[0].Online {
		t.Errorf("edges = %+v, want the one box", edges)
	}
}

// mortalLink is a way to a hub that can die as a power cut leaves it: nothing moves any more, and no end tells.
func mortalLink(t *testing.T, hub string) (address string, freeze func()) {
	t.Helper()
	door, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var frozen atomic.Bool
	var running sync.WaitGroup
	end, stop := context.WithCancel(context.Background())
	carry := func(to, from net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if frozen.Load() {
				<-end.Done()
			}
			if err != nil {
				break
			}
			if _, err := to.Write(buf[:n]); err != nil {
				break
			}
		}
		_ = errors.Join(to.Close(), from.Close())
	}
	running.Go(func() {
		for {
			near, err := door.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", hub)
			if err != nil || frozen.Load() {
				_ = near.Close()
				continue
			}
			running.Go(func() { carry(near, far) })
			running.Go(func() { carry(far, near) })
			context.AfterFunc(end, func() { _ = errors.Join(near.Close(), far.Close()) })
		}
	})
	t.Cleanup(func() { stop(); _ = door.Close(); running.Wait() })
	return door.Addr().String(), func() { frozen.Store(true) }
}

// Without it, a deleted Edge would look like a broken network on the box, and deleting it would stop what the box runs.
func TestBoxHearsThatItsEdgeIsGone(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	b := f.box(t, "e1")
	b.connect(h.address)
	b.waitFor("POD/web")
	h.cache.DeleteEdge("e1")
	eventually(t, "the box is told", func() bool { return b.unknown.Load() > 0 })
	told := b.unknown.Load()
	eventually(t, "it is told again when it comes back", func() bool { return b.unknown.Load() > told+1 })
	b.waitFor("POD/web")
	h.cache.SetEdge(edge("e1"))
	h.cache.SetPod(pod("e1", "zweb", "web:1"))
	b.waitFor("POD/web", "POD/zweb")
}

// Without it, a connection that died unnoticed would make the agent's next one look like an intruder.
func TestNewSessionOfSameInstanceTakesOver(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	// The old connection stays open and silent.
	old := f.box(t, "e1")
	ended := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		_ = mqttconn.Run(ctx, client(t, "e1", h.address), func(ctx context.Context, s *mqttconn.Session) error {
			hello := &longshorepb.Hello{Wire: longshorepb.Wire, Nonce: make([]byte, 16), Session: 1, Instance: old.instance[:]}
			if err := s.Publish(ctx, topic.Topic{Kind: topic.Hello, Edge: "e1"}.String(), marshal(t, hello)); err != nil {
				return err
			}
			for m := range s.Messages() {
				if !strings.HasSuffix(m.Topic, "/index") {
					continue
				}
				head := &longshorepb.Head{}
				signed := &longshorepb.SignedHead{}
				unmarshal(t, m.Payload, signed)
				unmarshal(t, signed.Head, head)
				if head.Superseded {
					t.Error("the agent's own old connection was told that another instance took over")
				}
			}
			close(ended)
			<-ctx.Done()
			cancel()
			return nil
		}, nil)
	})
	eventually(t, "the old session", func() bool { return h.Stats().Sessions == 1 })
	old.connect(h.address)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	old.waitFor("POD/web")
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the old connection was not closed")
	}
}

// G6: without it, an edge that moved to another hub would be served and reported by two.
func TestNewerSessionOnAnotherHubEndsThisOne(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub-a", newCache("e1"), &source{}, nil)
	b := f.box(t, "e1")
	b.connect(h.address)
	eventually(t, "a session", func() bool { return h.source.state("e1").Online })
	state := h.source.state("e1")

	// Status that this hub wrote, or that is older, changes nothing.
	links := b.links.Load()
	e := edge("e1")
	e.Status.Link, e.Status.Hub, e.Status.Session, e.Status.Instance = "Online", "hub-a", int64(state.Session), state.Instance
	h.cache.SetEdge(e.DeepCopy())
	e.Status.Hub, e.Status.Session = "hub-b", int64(state.Session)-1
	h.cache.SetEdge(e.DeepCopy())
	h.cache.SetPod(pod("e1", "web", "web:1"))
	b.waitFor("POD/web")
	if b.links.Load() != links {
		t.Fatal("the connection was closed for a status that is not newer")
	}
	e.Status.Session = int64(state.Session) + 1
	h.cache.SetEdge(e.DeepCopy())
	eventually(t, "the connection is closed", func() bool { return b.links.Load() > links })
	if !h.source.state("e1").Online {
		t.Error("the hub reported the edge offline although another hub holds it")
	}
	if b.isSuperseded() {
		t.Error("the same instance was told that another took over")
	}
}

// G1: without it, a hub whose view is behind would take an edge back to an older state.
func TestG1FirstChangeWaitsForProof(t *testing.T) {
	f := newFleet()
	ahead := f.hub(t, "hub-a", newCache("e1"), &source{}, nil)
	ahead.cache.SetPod(pod("e1", "web", "web:2"))
	b := f.box(t, "e1")
	cut := b.connect(ahead.address)
	b.waitForImage("web", "web:2")
	cut()

	// The other hub still has the older pod; its first proof fails, the second waits until the cache is there.
	var asked atomic.Int32
	release := make(chan struct{})
	behind := &source{prove: func(ctx context.Context) error {
		if asked.Add(1) == 1 {
			return errors.New("no API server")
		}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	h := f.hub(t, "hub-b", newCache("e1"), behind, nil)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	heads := b.heads.Load()
	b.connect(h.address)
	eventually(t, "the view is asked for again after a failure", func() bool { return asked.Load() == 2 })
	if n := b.heads.Load() - heads; n != 0 {
		t.Errorf("%d heads before the hub's view was proved", n)
	}
	h.cache.SetPod(pod("e1", "web", "web:3"))
	close(release)
	b.waitForImage("web", "web:3")
	if n := b.heads.Load() - heads; n != 1 {
		t.Errorf("%d heads, want 1: the older state must never have been named", n)
	}
	if s := h.Stats(); s.Proofs != 1 || s.ProofsFailed != 1 {
		t.Errorf("proofs %d and %d failed, want 1 and 1", s.Proofs, s.ProofsFailed)
	}
}

// G1: without it, edges would stay at a state that the restored store has never seen.
func TestG1RestoredStoreIsFollowed(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.SetPod(pod("e1", "web", "web:2"))
	b := f.box(t, "e1")
	b.connect(h.address)
	b.waitForImage("web", "web:2")
	h.cache.Reset()
	if h.Ready() == nil {
		t.Error("the hub is ready without a state")
	}
	h.cache.SetEdge(edge("e1"))
	h.cache.SetPod(pod("e1", "web", "web:1"))
	h.cache.Synced()
	b.waitForImage("web", "web:1")
}

// Without it, a device whose Edge was forgotten would hang without anybody learning why, and need a visit once it is created.
func TestUnknownEdgeIsRefusedUntilItExists(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache(), &source{}, nil)
	b := f.box(t, "e1")
	b.connect(h.address)
	eventually(t, "refused, and back again", func() bool { return b.links.Load() >= 2 && h.Stats().Refused >= 1 })
	h.cache.SetEdge(edge("e1"))
	h.cache.SetPod(pod("e1", "web", "web:1"))
	b.waitFor("POD/web")
	h.cache.DeleteEdge("e1")
	refused := h.Stats().Refused
	eventually(t, "closed when its Edge is deleted", func() bool { return h.Stats().Refused > refused })
}

// Without it, people would see stale or invented states of edges, and a broken edge could fill the hub's memory.
func TestReportsAreMergedAndJudged(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	h.cache.SetPod(pod("e2", "foreign", "web:1"))
	h.cache.SetModel(model("bearing", "1", nil))
	b := f.box(t, "e1")
	b.connect(h.address)
	b.waitFor("POD/web", "MODEL/bearing")
	b.report(&longshorepb.Reported{
		Pods:   []*longshorepb.PodReport{{Namespace: "default", Name: "web", Uid: "uid-web"}, {Name: "foreign", Uid: "uid-foreign"}, {Name: "no uid"}},
		Models: []*longshorepb.ModelReport{{Namespace: "default", Name: "bearing", State: longshorepb.ModelState_MODEL_STATE_SERVING}, {Name: "bearing", State: 77}},
		Node:   &longshorepb.NodeReport{Hostname: "box", BacklogRecords: 7},
	})
	eventually(t, "the report is merged", func() bool {
		s := h.source.state("e1")
		return s.Complete && s.Node.GetBacklogRecords() == 7 && len(s.Models) == 1
	})
	if s := h.source.state("e1"); len(s.Pods) != 1 || s.Pods["uid-web"] == nil {
		t.Errorf("pods reported %v, want uid-web alone: the other is not this edge's", s.Pods)
	}
	refused := h.Stats().ReportsRefused
	b.mu.Lock()
	for _, r := range []*longshorepb.Reported{
		{Session: b.session + 1, Sequence: 1000, Node: &longshorepb.NodeReport{BacklogRecords: 8}},
		{Session: b.session, Sequence: b.sequence, Node: &longshorepb.NodeReport{BacklogRecords: 9}},
	} {
		b.publish("longshore/v1/nodes/e1/reported", encode(t, r))
	}
	b.mu.Unlock()
	b.report(&longshorepb.Reported{Node: &longshorepb.NodeReport{MemoryBytes: 1 << 63}})
	eventually(t, "reports of another session, out of order and absurd are counted", func() bool { return h.Stats().ReportsRefused == refused+3 })
	if n := h.source.state("e1").Node.GetBacklogRecords(); n != 7 {
		t.Errorf("backlog %d, want 7", n)
	}
	b.report(&longshorepb.Reported{GonePods: []string{"uid-web"}})
	eventually(t, "the pod is gone", func() bool { return len(h.source.state("e1").Pods) == 0 })
}

// G4: without it, a client could have the hub queue without bound.
func TestG4RequestsAreBounded(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	closed := false
	_ = mqttconn.Run(ctx, client(t, "e1", h.address), func(ctx context.Context, s *mqttconn.Session) error {
		defer cancel()
		for i := range 200 {
			if err := s.Subscribe(ctx, fmt.Sprintf("longshore/v1/nodes/e1/plain/pods/a.%d", i)); err != nil {
				closed = true
				return nil
			}
		}
		return nil
	}, nil)
	if !closed && h.Stats().Refused == 0 {
		t.Error("a client kept 200 plain subscriptions")
	}
}

// Without it, an object that no edge can take would stop every other change of that edge.
func TestOversizePodIsLeftOutAndTold(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, nil)
	big := pod("e1", "big", "web:1")
	big.Annotations = map[string]string{"a": strings.Repeat("x", desired.MaxObjectBytes)}
	h.cache.SetPod(big)
	h.cache.SetPod(pod("e1", "web", "web:1"))
	b := f.box(t, "e1")
	b.connect(h.address)
	b.waitFor("POD/web")
	eventually(t, "the problem is told", func() bool {
		h.source.mu.Lock()
		defer h.source.mu.Unlock()
		return slices.Contains(h.source.problems, "Pod big TooLarge")
	})
}
