package broker_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// patience is how long a test waits for what must come; nothing is asserted about how long it takes.
const patience = 20 * time.Second

// client is a bare MQTT client: it does what a test tells it and nothing else, so that it can misbehave.
type client struct {
	t       testing.TB
	conn    net.Conn
	version byte
	present bool
	connack packets.Packet

	wmu     sync.Mutex
	backlog []*packets.Packet // taken from in and not asked for yet
	auto    bool              // acknowledge PUBLISH and PUBREL
	onMsg   func(packets.Packet)
	in      chan *packets.Packet // what was not handled
	done    chan struct{}
	readErr error
}

// options of a CONNECT.
type options struct {
	id, user  string
	version   byte // 4 unless set
	persist   bool
	keepalive uint16
	edit      func(*packets.Packet)
	onMsg     func(packets.Packet)
	silent    bool // acknowledge nothing
}

func (o options) packet() packets.Packet {
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, ProtocolVersion: o.version}
	if o.version == 0 {
		pk.ProtocolVersion = 4
	}
	pk.Connect.ProtocolName = []byte("MQTT")
	pk.Connect.ClientIdentifier = o.id
	pk.Connect.Keepalive = o.keepalive
	pk.Connect.Clean = !o.persist
	if o.user != "" {
		pk.Connect.UsernameFlag, pk.Connect.Username = true, []byte(o.user)
		pk.Connect.PasswordFlag, pk.Connect.Password = true, []byte("secret")
	}
	if o.persist && pk.ProtocolVersion == 5 {
		pk.Properties.SessionExpiryIntervalFlag, pk.Properties.SessionExpiryInterval = true, 3600
	}
	if o.edit != nil {
		o.edit(&pk)
	}
	return pk
}

// dial connects over TCP and fails the test if it is refused.
func dial(t testing.TB, addr net.Addr, o options) *client {
	t.Helper()
	c, err := tryDial(t, addr, o)
	if err != nil {
		t.Fatalf("connect %q: %v", o.id, err)
	}
	return c
}

func tryDial(t testing.TB, addr net.Addr, o options) (*client, error) {
	conn, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		return nil, err
	}
	return start(t, conn, o)
}

// start speaks MQTT on conn, which it owns from then on.
func start(t testing.TB, conn net.Conn, o options) (*client, error) {
	c := &client{
		t: t, conn: conn, version: o.packet().ProtocolVersion, auto: !o.silent, onMsg: o.onMsg,
		in: make(chan *packets.Packet, 8192), done: make(chan struct{}),
	}
	r := bufio.NewReader(conn)
	if err := c.write(o.packet()); err != nil {
		conn.Close()
		return nil, err
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	pk, err := c.read(r)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("read CONNACK: %w", err)
	}
	if pk.FixedHeader.Type != packets.Connack || pk.ReasonCode != 0 {
		conn.Close()
		return nil, fmt.Errorf("refused with code %#x", pk.ReasonCode)
	}
	_ = conn.SetReadDeadline(time.Time{})
	c.connack, c.present = pk, pk.SessionPresent
	go c.loop(r)
	t.Cleanup(c.close)
	return c, nil
}

func (c *client) close() {
	_ = c.conn.Close()
	<-c.done
}

func (c *client) disconnect() {
	_ = c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
	c.close()
}

func (c *client) write(pk packets.Packet) error {
	pk.ProtocolVersion = c.version
	pk.Mods.AllowResponseInfo = true
	encode := map[byte]func(*packets.Packet, *bytes.Buffer) error{
		packets.Connect: (*packets.Packet).ConnectEncode, packets.Publish: (*packets.Packet).PublishEncode,
		packets.Puback: (*packets.Packet).PubackEncode, packets.Pubrec: (*packets.Packet).PubrecEncode,
		packets.Pubrel: (*packets.Packet).PubrelEncode, packets.Pubcomp: (*packets.Packet).PubcompEncode,
		packets.Subscribe: (*packets.Packet).SubscribeEncode, packets.Unsubscribe: (*packets.Packet).UnsubscribeEncode,
		packets.Pingreq: (*packets.Packet).PingreqEncode, packets.Disconnect: (*packets.Packet).DisconnectEncode,
	}[pk.FixedHeader.Type]
	var buf bytes.Buffer
	if err := encode(&pk, &buf); err != nil {
		return err
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_, err := c.conn.Write(buf.Bytes())
	return err
}

func (c *client) read(r *bufio.Reader) (pk packets.Packet, err error) {
	b, err := r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(b); err != nil {
		return pk, err
	}
	n, _, err := packets.DecodeLength(r)
	if err != nil {
		return pk, err
	}
	pk.FixedHeader.Remaining = n
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return pk, err
	}
	pk.ProtocolVersion = c.version
	decode := map[byte]func(*packets.Packet, []byte) error{
		packets.Connack: (*packets.Packet).ConnackDecode, packets.Publish: (*packets.Packet).PublishDecode,
		packets.Puback: (*packets.Packet).PubackDecode, packets.Pubrec: (*packets.Packet).PubrecDecode,
		packets.Pubrel: (*packets.Packet).PubrelDecode, packets.Pubcomp: (*packets.Packet).PubcompDecode,
		packets.Suback: (*packets.Packet).SubackDecode, packets.Unsuback: (*packets.Packet).UnsubackDecode,
		packets.Disconnect: (*packets.Packet).DisconnectDecode,
		packets.Pingresp:   func(*packets.Packet, []byte) error { return nil },
	}[pk.FixedHeader.Type]
	if decode == nil {
		return pk, fmt.Errorf("packet of type %d from a server", pk.FixedHeader.Type)
	}
	err = decode(&pk, body)
	return pk, err
}

func (c *client) loop(r *bufio.Reader) {
	defer close(c.done)
	defer close(c.in)
	for {
		pk, err := c.read(r)
		if err != nil {
			c.readErr = err
			return
		}
		if pk.FixedHeader.Type == packets.Publish && c.onMsg != nil {
			c.onMsg(pk)
		}
		c.answer(pk)
		if pk.FixedHeader.Type != packets.Publish || c.onMsg == nil {
			c.in <- &pk
		}
	}
}

// answer acknowledges as a client should.
func (c *client) answer(pk packets.Packet) {
	if !c.auto {
		return
	}
	switch {
	case pk.FixedHeader.Type == packets.Publish && pk.FixedHeader.Qos == 1:
		_ = c.ack(packets.Puback, pk.PacketID)
	case pk.FixedHeader.Type == packets.Publish && pk.FixedHeader.Qos == 2:
		_ = c.ack(packets.Pubrec, pk.PacketID)
	case pk.FixedHeader.Type == packets.Pubrel:
		_ = c.ack(packets.Pubcomp, pk.PacketID)
	}
}

func (c *client) ack(kind byte, id uint16) error {
	qos := byte(0)
	if kind == packets.Pubrel {
		qos = 1
	}
	return c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: kind, Qos: qos}, PacketID: id})
}

// next returns the next packet of one of these types; others wait for a later call.
func (c *client) next(kinds ...byte) packets.Packet {
	c.t.Helper()
	for i, pk := range c.backlog {
		if bytes.IndexByte(kinds, pk.FixedHeader.Type) >= 0 {
			c.backlog = slices.Delete(c.backlog, i, i+1)
			return *pk
		}
	}
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for {
		select {
		case pk, ok := <-c.in:
			if !ok {
				c.t.Fatalf("connection ended while waiting for packet of type %v: %v", kinds, c.readErr)
			}
			if bytes.IndexByte(kinds, pk.FixedHeader.Type) >= 0 {
				return *pk
			}
			c.backlog = append(c.backlog, pk)
		case <-limit.C:
			c.t.Fatalf("no packet of type %v within %v", kinds, patience)
		}
	}
}

func (c *client) subscribe(qos byte, filters ...string) []byte {
	c.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 60_000}
	for _, f := range filters {
		pk.Filters = append(pk.Filters, packets.Subscription{Filter: f, Qos: qos})
	}
	if err := c.write(pk); err != nil {
		c.t.Fatalf("subscribe: %v", err)
	}
	return c.next(packets.Suback).ReasonCodes
}

func (c *client) send(topic, payload string, qos byte, id uint16, retain bool) error {
	return c.write(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos, Retain: retain},
		TopicName:   topic, Payload: []byte(payload), PacketID: id,
	})
}

// publish sends a message and waits until it is acknowledged in full.
func (c *client) publish(topic, payload string, qos byte, id uint16) {
	c.t.Helper()
	if err := c.send(topic, payload, qos, id, false); err != nil {
		c.t.Fatalf("publish: %v", err)
	}
	switch qos {
	case 1:
		c.next(packets.Puback)
	case 2:
		c.next(packets.Pubrec)
		if err := c.ack(packets.Pubrel, id); err != nil {
			c.t.Fatalf("PUBREL: %v", err)
		}
		c.next(packets.Pubcomp)
	}
}

func (c *client) subscribeWithID(id uint16, filter string) byte {
	c.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: id}
	pk.Filters = packets.Subscriptions{{Filter: filter}}
	if err := c.write(pk); err != nil {
		c.t.Fatalf("subscribe: %v", err)
	}
	return c.next(packets.Suback).ReasonCodes[0]
}
