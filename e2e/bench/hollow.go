package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// hollow is an edge without a box: the real replica on the real connection, a store that is only memory, pods that run as
// soon as they are named. Many fit one process. Safe for concurrent use.
type hollow struct {
	name, token string
	key         []byte
	hubKeys     []ed25519.PublicKey
	hub         string

	mu       sync.Mutex
	list     *desired.List // committed; nil before the first
	since    time.Time     // of list
	syncedAt time.Time     // of the newest session's first agreement with the hub; zero before
}

// enrollHollow enrolls edges: the first by the command, the others by adding lines to the hub's token file, as the command
// does one by one.
func enrollHollow(ctx context.Context, hub *rig.Hub, names []string) ([]*hollow, error) {
	file, err := hub.Enroll(ctx, names[0])
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var credential struct {
		Token   string
		HubKeys [][]byte
	}
	if err := yaml.Unmarshal(b, &credential); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var keys []ed25519.PublicKey
	for _, k := range credential.HubKeys {
		keys = append(keys, k)
	}
	var lines strings.Builder
	edges := make([]*hollow, len(names))
	for i, name := range names {
		secret := make([]byte, 32)
		if _, err := rand.Read(secret); err != nil {
			return nil, err
		}
		if i == 0 {
			if secret, err = base64.RawURLEncoding.DecodeString(credential.Token); err != nil {
				return nil, fmt.Errorf("%s: token: %w", file, err)
			}
		}
		key := sha256.Sum256(secret)
		if i > 0 {
			fmt.Fprintf(&lines, "%s %x\n", name, key)
		}
		edges[i] = &hollow{name: name, token: base64.RawURLEncoding.EncodeToString(secret), key: key[:], hubKeys: keys, hub: hub.MQTT}
	}
	f, err := os.OpenFile(filepath.Join(hub.Data(), "tokens"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString(lines.String())
	return edges, errors.Join(err, f.Close())
}

// held is the list that the edge committed last, nil if none, and when it did.
func (h *hollow) held() (*desired.List, time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.list, h.since
}

// synced is when the newest session first agreed with the hub; zero if it has not.
func (h *hollow) synced() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.syncedAt
}

// run keeps the edge connected until ctx ends.
func (h *hollow) run(ctx context.Context, log *slog.Logger) error {
	replica := desired.NewReplica(desired.ReplicaConfig{
		Edge: h.name, EdgeKey: h.key, HubKeys: h.hubKeys, AgentVersion: "hollow", Instance: [16]byte(h.key),
	}, desired.Stored{})
	session := uint64(time.Now().UnixMilli())
	return mqttconn.Run(ctx, mqttconn.Config{
		Logger: log, URL: "tcp://" + h.hub, Username: h.name, Password: func() string { return h.token }, ClientIDPrefix: h.name + "-",
	}, func(ctx context.Context, conn *mqttconn.Session) error {
		h.mu.Lock()
		h.syncedAt = time.Time{}
		h.mu.Unlock()
		session++
		s := &hollowSession{hollow: h, conn: conn, replica: replica, session: session}
		defer replica.Stop()
		return s.serve(ctx)
	}, nil)
}

// hollowSession is one connection of a hollow edge.
type hollowSession struct {
	*hollow
	conn     *mqttconn.Session
	replica  *desired.Replica
	session  uint64
	head     uint64 // counter of the newest
	sequence uint64 // of the last report
}

func (s *hollowSession) serve(ctx context.Context) error {
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return err
	}
	s.replica.Start(time.Now(), nonce, s.session, nil, nil)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for first := true; ; first = false {
		if err := s.act(ctx); err != nil {
			return err
		}
		if first {
			if err := s.report(ctx); err != nil {
				return err
			}
		}
		timer.Stop()
		if d := s.replica.Deadline(); !d.IsZero() {
			timer.Reset(time.Until(d))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m, ok := <-s.conn.Messages():
			if !ok {
				<-ctx.Done()
				return ctx.Err()
			}
			if err := s.receive(ctx, m); err != nil {
				return err
			}
		case <-timer.C:
		}
	}
}

func (s *hollowSession) receive(ctx context.Context, m mqttconn.Message) error {
	if err := s.replica.Receive(time.Now(), m.Topic, m.Payload); err != nil {
		return fmt.Errorf("a message of the hub is not believed: %w", err)
	}
	st := s.replica.Status()
	repeated := st.Synced && st.Head > s.head && s.head > 0
	s.head = st.Head
	if repeated {
		return s.report(ctx) // the hub has not heard it
	}
	return nil
}

func (s *hollowSession) act(ctx context.Context) error {
	for {
		actions := s.replica.Poll(time.Now())
		if len(actions) == 0 {
			s.noteSync()
			return nil
		}
		for _, a := range actions {
			if err := s.execute(ctx, a); err != nil {
				return err
			}
		}
	}
}

func (s *hollowSession) noteSync() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.syncedAt.IsZero() && s.replica.Status().Synced {
		s.syncedAt = time.Now()
	}
}

func (s *hollowSession) execute(ctx context.Context, a desired.EdgeAction) error {
	switch a := a.(type) {
	case desired.Publish:
		return s.conn.Publish(ctx, a.Topic, a.Payload)
	case desired.Subscribe:
		return s.conn.Subscribe(ctx, a.Topics...)
	case desired.Commit:
		s.mu.Lock()
		s.list, s.since = a.List, time.Now()
		s.mu.Unlock()
		return s.report(ctx)
	}
	return nil
}

// report tells the hub which list is held; the pods it names are said to run.
func (s *hollowSession) report(ctx context.Context) error {
	s.sequence++
	r := &longshorepb.Reported{Session: s.session, Sequence: s.sequence, Reset_: true, Complete: true, Node: &longshorepb.NodeReport{
		Hostname: s.name, Os: runtime.GOOS, Architecture: runtime.GOARCH, CpuMillis: 4000, MemoryBytes: 8 << 30, MaxPods: 110, Runtime: "hollow",
	}}
	if list, _ := s.held(); list != nil {
		r.List = list.Digest[:]
		for _, e := range podEntries(list) {
			p, err := runningPod(e)
			if err != nil {
				return err
			}
			r.Pods = append(r.Pods, p)
		}
	}
	b, err := account.Encode(r)
	if err != nil {
		return err
	}
	return s.conn.Publish(ctx, topic.Topic{Kind: topic.Reported, Edge: s.name}.String(), b)
}

// podEntries of a list; none of no list.
func podEntries(l *desired.List) []*longshorepb.Entry {
	if l == nil {
		return nil
	}
	var pods []*longshorepb.Entry
	for _, e := range l.Entries {
		if e.GetKind() == longshorepb.Kind_KIND_POD {
			pods = append(pods, e)
		}
	}
	return pods
}

func runningPod(e *longshorepb.Entry) (*longshorepb.PodReport, error) {
	status := corev1.PodStatus{Phase: corev1.PodRunning}
	for _, c := range []corev1.PodConditionType{corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled} {
		status.Conditions = append(status.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue})
	}
	b, err := status.Marshal()
	if err != nil {
		return nil, err
	}
	return &longshorepb.PodReport{Namespace: e.GetNamespace(), Name: e.GetName(), Uid: e.GetUid(), Digest: e.GetDigest(), Status: b}, nil
}

// herd is many hollow edges that run.
type herd struct {
	edges  []*hollow
	cancel context.CancelFunc
	group  *errgroup.Group
	ctx    context.Context //nolint:containedctx // the group's, for edges that join later
}

func newHerd(ctx context.Context) *herd {
	ctx, cancel := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	return &herd{cancel: cancel, group: g, ctx: ctx}
}

// join starts edges.
func (h *herd) join(edges []*hollow) {
	log := slog.New(slog.DiscardHandler)
	for _, e := range edges {
		h.group.Go(func() error { return e.run(h.ctx, log) })
	}
	h.edges = append(h.edges, edges...)
}

// stop ends the edges and waits for them.
func (h *herd) stop() error {
	h.cancel()
	return h.group.Wait()
}

// wait until every edge has agreed with the hub in its newest session since a time, holding so many pods.
func (h *herd) wait(ctx context.Context, since time.Time, pods int) error {
	return poll(ctx, 20*time.Millisecond, func() error {
		lacking := 0
		for _, e := range h.edges {
			at := e.synced()
			list, _ := e.held()
			if at.IsZero() || at.Before(since) || len(podEntries(list)) != pods {
				lacking++
			}
		}
		if lacking > 0 {
			return fmt.Errorf("%d of %d hollow edges are not in sync", lacking, len(h.edges))
		}
		return nil
	})
}
