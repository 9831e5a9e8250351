package broker

import (
	"errors"
	"net"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

// Conn is one client's connection, as the owner of the virtual topics sees it. Safe for concurrent use.
type Conn struct {
	id       uint64
	broker   *Broker
	link     *link
	login    Login
	listener string
	client   *mqtt.Client // set before the connection has a session
	identity Identity
	session  *session

	// Of the read goroutine only.
	will        *message
	willDelay   uint32 // seconds
	present     bool   // the session existed
	known       bool   // the packet just read acknowledges something in flight
	established bool
	handling    bool           // a packet was decoded and is being processed
	complained  bool           // a refused topic was logged
	asked       []subscription // of the SUBSCRIBE being processed
	granted     []string       // virtual filters of it
	replays     []packets.Subscription

	slots chan struct{} // a PUBLISH holds one until it is acknowledged on the wire
	wake  chan struct{} // 1-slot: look again
	gone  chan struct{} // closed when nothing of the connection is left and its session is free

	mu     sync.Mutex
	acks   []packets.Packet
	reason string
	writer chan struct{} // closed when the write goroutine has ended; nil if it was never needed
	ended  bool          // nothing may be written any more
}

// subscription is one filter of a SUBSCRIBE, with what mochi is not to act on itself.
type subscription struct {
	packets.Subscription
	existed bool
}

// ID is unique in this process.
func (c *Conn) ID() uint64 { return c.id }

// ClientID of the CONNECT packet.
func (c *Conn) ClientID() string { return c.login.ClientID }

// Identity of the client.
func (c *Conn) Identity() Identity { return c.identity }

// Remote address.
func (c *Conn) Remote() net.Addr { return c.login.Remote }

// Received counts the bytes that came from the peer so far, with all overheads above TCP: proof that it lives.
func (c *Conn) Received() uint64 { return c.link.wire.received.Load() }

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.link.done }

// Send writes one QoS 0 PUBLISH, straight to the socket, and blocks while the peer does not take bytes: that is the
// back-pressure. Never call it from a method of Virtual. The unsent bytes in the kernel are kept small
// (TCP_NOTSENT_LOWAT), so what is sent next does not queue behind much. retain is for answers to a subscribe.
func (c *Conn) Send(topic string, payload []byte, retain bool) error {
	return c.write(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Retain: retain},
		TopicName:   topic,
		Payload:     payload,
	})
}

// Close ends the connection; reason goes to the log.
func (c *Conn) Close(reason string) {
	c.mu.Lock()
	if c.reason == "" {
		c.reason = reason
	}
	c.mu.Unlock()
	_ = c.link.Close()
}

func (c *Conn) closeReason() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason
}

// write sends a packet and counts it. A message larger than an MQTT 5 client takes is dropped and counted.
func (c *Conn) write(pk packets.Packet) error {
	err := c.client.WritePacket(pk)
	switch {
	case err == nil && pk.FixedHeader.Type == packets.Publish:
		c.broker.stats.messagesOut.Add(1)
	case errors.Is(err, packets.ErrPacketTooLarge):
		c.broker.stats.dropped.Add(1)
		c.broker.log.Warn("message is larger than the client accepts, dropped",
			"client", c.login.ClientID, "topic", pk.TopicName, "bytes", len(pk.Payload))
		if pk.FixedHeader.Qos > 0 {
			c.session.acknowledged(map[byte]byte{1: packets.Puback, 2: packets.Pubrec}[pk.FixedHeader.Qos], pk.PacketID, true)
		}
		return nil
	}
	return err
}

// poke wakes the write goroutine, and starts it the first time: the many connections whose clients only publish at QoS 0 and
// use virtual topics never need one.
func (c *Conn) poke() {
	c.mu.Lock()
	if c.writer == nil && !c.ended {
		c.writer = make(chan struct{})
		go c.writeLoop() // closeWriter waits for it
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// acknowledge queues a PUBACK or PUBREC; the PUBLISH's slot is freed once it is written.
func (c *Conn) acknowledge(kind byte, id uint16) {
	c.mu.Lock()
	c.acks = append(c.acks, packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id})
	c.mu.Unlock()
	c.poke()
}

func (c *Conn) takeAcks() []packets.Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	acks := c.acks
	c.acks = nil
	return acks
}

// writeLoop sends acknowledgements and deliveries until the connection ends.
func (c *Conn) writeLoop() {
	defer close(c.writer)
	for {
		select {
		case <-c.link.done:
			return
		case <-c.wake:
		}
		if err := c.drain(); err != nil {
			c.Close("write: " + err.Error())
			return
		}
	}
}

// closeWriter waits for the write goroutine of a connection that has ended, and lets none start.
func (c *Conn) closeWriter() {
	c.mu.Lock()
	c.ended = true
	writer := c.writer
	c.mu.Unlock()
	if writer != nil {
		<-writer
	}
}

// drain writes all that may be written now.
func (c *Conn) drain() error {
	for {
		for _, ack := range c.takeAcks() {
			if err := c.write(ack); err != nil {
				return err
			}
			<-c.slots
		}
		pk, ok, expired := c.session.take(time.Now())
		c.broker.stats.dropped.Add(int64(expired))
		if !ok {
			return nil
		}
		if err := c.write(pk); err != nil {
			return err
		}
	}
}
