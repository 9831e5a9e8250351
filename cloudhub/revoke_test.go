package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/cloudhub/internal/enrol"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

// journal is a log that a test reads while a hub writes it.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) count(text string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Count(j.text.String(), text)
}

// serving runs a hub in this process until the test ends.
func serving(t *testing.T, manifests string) (*hub, *journal) {
	t.Helper()
	dir := t.TempDir()
	cfg := testConfig(dir)
	if err := os.MkdirAll(cfg.Manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.Manifests, "edges.yaml"), []byte(manifests), 0o600); err != nil {
		t.Fatal(err)
	}
	j := &journal{}
	h, err := newHub(cfg, slog.New(slog.NewTextHandler(io.MultiWriter(j, t.Output()), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		h.close()
	})
	until(t, "the hub is ready", func() bool { return h.mirror.Ready() == nil })
	return h, j
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func newToken(t *testing.T, h *hub, edge string, replace bool) (token string) {
	t.Helper()
	token, err := enrol.Enroll(h.cfg.TokenFile, edge, replace)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// device keeps connecting with a token until the test ends. As an edge it opens a session, otherwise it reads plain JSON.
func device(t *testing.T, h *hub, edge, token string, hello bool) (link func() mqttconn.State) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var state mqttconn.State
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = mqttconn.Run(ctx, mqttconn.Config{
			Logger: slog.New(slog.DiscardHandler), URL: "tcp://" + h.broker.Addr("mqtt").String(), Username: edge,
			Password: func() string { return token }, ClientIDPrefix: edge + "-", RetryMin: 10 * time.Millisecond, RetryMax: 100 * time.Millisecond,
		}, func(ctx context.Context, s *mqttconn.Session) error {
			if !hello {
				return hold(ctx, s, s.Subscribe(ctx, topic.Root+"nodes/"+edge+"/plain/#"))
			}
			m, err := proto.Marshal(&longshorepb.Hello{Wire: longshorepb.Wire, Nonce: make([]byte, 16), Session: 1, Instance: make([]byte, 16)})
			if err != nil {
				return err
			}
			return hold(ctx, s, s.Publish(ctx, topic.Topic{Kind: topic.Hello, Edge: edge}.String(), m))
		}, func(s mqttconn.State) { mu.Lock(); state = s; mu.Unlock() })
	}()
	t.Cleanup(func() { cancel(); <-done })
	link = func() mqttconn.State { mu.Lock(); defer mu.Unlock(); return state }
	until(t, edge+" is connected", func() bool { return link().Connected })
	return link
}

// hold takes messages until the connection ends.
func hold(ctx context.Context, s *mqttconn.Session, err error) error {
	for err == nil {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-s.Messages():
			if !ok {
				return nil
			}
		}
	}
	return err
}

// G5: without it, whoever took a box or copied its credential would go on getting new pods and Secrets over the connection it
// has, after its credential was revoked.
func TestG5RevokingACredentialEndsItsConnections(t *testing.T) {
	h, _ := serving(t, twoEdges+"---\napiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: box-3}\n")
	edge := device(t, h, "box-1", newToken(t, h, "box-1", false), true)
	plain := device(t, h, "box-2", newToken(t, h, "box-2", false), false)
	stays := device(t, h, "box-3", newToken(t, h, "box-3", false), true)
	until(t, "sessions are open", func() bool { return h.mirror.Stats().Sessions == 2 })
	since := stays().Since

	newToken(t, h, "box-1", true)
	until(t, "the edge with the replaced credential is out", func() bool { return !edge().Connected })
	content, err := os.ReadFile(h.cfg.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	var kept []string
	for line := range strings.Lines(string(content)) {
		if !strings.HasPrefix(line, "box-2 ") {
			kept = append(kept, line)
		}
	}
	if err := os.WriteFile(h.cfg.TokenFile, []byte(strings.Join(kept, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "the device whose line is gone is out", func() bool { return !plain().Connected })
	until(t, "one connection is left", func() bool { return h.mirror.Stats().Connections == 1 })
	if s := stays(); !s.Connected || !s.Since.Equal(since) {
		t.Errorf("the edge that stays enrolled: %+v, was connected since %v", s, since)
	}
}
