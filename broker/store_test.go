package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
)

// disk is a Store that keeps what it is given in memory, refuses payloads that say "refuse" or, for ever, "never", and can be
// held.
type disk struct {
	mu   sync.Mutex
	kept []broker.Message
	gate chan struct{} // if not nil, every batch takes one token first
	now  int           // messages handed over at this moment
	// never are the versions of the clients whose messages can never be stored.
	never []byte
}

func (d *disk) store(ctx context.Context, batch []broker.Message) []error {
	d.mu.Lock()
	d.now = len(batch)
	gate := d.gate
	d.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now = 0
	verdicts := make([]error, len(batch))
	for i, m := range batch {
		if string(m.Payload) == "refuse" {
			verdicts[i] = errors.New("quota full")
			continue
		}
		if string(m.Payload) == "never" {
			verdicts[i] = fmt.Errorf("for version %d: %w", m.Version, broker.ErrUnstorable)
			d.never = append(d.never, m.Version)
			continue
		}
		d.kept = append(d.kept, m)
	}
	return verdicts
}

func (d *disk) payloads() (out []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.kept {
		out = append(out, string(m.Payload))
	}
	return out
}

func (d *disk) handed() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now
}

// G3: an acknowledgement must mean that the store has the message: a device forgets it from then on.
func TestAcknowledgedMeansStored(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for _, qos := range []byte{1, 2} {
			t.Run(fmt.Sprintf("v%d QoS %d", version, qos), func(t *testing.T) {
				d := &disk{gate: make(chan struct{})}
				_, addr := serve(t, broker.Config{Store: d.store})
				s := dial(t, addr, options{id: "s"})
				s.subscribe(1, "#")
				p := dial(t, addr, options{id: "p", version: version})
				if err := p.send("t", "m", qos, 1, false); err != nil {
					t.Fatal(err)
				}
				eventually(t, "message handed to the store", func() bool { return d.handed() == 1 })
				// A PINGRESP that comes alone shows that no acknowledgement went before it.
				if err := p.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}}); err != nil {
					t.Fatal(err)
				}
				if pk := p.next(packets.Pingresp, packets.Puback, packets.Pubrec); pk.FixedHeader.Type != packets.Pingresp {
					t.Fatalf("acknowledged with packet type %d before it was stored", pk.FixedHeader.Type)
				}
				d.gate <- struct{}{}
				want := map[byte]byte{1: packets.Puback, 2: packets.Pubrec}[qos]
				if pk := p.next(want); pk.PacketID != 1 {
					t.Errorf("acknowledged id %d", pk.PacketID)
				}
				if got := string(s.next(packets.Publish).Payload); got != "m" {
					t.Errorf("fanned out %q", got)
				}
			})
		}
	}
}

// G3: a message the store refused must not be acknowledged, and the connection must end, because an MQTT 3.1.1 device
// sends it again only on a new one.
func TestRefusedMessageIsNotAcknowledged(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for _, qos := range []byte{0, 1, 2} {
			t.Run(fmt.Sprintf("v%d QoS %d", version, qos), func(t *testing.T) {
				d := &disk{}
				b, addr := serve(t, broker.Config{Store: d.store})
				s := dial(t, addr, options{id: "s"})
				s.subscribe(1, "#")
				p := dial(t, addr, options{id: "p", version: version})
				if err := p.send("t", "refuse", qos, min(1, uint16(qos)), false); err != nil {
					t.Fatal(err)
				}
				<-p.done
				for pk := range p.in {
					if pk.FixedHeader.Type == packets.Puback || pk.FixedHeader.Type == packets.Pubrec {
						t.Error("acknowledged")
					}
				}
				if b.Stats().Refused != 1 {
					t.Errorf("refused %d, want 1", b.Stats().Refused)
				}
				dial(t, addr, options{id: "q"}).publish("t", "fine", 1, 1)
				if got := string(s.next(packets.Publish).Payload); got != "fine" {
					t.Errorf("fanned out %q", got)
				}
			})
		}
	}
}

// A message that can never be stored would close its device's connection again and again, as the device sends it anew each
// time, and nothing else of that device would come through.
func TestUnstorableMessageIsSentOnce(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for _, qos := range []byte{0, 1, 2} {
			t.Run(fmt.Sprintf("v%d QoS %d", version, qos), func(t *testing.T) {
				d := &disk{}
				b, addr := serve(t, broker.Config{Store: d.store, MaxPending: 2})
				s := dial(t, addr, options{id: "s"})
				s.subscribe(1, "#")
				p := dial(t, addr, options{id: "p", version: version})
				reason := map[byte]byte{4: 0, 5: packets.ErrQuotaExceeded.Code}[version]
				for id := range uint16(5) { // more than may wait: their places must be free again
					if err := p.send("t", "never", qos, min(id+1, uint16(qos)*10), false); err != nil {
						t.Fatal(err)
					}
					if qos == 0 {
						continue
					}
					ack := p.next(map[byte]byte{1: packets.Puback, 2: packets.Pubrec}[qos])
					if ack.PacketID != id+1 || ack.ReasonCode != reason {
						t.Fatalf("acknowledged id %d with reason %#x", ack.PacketID, ack.ReasonCode)
					}
				}
				p.publish("t", "fine", 1, 9)
				if got := string(s.next(packets.Publish).Payload); got != "fine" {
					t.Errorf("fanned out %q", got)
				}
				if got := d.payloads(); !slices.Equal(got, []string{"fine"}) || b.Stats().Refused != 5 || d.never[0] != version {
					t.Errorf("stored %q, %d refused of version %d", got, b.Stats().Refused, d.never[0])
				}
			})
		}
	}
}

// Acknowledgements out of order make an MQTT 3.1.1 device disconnect or resend; messages out of order reach the store
// with wrong values last.
func TestStoreAndAcknowledgeInOrder(t *testing.T) {
	d := &disk{}
	_, addr := serve(t, broker.Config{Store: d.store, MaxPending: 16})
	p := dial(t, addr, options{id: "p"})
	var want []string
	for n := range 1000 {
		want = append(want, fmt.Sprint(n))
		if err := p.send("t", want[n], 1, uint16(n+1), false); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 1000 {
		if pk := p.next(packets.Puback); int(pk.PacketID) != n+1 {
			t.Fatalf("acknowledgement %d is for id %d", n+1, pk.PacketID)
		}
	}
	if got := d.payloads(); !slices.Equal(got, want) {
		t.Error("stored in another order")
	}
}

// G4: a device that publishes faster than the disk takes it must be slowed down, not buffered without bound.
func TestPendingIsBounded(t *testing.T) {
	d := &disk{gate: make(chan struct{})}
	_, addr := serve(t, broker.Config{Store: d.store, MaxPending: 10})
	p := dial(t, addr, options{id: "p"})
	for n := range 100 {
		if err := p.send("t", "m", 1, uint16(n+1), false); err != nil {
			t.Fatal(err)
		}
	}
	total := 0
	for total < 100 {
		eventually(t, "a batch at the store", func() bool { return d.handed() > 0 })
		n := d.handed()
		if n > 10 {
			t.Fatalf("%d messages of one client wait, limit 10", n)
		}
		total += n
		d.gate <- struct{}{}
		eventually(t, "batch stored", func() bool { return len(d.payloads()) == total })
	}
}

// G3: a QoS 2 message repeated before its PUBREL, on the same connection or the next, must be stored once.
func TestQoS2IsStoredOnce(t *testing.T) {
	d := &disk{gate: make(chan struct{}, 100)}
	_, addr := serve(t, broker.Config{Store: d.store})
	o := options{id: "p", persist: true}
	p := dial(t, addr, o)
	repeat := func(p *client) {
		t.Helper()
		if err := p.send("t", "once", 2, 5, false); err != nil {
			t.Fatal(err)
		}
	}
	repeat(p)
	repeat(p) // while the first is being stored
	eventually(t, "message handed to the store", func() bool { return d.handed() == 1 })
	p.close()
	p = dial(t, addr, o)
	repeat(p) // still being stored
	d.gate <- struct{}{}
	p.next(packets.Pubrec)
	p.close()
	p = dial(t, addr, o)
	repeat(p) // stored, PUBREC perhaps lost
	p.next(packets.Pubrec)
	if err := p.ack(packets.Pubrel, 5); err != nil {
		t.Fatal(err)
	}
	p.next(packets.Pubcomp)
	if got := d.payloads(); !slices.Equal(got, []string{"once"}) {
		t.Errorf("stored %q", got)
	}
	d.gate <- struct{}{}
	p.publish("t", "next under the same id", 2, 5)
	if got := d.payloads(); len(got) != 2 {
		t.Errorf("stored %q", got)
	}
}

// A lost PUBREL or PUBCOMP must not stop the QoS 2 flow of an MQTT 5 device with an error code.
func TestQoS2ReasonCodes(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	p := dial(t, addr, options{id: "p", version: 5})
	if err := p.send("t", "m", 2, 9, false); err != nil {
		t.Fatal(err)
	}
	p.next(packets.Pubrec)
	for _, want := range []byte{0, packets.ErrPacketIdentifierNotFound.Code} {
		if err := p.ack(packets.Pubrel, 9); err != nil {
			t.Fatal(err)
		}
		if pk := p.next(packets.Pubcomp); pk.ReasonCode != want {
			t.Errorf("PUBCOMP with code %#x, want %#x", pk.ReasonCode, want)
		}
	}
}
