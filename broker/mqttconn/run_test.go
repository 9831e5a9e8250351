package mqttconn_test

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/broker/mqttconn"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// TestMain: the edge dials for years; a goroutine left behind between dials fills a small box.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type everything struct{}

func (everything) Publish(string) bool     { return true }
func (everything) Subscribe(f string) bool { return f != "forbidden" }

type anybody struct{}

func (anybody) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	return broker.Identity{Name: l.Username, Access: everything{}}, nil
}

// hub runs a broker until the returned function is called, or the test ends.
func hub(t *testing.T, cfg broker.Config) (*broker.Broker, net.Addr, func()) {
	t.Helper()
	if cfg.Auth == nil {
		cfg.Auth = anybody{}
	}
	if cfg.Listeners == nil {
		cfg.Listeners = []broker.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}
	}
	b, err := broker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := b.Run(ctx); err != nil {
			t.Errorf("broker: %v", err)
		}
	}()
	stop := func() { cancel(); <-ended }
	t.Cleanup(stop)
	return b, b.Addr("tcp"), stop
}

// connect runs a connection until the test ends.
func connect(t *testing.T, cfg mqttconn.Config, serve func(context.Context, *mqttconn.Session) error, onState func(mqttconn.State)) {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- mqttconn.Run(ctx, cfg, serve, onState) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run did not end")
		}
	})
}

func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("not within %v: %s", patience, what)
		panic("unreachable")
	}
}

// An edge whose messages go astray has no link at all.
func TestPublishAndReceive(t *testing.T) {
	_, addr, _ := hub(t, broker.Config{})
	got := make(chan mqttconn.Message, 1)
	connect(t, mqttconn.Config{URL: "tcp://" + addr.String(), Username: "e1"}, func(ctx context.Context, s *mqttconn.Session) error {
		if err := s.Subscribe(ctx, "a/b", "c"); err != nil {
			t.Error(err)
		}
		if err := s.Publish(ctx, "a/b", []byte("hello")); err != nil {
			t.Error(err)
		}
		got <- <-s.Messages()
		<-ctx.Done()
		return nil
	}, nil)
	if m := receive(t, got, "message"); m.Topic != "a/b" || string(m.Payload) != "hello" {
		t.Errorf("got %q on %q", m.Payload, m.Topic)
	}
}
