package mirror_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// eventually waits until ok returns true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); <-time.After(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// source is an upstream that remembers what it was told.
type source struct {
	// prove is asked for every proof; nil: every view is proved.
	prove func(ctx context.Context) error

	mu       sync.Mutex
	states   map[string]mirror.EdgeState
	problems []string
}

func (s *source) Prove(ctx context.Context, _ string) error {
	if s.prove != nil {
		return s.prove(ctx)
	}
	return nil
}

func (s *source) Report(e mirror.EdgeState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.states == nil {
		s.states = map[string]mirror.EdgeState{}
	}
	s.states[e.Edge] = e
}

func (s *source) Problem(r mirror.ObjectRef, reason, _ string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problems = append(s.problems, r.Kind+" "+r.Name+" "+reason)
}

func (s *source) state(edge string) mirror.EdgeState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.states[edge]
}

// fleet is what the hubs of one test share: signing key and tokens.
type fleet struct {
	key ed25519.PrivateKey
}

func newFleet() *fleet {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	return &fleet{key: key}
}

func token(edge string) string {
	raw := sha256.Sum256([]byte("token of " + edge))
	return base64.RawURLEncoding.EncodeToString(raw[:])
}

func edgeKey(edge string) []byte {
	raw := sha256.Sum256([]byte("token of " + edge))
	key := sha256.Sum256(raw[:])
	return key[:]
}

func (f *fleet) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	if string(l.Password) != token(l.Username) {
		return broker.Identity{}, errors.New("wrong token")
	}
	return broker.Identity{Name: l.Username, Key: edgeKey(l.Username), Access: mirror.Access(l.Username)}, nil
}

// hub is a mirror behind a real broker.
type hub struct {
	*mirror.Mirror
	cache   *mirror.Cache
	source  *source
	address string
	stop    func()
}

// hub starts one; it ends with the test, or with stop.
func (f *fleet) hub(t *testing.T, name string, cache *mirror.Cache, src *source, in *intake.Intake) *hub {
	t.Helper()
	m, err := mirror.New(mirror.Config{
		Logger: logger(t), HubName: name, Key: f.key, Cache: cache, Upstream: src, Intake: in,
		Cluster: func(context.Context) (string, error) { return "cluster-1", nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := broker.New(broker.Config{
		Logger: logger(t), Auth: f, Virtual: m, Listeners: []broker.Listener{{Name: "mqtt", Address: "127.0.0.1:0"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{m.Run, b.Run} {
		running.Go(func() {
			if err := run(ctx); err != nil {
				t.Errorf("run: %v", err)
			}
		})
	}
	h := &hub{Mirror: m, cache: cache, source: src, address: b.Addr("mqtt").String(), stop: func() { cancel(); running.Wait() }}
	t.Cleanup(h.stop)
	return h
}

// newCache returns a synced cache with Edges of those names.
func newCache(edges ...string) *mirror.Cache {
	c := mirror.NewCache()
	for _, e := range edges {
		c.SetEdge(edge(e))
	}
	c.Synced()
	return c
}

func edge(name string) *v1alpha1.Edge {
	return &v1alpha1.Edge{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"name": name}}}
}

func pod(edge, name, image string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{NodeName: edge, Containers: []corev1.Container{{Name: "main", Image: image}}},
	}
}

func model(name, version string, selector map[string]string) *v1alpha1.Model {
	return &v1alpha1.Model{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name)},
		Spec: v1alpha1.ModelSpec{
			Version: version, EdgeSelector: &metav1.LabelSelector{MatchLabels: selector},
			Variants: []v1alpha1.ModelVariant{{
				Name: "fp32", Format: "onnx", Digest: fmt.Sprintf("sha256:%064x", len(version)), SizeBytes: 10,
				Source: v1alpha1.ModelSource{URI: "file:" + name},
			}},
		},
	}
}

// box is an edge: a real replica and its store behind a real MQTT client.
type box struct {
	t        *testing.T
	name     string
	fleet    *fleet
	instance [16]byte
	store    *desired.Store
	replica  *desired.Replica
	heads    atomic.Int64
	links    atomic.Int64 // connections made
	unknown  atomic.Int64 // times the box heard that it has no Edge

	mu         sync.Mutex
	list       *desired.List
	superseded bool
	conn       *mqttconn.Session
	session    uint64
	sequence   uint64
	// full is what the box reports of itself, account the digest that it names in its next hello; told counts sessions whose
	// hub held it, and asked those whose hub did not.
	full        *longshorepb.Reported
	account     []byte
	told, asked int
}

func (f *fleet) box(t *testing.T, name string) *box {
	t.Helper()
	store, _, err := desired.OpenStore(t.TempDir(), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	b := &box{t: t, name: name, fleet: f, store: store}
	rand.Read(b.instance[:])
	stored, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	b.replica = desired.NewReplica(desired.ReplicaConfig{
		Edge: name, EdgeKey: edgeKey(name), HubKeys: []ed25519.PublicKey{f.key.Public().(ed25519.PublicKey)}, Instance: b.instance,
	}, stored)
	return b
}

// connect keeps the box connected to a hub until the returned function is called.
func (b *box) connect(address string) (cut func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := mqttconn.Run(ctx, client(b.t, b.name, address), b.serve, nil); err != nil {
			b.t.Errorf("run: %v", err)
		}
	}()
	cut = sync.OnceFunc(func() { cancel(); <-done })
	b.t.Cleanup(cut)
	return cut
}

func client(t *testing.T, edge, address string) mqttconn.Config {
	return mqttconn.Config{
		Logger: logger(t), URL: "tcp://" + address, Username: edge, Password: func() string { return token(edge) },
		ClientIDPrefix: edge + "-", RetryMin: 10 * time.Millisecond, RetryMax: 100 * time.Millisecond,
	}
}

func (b *box) serve(ctx context.Context, s *mqttconn.Session) error {
	number, err := b.store.NextSession()
	if err != nil {
		return err
	}
	var nonce [16]byte
	rand.Read(nonce[:])
	b.mu.Lock()
	b.conn, b.session, b.sequence = s, number, 0
	named := b.account
	b.mu.Unlock()
	b.links.Add(1)
	b.replica.Start(time.Now(), nonce, number, nil, named)
	defer b.replica.Stop()
	// Subscribing waits for an answer, so it must not wait for this loop: whoever reads has to go on reading.
	up := make(chan desired.EdgeAction, 4096)
	var writer sync.WaitGroup
	defer writer.Wait()
	defer close(up)
	writer.Go(func() {
		for a := range up {
			switch a := a.(type) {
			case desired.Publish:
				_ = s.Publish(ctx, a.Topic, a.Payload)
			case desired.Subscribe:
				_ = s.Subscribe(ctx, a.Topics...)
			}
		}
	})
	first := true
	for {
		if st := b.replica.Status(); first && st.Head > 0 {
			first = false
			b.introduce(st.AccountHeld)
		}
		for actions := b.replica.Poll(time.Now()); len(actions) > 0; actions = b.replica.Poll(time.Now()) {
			for _, a := range actions {
				switch a.(type) {
				case desired.Publish, desired.Subscribe:
					up <- a
				default:
					if err := b.apply(a); err != nil {
						return err
					}
				}
			}
		}
		b.mu.Lock()
		st := b.replica.Status()
		superseded := st.Superseded
		b.superseded = b.superseded || superseded
		b.mu.Unlock()
		if superseded {
			return errors.New("another instance took over")
		}
		if st.Unknown {
			b.unknown.Add(1)
			return errors.New("there is no such Edge")
		}
		timer := time.NewTimer(time.Hour)
		if d := b.replica.Deadline(); !d.IsZero() {
			timer.Reset(time.Until(d))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case m, ok := <-s.Messages():
			if !ok {
				return nil
			}
			if t, _ := topic.Parse(m.Topic); t.Kind == topic.Index {
				b.heads.Add(1)
			}
			if err := b.replica.Receive(time.Now(), m.Topic, m.Payload); err != nil {
				b.t.Logf("%s: %s: %v", b.name, m.Topic, err)
			}
		}
		timer.Stop()
	}
}

func (b *box) apply(a desired.EdgeAction) error {
	if err := b.store.Apply(a); err != nil {
		return err
	}
	if c, ok := a.(desired.Commit); ok {
		b.mu.Lock()
		b.list = c.List
		b.mu.Unlock()
		b.report(&longshorepb.Reported{})
	}
	return nil
}

// introduce sends the first report of a session: everything, unless the hub holds it.
func (b *box) introduce(held bool) {
	b.mu.Lock()
	r := &longshorepb.Reported{}
	if held {
		b.told++
	} else {
		b.asked++
		if b.full != nil {
			r = proto.CloneOf(b.full)
		}
		r.Reset_, r.Complete = true, true
	}
	b.mu.Unlock()
	b.report(r)
}

// become sets what the box reports of itself from the next session on, and the account that it names.
func (b *box) become(full *longshorepb.Reported, named []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.full, b.account = full, named
}

// introduced returns in how many sessions the hub held the account, and in how many it did not.
func (b *box) introduced() (told, asked int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.told, b.asked
}

// report sends a report with what every report carries filled in.
func (b *box) report(r *longshorepb.Reported) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sequence++
	r.Session, r.Sequence = b.session, b.sequence
	if b.list != nil {
		r.List = b.list.Digest[:]
	}
	b.publish(topic.Topic{Kind: topic.Reported, Edge: b.name}.String(), encode(b.t, r))
}

// publish sends on the box's connection; the caller holds mu. A connection that has ended is no failure.
func (b *box) publish(name string, payload []byte) {
	if err := b.conn.Publish(context.Background(), name, payload); err != nil {
		b.t.Logf("%s: publish: %v", b.name, err)
	}
}

// holds returns the committed list as text: kind/name of each entry, "-" before absent ones.
func (b *box) holds() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	names := []string{}
	if b.list == nil {
		return nil
	}
	for _, e := range b.list.Entries {
		name := e.Kind.String()[len("KIND_"):] + "/" + e.Name
		if e.Absent {
			name = "-" + name
		}
		names = append(names, name)
	}
	return names
}

// objects returns the bodies of what the store says is current, by kind and name.
func (b *box) objects() map[string][]byte {
	_, objects, err := b.store.Current()
	if err != nil {
		b.t.Fatal(err)
	}
	all := map[string][]byte{}
	for _, o := range objects {
		all[o.Kind.String()[len("KIND_"):]+"/"+o.Name] = o.Body
	}
	return all
}

func (b *box) isSuperseded() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.superseded
}

// waitFor waits until the box holds exactly these.
func (b *box) waitFor(want ...string) {
	b.t.Helper()
	defer func() {
		if b.t.Failed() {
			b.t.Logf("%s holds %v, want %v; %+v after %d heads", b.name, b.holds(), want, b.replica.Status(), b.heads.Load())
		}
	}()
	eventually(b.t, "the edge holds what it should", func() bool { return slices.Equal(b.holds(), want) })
}

// image waits until a pod's image is this one in the box's store.
func (b *box) waitForImage(name, image string) {
	b.t.Helper()
	eventually(b.t, "the edge holds "+name+" with image "+image, func() bool {
		return bytes.Contains(b.objects()["POD/"+name], []byte(image))
	})
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func encode(t *testing.T, r *longshorepb.Reported) []byte {
	t.Helper()
	b, err := account.Encode(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unmarshal(t *testing.T, b []byte, m proto.Message) {
	t.Helper()
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatal(err)
	}
}
