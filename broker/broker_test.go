package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/broker"
)

// TestMain: a goroutine left behind is memory lost with every connection of a hub that runs for months.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// access allows what its functions allow; nil functions allow everything.
type access struct{ publish, subscribe func(string) bool }

func (a access) Publish(name string) bool     { return a.publish == nil || a.publish(name) }
func (a access) Subscribe(filter string) bool { return a.subscribe == nil || a.subscribe(filter) }

// door lets everybody in under the user name presented, but "evil".
type door struct{ access broker.Access }

func (d door) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	if l.Username == "evil" {
		return broker.Identity{}, errors.New("evil")
	}
	a := d.access
	if a == nil {
		a = access{}
	}
	return broker.Identity{Name: l.Username, Access: a}, nil
}

// serve runs a broker for the test and returns it with the address of its TCP listener.
func serve(t testing.TB, cfg broker.Config) (*broker.Broker, net.Addr) {
	t.Helper()
	if cfg.Auth == nil {
		cfg.Auth = door{}
	}
	if cfg.Listeners == nil {
		cfg.Listeners = []broker.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	b, err := broker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
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
	return b, b.Addr(cfg.Listeners[0].Name)
}

// eventually polls until ok says true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); !ok(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// Without it no device could talk to another at all.
func TestPublishSubscribe(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	for _, version := range []byte{4, 5} {
		for qos := range byte(3) {
			s := dial(t, addr, options{id: "s", version: version})
			if codes := s.subscribe(qos, "a/+/c"); codes[0] != qos {
				t.Fatalf("granted %v, want QoS %d", codes, qos)
			}
			p := dial(t, addr, options{id: "p", version: version})
			p.publish("a/b/c", "hello", qos, 7)
			m := s.next(packets.Publish)
			if string(m.Payload) != "hello" || m.TopicName != "a/b/c" || m.FixedHeader.Qos != qos {
				t.Errorf("version %d QoS %d: got %q on %q with QoS %d", version, qos, m.Payload, m.TopicName, m.FixedHeader.Qos)
			}
			s.disconnect()
			p.disconnect()
		}
	}
}

// A user whose port is taken must learn what to do about it.
func TestTakenPort(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	_, err := broker.New(broker.Config{Auth: door{}, Listeners: []broker.Listener{{Name: "mqtt", Address: addr.String()}}})
	if err == nil || !strings.Contains(err.Error(), addr.String()) || !strings.Contains(err.Error(), "stop it") {
		t.Errorf("error does not say what to do: %v", err)
	}
}
