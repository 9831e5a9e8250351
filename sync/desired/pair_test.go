package desired

import (
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

var (
	testSeed = [32]byte{1}
	testKey  = ed25519.NewKeyFromSeed(testSeed[:])
	edgeKey  = []byte("0123456789abcdef0123456789abcdef")
)

type objects map[Digest]Object

func (o objects) Object(d Digest) (Object, bool) { x, ok := o[d]; return x, ok }

func pod(name string, size int) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name)},
		Spec: corev1.PodSpec{NodeName: "e1", Containers: []corev1.Container{{
			Name: "c", Image: "img", Env: []corev1.EnvVar{{Name: "X", Value: noise(name, size)}},
		}}},
	}
}

// noise is text that does not compress well, the same for the same seed.
func noise(seed string, size int) string {
	var b strings.Builder
	for i := 0; b.Len() < size; i++ {
		d := digestOf(1, []byte(fmt.Sprint(seed, i)), [32]byte{})
		b.WriteString(d.String()[:32])
		for _, c := range d[:16] {
			b.WriteByte('A' + c%58)
		}
	}
	return b.String()[:size]
}

// must is for what can't fail with the arguments of a test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// pair is a hub's session and an edge's replica with nothing in between.
type pair struct {
	t       *testing.T
	now     time.Time
	objects objects
	list    *List
	store   *Store
	replica *Replica
	session *Session
	number  uint64
	// account is what the edge says it reported, held whether the hub says that it holds it.
	account []byte
	held    bool
	// down and up count messages and bytes.
	downBytes, upBytes int
	heads, requests    int
	proofs             int
}

func newPair(t *testing.T, dir string) *pair {
	s, _, err := OpenStore(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	p := &pair{t: t, now: time.Unix(1e9, 0), objects: objects{}, store: s}
	p.replica = NewReplica(ReplicaConfig{
		Edge: "e1", EdgeKey: edgeKey, HubKeys: []ed25519.PublicKey{testKey.Public().(ed25519.PublicKey)},
	}, must(s.Load()))
	return p
}

func (p *pair) setObjects(os ...Object) {
	var es []*longshorepb.Entry
	for _, o := range os {
		p.objects[o.Digest] = o
		es = append(es, o.Entry())
	}
	p.list = NewList(es)
	if p.session != nil {
		p.session.SetList(p.now, p.list)
	}
}

func (p *pair) connect() {
	p.number++
	p.session = nil
	p.replica.Start(p.now, [16]byte{byte(p.number)}, p.number, nil, p.account)
}

// run exchanges messages until nothing moves.
func (p *pair) run() {
	for range 100_000 {
		if !p.edge() && !p.hub() {
			return
		}
	}
	p.t.Fatal("the exchange does not end")
}

func (p *pair) edge() bool {
	actions := p.replica.Poll(p.now)
	for _, a := range actions {
		switch a := a.(type) {
		case Publish:
			p.upBytes += len(a.Topic) + len(a.Payload)
			h := &longshorepb.Hello{}
			if err := proto.Unmarshal(a.Payload, h); err != nil {
				p.t.Fatal(err)
			}
			p.hello(h)
		case Subscribe:
			for _, name := range a.Topics {
				tp := must(topic.Parse(name))
				p.upBytes += len(name)
				if len(tp.Digest) > 0 {
					p.requests++
					p.session.Fetch(p.now, Digest(tp.Digest), tp.Offset)
				}
			}
		default:
			if err := p.store.Apply(a); err != nil {
				p.t.Fatal(err)
			}
			if c, ok := a.(Commit); ok {
				p.session.Reported(p.now, c.List.Digest[:])
			}
		}
	}
	return len(actions) > 0
}

func (p *pair) hello(h *longshorepb.Hello) {
	s, err := NewSession(SessionConfig{
		Cluster: "c1", Edge: "e1", EdgeKey: edgeKey, Key: testKey, Objects: p.objects, AccountHeld: p.held,
	}, h, p.now)
	if err != nil {
		p.t.Fatal(err)
	}
	p.session = s
	s.SetList(p.now, p.list)
}

func (p *pair) hub() bool {
	if p.session == nil {
		return false
	}
	actions := p.session.Poll(p.now)
	for _, a := range actions {
		switch a := a.(type) {
		case Send:
			if len(a.Payload) > maxMessage {
				p.t.Fatalf("message of %d bytes on %s", len(a.Payload), a.Topic)
			}
			p.downBytes += len(a.Topic) + len(a.Payload)
			if strings.HasSuffix(a.Topic, "/index") {
				p.heads++
			}
			if err := p.replica.Receive(p.now, a.Topic, a.Payload); err != nil {
				p.t.Fatal(err)
			}
		case Prove:
			p.proofs++
			p.session.Proved(p.now, p.list)
		}
	}
	return len(actions) > 0
}

func (p *pair) wantCommitted() {
	p.t.Helper()
	l, got, err := p.store.Current()
	if err != nil || l == nil {
		p.t.Fatalf("current: %v %v", l, err)
	}
	if l.Digest != p.list.Digest {
		p.t.Fatalf("committed %s, want %s", l.Digest.Short(), p.list.Digest.Short())
	}
	for _, o := range got {
		if want := p.objects[o.Digest]; string(want.Body) != string(o.Body) || want.Ref != o.Ref {
			p.t.Errorf("%s differs from what the hub has", o.Ref)
		}
	}
	if st := p.replica.Status(); !st.Synced || !p.session.InSync() {
		p.t.Errorf("not in sync: %+v, hub %v", st, p.session.InSync())
	}
}

// TestG1FirstSync: without it an edge would not get its pods, or a reconnect would fetch everything again.
func TestG1FirstSync(t *testing.T) {
	p := newPair(t, t.TempDir())
	p.setObjects(must(FromPod(pod("a", 100))), must(FromPod(pod("b", 3000))), must(FromPod(pod("big", 300_000))))
	p.connect()
	p.run()
	p.wantCommitted()

	p.downBytes, p.upBytes, p.requests = 0, 0, 0
	p.connect()
	p.run()
	p.wantCommitted()
	if n := p.downBytes + p.upBytes; n > 1024 || p.requests != 0 {
		t.Errorf("a reconnect without a change moved %d bytes and %d requests", n, p.requests)
	}

	p.heads, p.requests = 0, 0
	p.setObjects(must(FromPod(pod("a", 101))), must(FromPod(pod("b", 3000))), must(FromPod(pod("big", 300_000))))
	p.run()
	p.wantCommitted()
	if p.heads != 1 || p.requests != 0 {
		t.Errorf("a small change took %d heads and %d requests, want it pushed with one head", p.heads, p.requests)
	}
}

// An edge believes that its hub knows what it reported only if the hub says so of what this session's hello names: otherwise
// Kubernetes would show nothing of its pods, or old things.
func TestHeadSaysWhetherTheAccountIsHeld(t *testing.T) {
	p := newPair(t, t.TempDir())
	p.setObjects(must(FromPod(pod("a", 100))))
	for _, c := range []struct {
		account    []byte
		held, want bool
	}{{nil, false, false}, {nil, true, false}, {make([]byte, 32), false, false}, {make([]byte, 32), true, true}} {
		p.account, p.held = c.account, c.held
		p.connect()
		if p.replica.Status().AccountHeld {
			t.Fatal("the account is held before there is a head")
		}
		p.run()
		p.wantCommitted()
		if got := p.replica.Status().AccountHeld; got != c.want {
			t.Errorf("account %x, held %t: the edge says %t", c.account, c.held, got)
		}
	}
}
