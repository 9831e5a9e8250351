package broker

import (
	"strings"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// maxSubscriptions bounds the filters of one session.
	maxSubscriptions = 1024
	// maxTopicLength and maxTopicLevels bound what one name costs in the topic tree.
	maxTopicLength = 1024
	maxTopicLevels = 64
)

// hook is the only hook in mochi (several would be OR-ed in their judgement). Its methods run on the read goroutine
// of the connection concerned.
type hook struct {
	mqtt.HookBase
	b *Broker
}

func (h *hook) ID() string { return "longshore" }

func (h *hook) Provides(b byte) bool {
	switch b {
	case mqtt.OnPacketRead, mqtt.OnACLCheck, mqtt.OnPublish, mqtt.OnSubscribe, mqtt.OnSubscribed, mqtt.OnPacketProcessed,
		mqtt.OnPacketEncode:
		return true
	}
	return false
}

func connOf(cl *mqtt.Client) *Conn { return cl.Net.Conn.(*link).conn }

// OnPacketRead sees every packet before mochi does. The only error that has an effect is ErrRejectPacket: it ends
// the connection.
func (h *hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	c := connOf(cl)
	c.handling = true
	if pk.FixedHeader.Type == packets.Connect {
		if c.established {
			return pk, nil // mochi refuses the second CONNECT
		}
		return h.readConnect(c, pk)
	}
	switch pk.FixedHeader.Type {
	case packets.Publish:
		h.b.stats.messagesIn.Add(1)
	case packets.Disconnect:
		if pk.ReasonCode != packets.CodeDisconnectWillMessage.Code {
			c.will = nil
		}
	case packets.Puback, packets.Pubrec, packets.Pubcomp:
		failed := pk.ReasonCode >= packets.ErrUnspecifiedError.Code
		c.known = c.session.acknowledged(pk.FixedHeader.Type, pk.PacketID, failed)
	case packets.Pubrel:
		c.known = c.session.release(pk.PacketID)
	}
	return pk, nil
}

// readConnect takes the will out of a CONNECT, because mochi publishes wills past every hook and refuses empty ones.
func (h *hook) readConnect(c *Conn, pk packets.Packet) (packets.Packet, error) {
	p := &pk.Connect
	if !p.WillFlag || pk.ReservedBit != 0 {
		return pk, nil
	}
	if p.WillQos > 2 || p.WillTopic == "" {
		c.Close("malformed will")
		return pk, packets.ErrRejectPacket
	}
	c.will = &message{topic: p.WillTopic, payload: p.WillPayload, qos: p.WillQos, retain: p.WillRetain}
	if pk.ProtocolVersion == 5 {
		props := p.WillProperties
		c.will.props = &props
		c.willDelay = props.WillDelayInterval
	}
	p.WillFlag, p.WillRetain, p.WillQos, p.WillTopic, p.WillPayload, p.WillProperties = false, false, 0, "", nil, packets.Properties{}
	return pk, nil
}

// OnACLCheck judges topics of PUBLISH (write) and filters of SUBSCRIBE.
func (h *hook) OnACLCheck(cl *mqtt.Client, name string, write bool) bool {
	c := connOf(cl)
	allowed := write && c.mayPublish(name) || !write && c.maySubscribe(name)
	if !allowed {
		h.b.stats.refused.Add(1)
	}
	if !allowed && !c.complained {
		c.complained = true // once per connection: a device may try all day
		h.b.log.Warn("topic not allowed", "identity", c.identity.Name, "client", c.login.ClientID, "topic", name, "publish", write)
	}
	return allowed
}

func (c *Conn) mayPublish(name string) bool {
	return reasonable(name) && topic.ValidName(name) == nil && name[0] != '$' && c.identity.Access.Publish(name)
}

func (c *Conn) maySubscribe(filter string) bool {
	if _, ok := c.session.subs.Get(filter); !ok && c.session.subs.Len() >= maxSubscriptions {
		return false
	}
	if mqtt.IsSharedFilter(filter) {
		_, rest, _ := strings.Cut(filter, "/")
		_, rest, _ = strings.Cut(rest, "/")
		if c.broker.virtual(rest) {
			return false
		}
		filter = rest
	}
	if !reasonable(filter) || topic.ValidFilter(filter) != nil || filter[0] == '$' {
		return false
	}
	if c.broker.virtual(filter) && !plainOnly(filter) {
		return false
	}
	return c.identity.Access.Subscribe(filter)
}

// reasonable bounds what a hostile name can cost.
func reasonable(name string) bool {
	return name != "" && len(name) <= maxTopicLength && strings.Count(name, "/") < maxTopicLevels
}

// plainOnly allows wildcards in virtual filters only below nodes/<edge>/plain/.
func plainOnly(filter string) bool {
	if !strings.ContainsAny(filter, "+#") {
		return true
	}
	l := strings.SplitN(strings.TrimPrefix(filter, topic.Root), "/", 4)
	return len(l) == 4 && l[0] == "nodes" && !strings.ContainsAny(l[1], "+#") && l[2] == "plain"
}

// OnPublish hands every message over and rejects it towards mochi, so that mochi neither acknowledges nor retains nor
// distributes it. It blocks while the client has MaxPending messages waiting.
func (h *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	c := connOf(cl)
	if err := h.b.accept(c, pk); err != nil {
		c.Close("publish: " + err.Error())
	}
	return pk, packets.ErrRejectPacket
}

// accept is the way of a client's PUBLISH into the commit queue, or to the owner of the virtual topics.
func (b *Broker) accept(c *Conn, pk packets.Packet) error {
	select {
	case c.slots <- struct{}{}:
	case <-c.link.done:
		return nil
	}
	if pk.FixedHeader.Qos == 2 {
		v, held := c.session.receive(c, pk.PacketID)
		switch {
		case v == excess:
			return packets.ErrReceiveMaximum
		case v == repeated:
			c.acknowledge(packets.Pubrec, pk.PacketID)
			return nil
		case v == waiting && held:
			<-c.slots
			return nil
		case v == waiting:
			return nil
		}
	}
	if b.virtual(pk.TopicName) {
		b.cfg.Virtual.Received(c, pk.TopicName, pk.Payload)
		switch pk.FixedHeader.Qos {
		case 0:
			<-c.slots
		case 1:
			c.acknowledge(packets.Puback, pk.PacketID)
		default:
			c.session.stored(pk.PacketID, true)
			c.acknowledge(packets.Pubrec, pk.PacketID)
		}
		return nil
	}
	m := &message{
		origin: c.session.key, from: c.identity, client: c.login.ClientID,
		topic: pk.TopicName, payload: pk.Payload, qos: pk.FixedHeader.Qos, retain: pk.FixedHeader.Retain, expiry: pk.Expiry,
		version: pk.ProtocolVersion,
	}
	if pk.ProtocolVersion == 5 {
		props := pk.Properties
		m.props = &props
	}
	b.commits.add(c.link.done, pending{m: m, conn: c, id: pk.PacketID})
	return nil
}

// OnSubscribe grants QoS 0 to virtual filters and notes what the client asked for.
func (h *hook) OnSubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	c := connOf(cl)
	c.asked = c.asked[:0]
	for i, sub := range pk.Filters {
		_, existed := c.session.subs.Get(sub.Filter)
		c.asked = append(c.asked, subscription{sub, existed})
		if h.b.virtual(sub.Filter) {
			pk.Filters[i].Qos = 0
		}
	}
	return pk
}

// OnSubscribed runs before the SUBACK is written: it notes what was granted, and takes virtual filters out of the tree.
func (h *hook) OnSubscribed(cl *mqtt.Client, _ packets.Packet, codes []byte) {
	c := connOf(cl)
	c.granted, c.replays = nil, nil
	for i, sub := range c.asked {
		switch {
		case codes[i] > packets.CodeGrantedQos2.Code:
		case h.b.virtual(sub.Filter):
			h.b.engine.Topics.Unsubscribe(sub.Filter, cl.ID)
			c.session.subs.Delete(sub.Filter)
			c.granted = append(c.granted, sub.Filter)
		case mqtt.IsSharedFilter(sub.Filter) || sub.RetainHandling == 2 || sub.RetainHandling == 1 && sub.existed:
		default:
			c.replays = append(c.replays, sub.Subscription)
		}
	}
}

// OnPacketProcessed runs after a packet was answered.
func (h *hook) OnPacketProcessed(cl *mqtt.Client, pk packets.Packet, err error) {
	c := connOf(cl)
	defer func() { c.handling = false }()
	if err != nil {
		return
	}
	switch pk.FixedHeader.Type {
	case packets.Subscribe:
		if len(c.granted) > 0 {
			h.b.cfg.Virtual.Subscribed(c, c.granted)
		}
		for _, sub := range c.replays {
			if !h.b.replayRetained(c.session, sub) {
				c.Close("client asks for retained messages faster than it takes them")
			}
		}
	case packets.Unsubscribe:
		var gone []string
		for _, sub := range pk.Filters {
			if h.b.virtual(sub.Filter) {
				gone = append(gone, sub.Filter)
			}
		}
		if len(gone) > 0 {
			h.b.cfg.Virtual.Unsubscribed(c, gone)
		}
	}
}

// OnPacketEncode corrects what mochi can't know about sessions that are not its own.
func (h *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	c := connOf(cl)
	switch pk.FixedHeader.Type {
	case packets.Connack:
		pk.SessionPresent = pk.ReasonCode == packets.CodeSuccess.Code && c.present
	case packets.Pubrel, packets.Pubcomp:
		if pk.ReasonCode == packets.ErrPacketIdentifierNotFound.Code && c.known {
			pk.ReasonCode = packets.CodeSuccess.Code
			pk.Properties = packets.Properties{}
		}
	}
	return pk
}
