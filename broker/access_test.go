package broker_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
)

// own allows topics below own/ alone.
func own(name string) bool { return strings.HasPrefix(name, "own/") }

// G5: who has no valid credential must stay outside, and learn nothing but that.
func TestBadCredentialIsRefused(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	for _, version := range []byte{4, 5} {
		want := map[byte]string{4: "0x5", 5: "0x86"}[version]
		if _, err := tryDial(t, addr, options{id: "c", user: "evil", version: version}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("version %d: %v, want code %s", version, err, want)
		}
	}
	if b.Stats().Refused != 2 {
		t.Errorf("refused %d, want 2", b.Stats().Refused)
	}
}

// G5: a client must write only its own topics and read only its own.
func TestAccessIsJudged(t *testing.T) {
	b, addr := serve(t, broker.Config{Auth: door{access: access{publish: own, subscribe: own}}})
	all := func(version byte) *client { return dial(t, addr, options{id: "c", version: version}) }
	for _, version := range []byte{4, 5} {
		c := all(version)
		if codes := c.subscribe(1, "own/#", "#", "foreign", "$share/g/foreign", "$share/g/own/x"); codes[0] != 1 || codes[1] < 0x80 || codes[2] < 0x80 || codes[3] < 0x80 || codes[4] != 1 {
			t.Errorf("granted %v", codes)
		}
		for _, topic := range []string{"foreign", "$SYS/broker/version", "$share/g/own/x"} {
			if err := c.send(topic, "x", 0, 0, true); err != nil {
				t.Fatal(err)
			}
		}
		c.publish("own/x", "mine", 1, 1)
		if pk := c.next(packets.Publish); pk.TopicName != "own/x" {
			t.Errorf("received %q", pk.TopicName)
		}
		if err := c.send("foreign", "x", 1, 2, false); err != nil {
			t.Fatal(err)
		}
		if version == 5 {
			if pk := c.next(packets.Puback); pk.ReasonCode != packets.ErrNotAuthorized.Code {
				t.Errorf("PUBACK with code %#x", pk.ReasonCode)
			}
		} else {
			<-c.done // MQTT 3.1.1 has no other way to say it
		}
		c.close()
	}
	if b.Stats().Refused == 0 {
		t.Error("refusals are not counted")
	}
}

func withWill(topic, payload string, qos byte, retain bool) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload = true, topic, []byte(payload)
		pk.Connect.WillQos, pk.Connect.WillRetain = qos, retain
	}
}

// G5: a will is a message too: one outside the client's rights, or on the hub's own topics, must not get in.
func TestForeignWillIsRefused(t *testing.T) {
	_, addr := serve(t, broker.Config{Virtual: newOwner(t), Auth: door{access: access{publish: func(n string) bool {
		return own(n) || strings.HasPrefix(n, root)
	}}}})
	for _, version := range []byte{4, 5} {
		want := map[byte]string{4: "0x5", 5: "0x87"}[version]
		for _, topic := range []string{"foreign", "own/#", "$SYS/x", root + "nodes/e1/reported"} {
			_, err := tryDial(t, addr, options{id: "c", version: version, edit: withWill(topic, "w", 0, false)})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("version %d, will on %q: %v, want code %s", version, topic, err, want)
			}
		}
		dial(t, addr, options{id: "c", version: version, edit: withWill("own/w", "w", 0, false)}).disconnect()
	}
}

// G3: the last word of a device that broke must reach the store and the subscribers, and only if it did not take leave.
func TestWillGoesThroughTheStore(t *testing.T) {
	for _, version := range []byte{4, 5} {
		d := &disk{}
		_, addr := serve(t, broker.Config{Store: d.store})
		s := dial(t, addr, options{id: "s"})
		s.subscribe(1, "w/#")
		dial(t, addr, options{id: "polite", version: version, edit: withWill("w/polite", "gone", 1, false)}).disconnect()
		dial(t, addr, options{id: "broken", version: version, edit: withWill("w/broken", "gone", 1, true)}).close()
		if pk := s.next(packets.Publish); pk.TopicName != "w/broken" {
			t.Errorf("will on %q", pk.TopicName)
		}
		if got := d.payloads(); !slices.Equal(got, []string{"gone"}) {
			t.Errorf("stored %q", got)
		}
		late := dial(t, addr, options{id: "late"})
		late.subscribe(1, "w/#")
		if pk := late.next(packets.Publish); pk.TopicName != "w/broken" || !pk.FixedHeader.Retain {
			t.Errorf("retained will on %q, retain %v", pk.TopicName, pk.FixedHeader.Retain)
		}
		// An empty will clears a retained message; it is legal.
		dial(t, addr, options{id: "broken", version: version, edit: withWill("w/broken", "", 1, true)}).close()
		eventually(t, "empty will stored", func() bool { return slices.Equal(d.payloads(), []string{"gone", ""}) })
		last := dial(t, addr, options{id: "last"})
		last.publish("w/marker", "m", 1, 1) // fanned out after the will
		last.subscribe(1, "w/#")
		last.publish("w/marker", "m", 1, 1)
		if pk := last.next(packets.Publish); pk.TopicName != "w/marker" {
			t.Errorf("%q is still retained", pk.TopicName)
		}
	}
}

// An MQTT 5 device that is back within its will delay is not gone, and nobody should be told so.
func TestWillDelay(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	s := dial(t, addr, options{id: "s"})
	s.subscribe(1, "w/#")
	delayed := func(id string) options {
		return options{id: id, version: 5, persist: true, edit: func(pk *packets.Packet) {
			withWill("w/"+id, "gone", 1, false)(pk)
			pk.Connect.WillProperties.WillDelayInterval = 1
		}}
	}
	dial(t, addr, delayed("back")).close()
	back := dial(t, addr, delayed("back"))
	dial(t, addr, delayed("away")).close()
	if pk := s.next(packets.Publish); pk.TopicName != "w/away" {
		t.Errorf("will on %q", pk.TopicName)
	}
	back.disconnect()
}

// A device that asks to see its will although it takes leave must get that (MQTT 5 reason 0x04).
func TestDisconnectWithWill(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	s := dial(t, addr, options{id: "s"})
	s.subscribe(1, "w")
	c := dial(t, addr, options{id: "c", version: 5, edit: withWill("w", "gone", 1, false)})
	if err := c.write(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ReasonCode: packets.CodeDisconnectWillMessage.Code,
	}); err != nil {
		t.Fatal(err)
	}
	s.next(packets.Publish)
}

// Messages wait for a device as long as its sender wishes: by default for ever, and never past their expiry.
func TestMessageExpiry(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	c := dial(t, addr, options{id: "c", persist: true})
	c.subscribe(1, "t")
	c.disconnect()
	eventually(t, "client away", func() bool { return b.Stats().Connections == 0 })
	p := dial(t, addr, options{id: "p", version: 5})
	for n, expiry := range []uint32{1, 0} {
		pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1, Retain: true}, PacketID: 1, TopicName: "t"}
		pk.Payload = []byte{byte('0' + n)}
		pk.Properties.MessageExpiryInterval = expiry
		if err := p.write(pk); err != nil {
			t.Fatal(err)
		}
		p.next(packets.Puback)
	}
	deadline := time.Now().Unix() + 2
	eventually(t, "expiry passed", func() bool { return time.Now().Unix() >= deadline })
	c = dial(t, addr, options{id: "c", persist: true})
	if pk := c.next(packets.Publish); string(pk.Payload) != "1" {
		t.Errorf("received %q, want only the message that does not expire", pk.Payload)
	}
}
