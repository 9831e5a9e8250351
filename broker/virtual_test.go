package broker_test

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
)

const root = "longshore/v1/"

// owner notes what an owner of the virtual topics is told, in order, and answers each subscription from a goroutine.
type owner struct {
	mu     sync.Mutex
	events []string
	conns  map[string]*broker.Conn
	wg     sync.WaitGroup
}

func newOwner(t *testing.T) *owner {
	o := &owner{conns: map[string]*broker.Conn{}}
	t.Cleanup(o.wg.Wait)
	return o
}

func (o *owner) note(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events = append(o.events, fmt.Sprintf(format, args...))
}

func (o *owner) Connected(c *broker.Conn) {
	o.note("connected %s as %s", c.ClientID(), c.Identity().Name)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.conns[c.ClientID()] = c
}

func (o *owner) Disconnected(c *broker.Conn) {
	if err := c.Send("late", nil, false); err == nil {
		o.note("sent after the end")
	}
	o.note("disconnected %s", c.ClientID())
}

func (o *owner) Subscribed(c *broker.Conn, filters []string) {
	o.note("subscribed %s", strings.Join(filters, " "))
	o.wg.Go(func() {
		for _, f := range filters {
			_ = c.Send(f, []byte("answer"), true)
		}
	})
}

func (o *owner) Unsubscribed(_ *broker.Conn, filters []string) {
	o.note("unsubscribed %s", strings.Join(filters, " "))
}

func (o *owner) Received(_ *broker.Conn, topic string, payload []byte) {
	o.note("received %s on %s", payload, topic)
}

func (o *owner) told() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.events)
}

// The hub answers edges through virtual topics alone: without them no spec reaches an edge.
func TestVirtualTopics(t *testing.T) {
	for _, version := range []byte{4, 5} {
		o := newOwner(t)
		_, addr := serve(t, broker.Config{Virtual: o})
		c := dial(t, addr, options{id: "c", user: "e1", version: version, persist: true})
		name := root + "nodes/e1/index"
		if codes := c.subscribe(2, name, "ordinary"); !slices.Equal(codes, []byte{0, 2}) {
			t.Errorf("granted %v, want QoS 0 for the virtual topic", codes) // the SUBACK came before the answer, or next would have skipped it
		}
		if pk := c.next(packets.Publish); pk.TopicName != name || string(pk.Payload) != "answer" || !pk.FixedHeader.Retain {
			t.Errorf("got %q on %q", pk.Payload, pk.TopicName)
		}
		c.publish(root+"nodes/e1/hello", "hi", 1, 1)
		c.publish(root+"nodes/e1/reported", "rep", 2, 2)
		if err := c.write(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1}, PacketID: 9,
			Filters: packets.Subscriptions{{Filter: name}},
		}); err != nil {
			t.Fatal(err)
		}
		c.next(packets.Unsuback)
		c.disconnect()
		want := []string{
			"connected c as e1", "subscribed " + name, "received hi on " + root + "nodes/e1/hello",
			"received rep on " + root + "nodes/e1/reported", "unsubscribed " + name, "disconnected c",
		}
		eventually(t, "the owner is told of the end", func() bool { return len(o.told()) >= len(want) })
		if got := o.told(); !slices.Equal(got, want) {
			t.Errorf("told\n%q, want\n%q", got, want)
		}
		// The persistent session keeps ordinary subscriptions only.
		if c := dial(t, addr, options{id: "c", user: "e1", version: version, persist: true}); !c.present {
			t.Error("session lost")
		}
	}
}

// G5: what one edge reports must reach no other client, whatever that subscribes to, and must not be retained.
func TestVirtualMessagesReachOnlyTheOwner(t *testing.T) {
	o := newOwner(t)
	b, addr := serve(t, broker.Config{Virtual: o})
	spy := dial(t, addr, options{id: "spy"})
	spy.subscribe(1, "#", "longshore/#", "longshore/+/nodes/#", "+/v1/nodes/e1/telemetry")
	e1 := dial(t, addr, options{id: "e1"})
	for qos := range byte(3) {
		pk := packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos, Retain: true}, PacketID: uint16(min(qos, 1)),
			TopicName: root + "nodes/e1/telemetry", Payload: []byte("private"),
		}
		if err := e1.write(pk); err != nil {
			t.Fatal(err)
		}
	}
	e1.publish("open", "marker", 1, 9)
	if pk := spy.next(packets.Publish); pk.TopicName != "open" {
		t.Errorf("the spy received %q", pk.TopicName)
	}
	spy.subscribe(0, "longshore/#")
	e1.publish("open", "marker", 1, 9)
	if pk := spy.next(packets.Publish); pk.TopicName != "open" {
		t.Errorf("retained for the spy: %q", pk.TopicName)
	}
	if err := b.Publish(t.Context(), root+"nodes/e1/index", nil, 0, true); err == nil {
		t.Error("Publish to a virtual topic succeeded")
	}
}

// G5: neither wildcards nor shared subscriptions may reach over the topics of other edges.
func TestVirtualFilters(t *testing.T) {
	o := newOwner(t)
	_, addr := serve(t, broker.Config{Virtual: o})
	c := dial(t, addr, options{id: "c"})
	for filter, allowed := range map[string]bool{
		root + "nodes/e1/index":                  true,
		root + "nodes/e1/plain/#":                true,
		root + "nodes/e1/plain/models/+":         true,
		root + "#":                               false,
		root + "nodes/#":                         false,
		root + "nodes/+/plain/#":                 false,
		root + "nodes/e1/#":                      false,
		root + "nodes/e1/objects/+":              false,
		root + "nodes/plain/#":                   false,
		root + "models/+":                        false,
		"$share/g/" + root + "nodes/e1/index":    false,
		"$SHARE/g/" + root + "nodes/e1/plain/#":  false,
		"$share/g/$share/h/" + root + "nodes/e1": false,
		"$share/g/ordinary":                      true,
		"$SYS/#":                                 false,
		"$SYS/broker/version":                    false,
		strings.Repeat("a/", 100) + "a":          false,
		strings.Repeat("a", 2000):                false,
		"a/b#":                                   false,
		"a/+b":                                   false,
		"a/#/b":                                  false,
	} {
		if code := c.subscribe(0, filter)[0]; (code <= 2) != allowed {
			t.Errorf("subscribe %.80q: code %#x, want allowed %v", filter, code, allowed)
		}
	}
}

// G4: a hub that sends to an edge which takes nothing must be held back there, not fill its memory.
func TestSendIsHeldBack(t *testing.T) {
	o := newOwner(t)
	b, addr := serve(t, broker.Config{Virtual: o, StallTimeout: 300 * time.Millisecond})
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.(*net.TCPConn).SetReadBuffer(4096)
	mute := &client{t: t, conn: conn, version: 4}
	if err := mute.write(options{id: "mute"}.packet()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "connected", func() bool { return len(o.told()) > 0 })
	o.mu.Lock()
	c := o.conns["mute"]
	o.mu.Unlock()
	const total = 64 << 20
	sent := 0
	for ; sent < total; sent += 16 << 10 {
		if err := c.Send("t", make([]byte, 16<<10), false); err != nil {
			break
		}
	}
	if sent >= 8<<20 {
		t.Errorf("%d bytes sent to a peer that read none", sent)
	}
	eventually(t, "connection ended", func() bool { return b.Stats().Connections == 0 })
	<-c.Done()
}
