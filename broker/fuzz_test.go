package broker_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/sync/topic"
)

// pipes is a listener whose connections are made by the test: a real broker without the cost of real ports.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	ended atomic.Bool
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	if p.ended.CompareAndSwap(false, true) {
		close(p.done)
	}
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

func (p *pipes) dial(t testing.TB) net.Conn {
	t.Helper()
	near, far := net.Pipe()
	select {
	case p.conns <- far:
	case <-time.After(patience):
		t.Fatal("the broker takes no connections any more")
	}
	return near
}

// encoded is a packet as it goes over the wire.
func encoded(t testing.TB, pk packets.Packet) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	out := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(far)
		out <- b
	}()
	c := &client{t: t, conn: near, version: max(pk.ProtocolVersion, 4)}
	if err := c.write(pk); err != nil {
		t.Fatal(err)
	}
	near.Close()
	return <-out
}

// suspicious is everything behind a broker: it notes what must never come there.
type suspicious struct {
	found    atomic.Pointer[string]
	admitted atomic.Bool // the neighbour
}

// Authenticate lets everybody in, the neighbour once.
func (s *suspicious) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	if l.Username == "neighbour" && s.admitted.Swap(true) {
		return broker.Identity{}, errors.New("somebody poses as the neighbour")
	}
	return broker.Identity{Name: l.Username, Access: access{
		publish:   func(name string) bool { return name != forbidden && name != "neighbour" },
		subscribe: func(filter string) bool { return filter != forbidden },
	}}, nil
}

// forbidden is a topic of the hub's own that nobody may use.
const forbidden = topic.Root + "forbidden"

func (s *suspicious) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.found.Store(&text)
}

func (s *suspicious) store(_ context.Context, batch []broker.Message) []error {
	for _, m := range batch {
		if topic.ValidName(m.Topic) != nil || m.Topic[0] == '$' || m.Topic == "neighbour" || strings.HasPrefix(m.Topic, topic.Root) {
			s.note("a message on topic %q was stored", m.Topic)
		}
	}
	return make([]error, len(batch))
}

func (s *suspicious) Connected(*broker.Conn)              {}
func (s *suspicious) Disconnected(*broker.Conn)           {}
func (s *suspicious) Unsubscribed(*broker.Conn, []string) {}

func (s *suspicious) Subscribed(_ *broker.Conn, filters []string) {
	for _, f := range filters {
		if topic.ValidFilter(f) != nil || !strings.HasPrefix(f, topic.Root) || f == forbidden {
			s.note("filter %q was granted", f)
		}
	}
}

func (s *suspicious) Received(_ *broker.Conn, name string, _ []byte) {
	if topic.ValidName(name) != nil || !strings.HasPrefix(name, topic.Root) || name == forbidden {
		s.note("a message on topic %q was let through", name)
	}
}

// FuzzBroker: whatever a client sends before and after its CONNECT, the broker lives, its other clients notice nothing, and
// nothing of the connection is left when it has ended.
func FuzzBroker(f *testing.F) {
	subscribe := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
		Filters: packets.Subscriptions{{Filter: "a/#", Qos: 2}, {Filter: "$share/g/a/+", Qos: 1}, {Filter: topic.Root + "x"}}}
	unsubscribe := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1}, PacketID: 2, Filters: packets.Subscriptions{{Filter: "a/#"}}}
	publish := func(name string, qos byte, id uint16, retain bool) packets.Packet {
		return packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos, Retain: retain}, TopicName: name, PacketID: id, Payload: []byte("x")}
	}
	bare := func(kind byte, id uint16) packets.Packet {
		pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id}
		if kind == packets.Pubrel {
			pk.FixedHeader.Qos = 1
		}
		return pk
	}
	for _, version := range []byte{4, 5} {
		join := func(pks ...packets.Packet) (out []byte) {
			for _, pk := range pks {
				pk.ProtocolVersion = version
				out = append(out, encoded(f, pk)...)
			}
			return out
		}
		f.Add(false, version == 5, join(options{version: version, id: "c", user: "u", persist: true}.packet(), subscribe, publish("a/b", 1, 3, true), bare(packets.Pingreq, 0)))
		f.Add(false, version == 5, join(options{version: version, id: "w", edit: func(pk *packets.Packet) {
			pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload, pk.Connect.WillQos = true, "a/will", []byte("gone"), 1
		}}.packet()))
		f.Add(true, version == 5, join(subscribe, publish("a/b", 2, 7, false), bare(packets.Pubrel, 7), publish("a/b", 2, 7, false), unsubscribe))
		f.Add(true, version == 5, join(publish(topic.Root+"x", 1, 9, false), publish(forbidden, 0, 0, false), bare(packets.Disconnect, 0)))
		f.Add(true, version == 5, join(bare(packets.Puback, 1), bare(packets.Pubrec, 2), bare(packets.Pubcomp, 3)))
	}
	f.Add(true, false, []byte{0x30, 0x00})
	f.Add(true, true, []byte{0x30, 6, 0, 0, 3, 0x23, 0, 1}) // a topic alias in place of a topic
	f.Add(true, false, []byte{0x82, 0xff, 0xff, 0xff, 0x7f})
	f.Add(true, true, []byte{0xf0, 0x02, 0x18, 0x00})

	doors := newPipes()
	s := &suspicious{}
	b, _ := serve(f, broker.Config{
		Listeners: []broker.Listener{{Name: "pipe", Net: doors}}, Auth: s, Store: s.store, Virtual: s,
		MaxPacket: 64 << 10, HandshakeTimeout: time.Minute, MaxQueued: 64,
	})
	neighbour, err := start(f, doors.dial(f), options{id: "neighbour", user: "neighbour"})
	if err != nil {
		f.Fatal(err)
	}
	neighbour.subscribe(1, "neighbour")
	marks := 0
	f.Fuzz(func(t *testing.T, connected, v5 bool, sent []byte) {
		neighbour.t = t
		c := doors.dial(t)
		_ = c.SetDeadline(time.Now().Add(patience))
		r := bufio.NewReader(c)
		if connected {
			version := byte(4)
			if v5 {
				version = 5
			}
			if _, err := c.Write(encoded(t, options{version: version, id: "hostile", user: "hostile"}.packet())); err != nil {
				t.Fatal(err)
			}
			head, err := r.ReadByte()
			if err != nil || head>>4 != packets.Connack {
				t.Fatalf("an honest CONNECT is answered with %#x, %v", head, err)
			}
		}
		answered := make(chan int64, 1)
		go func() {
			n, _ := io.Copy(io.Discard, r)
			answered <- n
		}()
		_, err := c.Write(sent)
		if err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Fatalf("the broker neither reads nor hangs up: %v", err)
		}
		marks++
		mark := string(rune('a' + marks%26))
		if err := b.Publish(t.Context(), "neighbour", []byte(mark), 1, false); err != nil {
			t.Fatal(err)
		}
		if got := neighbour.next(packets.Publish); string(got.Payload) != mark {
			t.Fatalf("the neighbour got %q, want %q", got.Payload, mark)
		}
		_ = c.Close()
		if n := <-answered; n > 1<<20 {
			t.Fatalf("%d bytes were answered to %d", n, len(sent))
		}
		for limit := time.Now().Add(patience); b.Stats().Connections != 1; <-time.After(100 * time.Microsecond) {
			if time.Now().After(limit) {
				t.Fatalf("%d connections are left", b.Stats().Connections)
			}
		}
		if found := s.found.Swap(nil); found != nil {
			t.Fatal(*found)
		}
	})
}
