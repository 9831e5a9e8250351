package broker_test

import (
	"fmt"
	"strconv"
	"sync"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
)

// ledger notes which numbered messages arrived.
type ledger struct {
	mu   sync.Mutex
	seen map[int]int
}

func newLedger() *ledger { return &ledger{seen: map[int]int{}} }

func (l *ledger) note(pk packets.Packet) {
	n, err := strconv.Atoi(string(pk.Payload))
	if err != nil {
		panic(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen[n]++
}

func (l *ledger) missing(total int) (lost []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n := range total {
		if l.seen[n] == 0 {
			lost = append(lost, n)
		}
	}
	return lost
}

// flow publishes numbered QoS 1 messages, each after the PUBACK of the one before, until stop is closed, and returns
// how many were acknowledged.
func flow(p *client, topic string, stop <-chan struct{}) int {
	for n := 0; ; n++ {
		select {
		case <-stop:
			return n
		default:
			p.publish(topic, strconv.Itoa(n), 1, uint16(n%60_000+1))
		}
	}
}

// G3: a device with a fixed id and a persistent session that reconnects all the time, or two devices that were given
// one id by mistake, must lose no message whose sender saw it acknowledged.
func TestPersistentSessionSurvives200Takeovers(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for _, how := range []string{"takeover", "close first"} {
			t.Run(fmt.Sprintf("v%d %s", version, how), func(t *testing.T) {
				b, addr := serve(t, broker.Config{})
				got := newLedger()
				roam := options{id: "roam", version: version, persist: true, keepalive: 60, onMsg: got.note}
				c := dial(t, addr, roam)
				c.subscribe(1, "z")
				p := dial(t, addr, options{id: "p"})
				stop, total := make(chan struct{}), make(chan int, 1)
				go func() { total <- flow(p, "z", stop) }()
				for i := range 200 {
					if how == "close first" {
						c.close()
					}
					c = dial(t, addr, roam)
					if !c.present {
						t.Fatalf("connect %d: the session was gone", i)
					}
				}
				close(stop)
				sent := <-total
				eventually(t, "all acknowledged messages delivered", func() bool { return len(got.missing(sent)) == 0 })
				if d := b.Stats().Dropped; d != 0 {
					t.Errorf("%d messages dropped", d)
				}
				t.Logf("%d messages over 200 reconnects", sent)
			})
		}
	}
}

// A device whose id is used twice must never be connected and deaf: it would look healthy and get no command.
func TestCleanTakeoverIsNeverDeaf(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	for i := range 200 {
		c := dial(t, addr, options{id: "dup"}) // the client before it still is connected
		if c.present {
			t.Fatalf("takeover %d: a clean session claims to continue an old one", i)
		}
		c.subscribe(1, "zz")
		if err := b.Publish(t.Context(), "zz", []byte("hello"), 1, false); err != nil {
			t.Fatal(err)
		}
		c.next(packets.Publish)
	}
}

// Two clients that fight for one id at the same time must both be served in turn, and the broker must be left whole.
func TestConcurrentTakeovers(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	got := newLedger()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25 {
				c, err := tryDial(t, addr, options{id: "fight", persist: true, onMsg: got.note})
				if err != nil {
					continue // a newer one came before the CONNACK
				}
				_ = c.write(packets.Packet{
					FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
					Filters: packets.Subscriptions{{Filter: "f", Qos: 1}},
				})
			}
		})
	}
	wg.Wait()
	last := dial(t, addr, options{id: "fight", persist: true, onMsg: got.note})
	last.subscribe(1, "f")
	for n := range 10 {
		if err := b.Publish(t.Context(), "f", []byte(strconv.Itoa(n)), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "messages delivered to the last one standing", func() bool { return len(got.missing(10)) == 0 })
	eventually(t, "one connection left", func() bool { return b.Stats().Connections == 1 })
}

// An MQTT 5 device that was pushed off its id must be told why, or it comes back at once and pushes the other off.
func TestTakeoverIsExplained(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	first := dial(t, addr, options{id: "x", version: 5})
	dial(t, addr, options{id: "x", version: 5})
	if pk := first.next(packets.Disconnect); pk.ReasonCode != packets.ErrSessionTakenOver.Code {
		t.Errorf("reason %#x, want session taken over", pk.ReasonCode)
	}
}

// G5: a device must not take over, or read the queue of, another identity's session by guessing its client id.
func TestSessionsBelongToTheirIdentity(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	alice := dial(t, addr, options{id: "same", user: "alice", persist: true})
	alice.subscribe(1, "secret")
	mallory := dial(t, addr, options{id: "same", user: "mallory", persist: true})
	if mallory.present {
		t.Error("mallory continues alice's session")
	}
	if err := b.Publish(t.Context(), "secret", []byte("s"), 1, false); err != nil {
		t.Fatal(err)
	}
	alice.next(packets.Publish) // still connected, still subscribed
	mallory.subscribe(1, "mine")
	if err := b.Publish(t.Context(), "mine", []byte("m"), 1, false); err != nil {
		t.Fatal(err)
	}
	if pk := mallory.next(packets.Publish); pk.TopicName != "mine" {
		t.Errorf("mallory received %q", pk.TopicName)
	}
}

// A resumed session must not keep subscriptions that the identity has lost in the meantime.
func TestResumedSubscriptionsAreJudgedAgain(t *testing.T) {
	var mu sync.Mutex
	allowed := true
	auth := door{access: access{subscribe: func(string) bool { mu.Lock(); defer mu.Unlock(); return allowed }}}
	b, addr := serve(t, broker.Config{Auth: auth})
	c := dial(t, addr, options{id: "c", persist: true})
	c.subscribe(1, "was/allowed")
	c.disconnect()
	mu.Lock()
	allowed = false
	mu.Unlock()
	c = dial(t, addr, options{id: "c", persist: true})
	mu.Lock()
	allowed = true
	mu.Unlock()
	c.subscribe(1, "marker")
	for _, topic := range []string{"was/allowed", "marker"} {
		if err := b.Publish(t.Context(), topic, []byte("x"), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	if pk := c.next(packets.Publish); pk.TopicName != "marker" {
		t.Errorf("received %q, which is no longer allowed", pk.TopicName)
	}
}

// G3: both directions number their packets on their own. A device that publishes with the id of a message it has not
// acknowledged yet must still get that message again.
func TestPacketIdentifiersOfBothDirectionsAreApart(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	c := dial(t, addr, options{id: "c", persist: true, silent: true})
	c.subscribe(1, "down")
	if err := b.Publish(t.Context(), "down", []byte("precious"), 1, false); err != nil {
		t.Fatal(err)
	}
	id := c.next(packets.Publish).PacketID
	c.publish("up", "x", 1, id)
	if code := c.subscribeWithID(id, "other"); code != 0 {
		t.Errorf("SUBSCRIBE with the id of an arriving message was refused with %#x", code)
	}
	c.close()
	c = dial(t, addr, options{id: "c", persist: true})
	pk := c.next(packets.Publish)
	if string(pk.Payload) != "precious" || !pk.FixedHeader.Dup || pk.PacketID != id {
		t.Errorf("got %q dup %v id %d, want the unacknowledged message again under id %d", pk.Payload, pk.FixedHeader.Dup, pk.PacketID, id)
	}
}

// What was in flight must come again in its first order, or a device applies an old command after a new one.
func TestResendKeepsOrder(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	for _, qos := range []byte{1, 2} {
		id := fmt.Sprintf("c%d", qos)
		c := dial(t, addr, options{id: id, persist: true, silent: true})
		c.subscribe(qos, "o")
		for n := range 200 {
			if err := b.Publish(t.Context(), "o", []byte(strconv.Itoa(n)), qos, false); err != nil {
				t.Fatal(err)
			}
		}
		c.next(packets.Publish)
		c.close()
		c = dial(t, addr, options{id: id, persist: true})
		for n := range 200 {
			if pk := c.next(packets.Publish); string(pk.Payload) != strconv.Itoa(n) {
				t.Fatalf("QoS %d: message %d is %q", qos, n, pk.Payload)
			}
		}
		c.disconnect()
	}
}
