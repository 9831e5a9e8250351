package broker

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/sync/topic"
)

// Publish fans a message out to subscribers as if a client had sent it, without Store. Safe for concurrent use.
func (b *Broker) Publish(ctx context.Context, name string, payload []byte, qos byte, retain bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := topic.ValidName(name); err != nil {
		return err
	}
	if b.virtual(name) {
		return fmt.Errorf("topic %q is virtual: send to its connections instead", name)
	}
	if qos > 2 {
		return fmt.Errorf("QoS %d is not 0, 1 or 2", qos)
	}
	b.fanOut(&message{topic: name, payload: slices.Clone(payload), qos: qos, retain: retain})
	return nil
}

// virtual says whether a topic name or filter belongs to the owner of the virtual topics.
func (b *Broker) virtual(name string) bool {
	return b.cfg.Virtual != nil && strings.HasPrefix(name, topic.Root)
}

// fanOut keeps a retained message and queues the message for each subscriber. It never blocks on a client.
func (b *Broker) fanOut(m *message) {
	b.fan.Lock()
	defer b.fan.Unlock()
	if m.retain {
		b.keep(m)
	}
	subs := b.engine.Topics.Subscribers(m.topic)
	for key, sub := range subs.Subscriptions {
		b.deliver(key, sub, m)
	}
	for _, members := range subs.Shared {
		if key, ok := b.choose(members); ok {
			b.deliver(key, members[key], m)
		}
	}
}

// choose picks one member of a shared subscription: one that is connected, if any is.
func (b *Broker) choose(members map[string]packets.Subscription) (string, bool) {
	var all, here []string
	for key := range members {
		all = append(all, key)
		if s := b.lookup(key); s != nil && s.attached() {
			here = append(here, key)
		}
	}
	if len(here) > 0 {
		all = here
	}
	if len(all) == 0 {
		return "", false
	}
	return all[rand.IntN(len(all))], true
}

// deliver queues m for one session; what its queue can't hold is counted, and logged now and then.
func (b *Broker) deliver(key string, sub packets.Subscription, m *message) {
	s := b.lookup(key)
	if s == nil || sub.NoLocal && m.origin == key {
		return
	}
	d := delivery{m: m, qos: min(m.qos, sub.Qos), retain: m.retain && sub.RetainAsPublished, ids: identifiers(sub)}
	taken, warn := s.offer(d, b.cfg.MaxQueued, maxQueuedBytes)
	if taken {
		return
	}
	b.stats.dropped.Add(1)
	if warn {
		b.log.Warn("client takes messages too slowly: its queue is full, newest messages are dropped",
			"client", clientOf(key), "topic", m.topic, "max_queued", b.cfg.MaxQueued)
	}
}

// keep stores or, with an empty payload, forgets a retained message. b.fan is held.
func (b *Broker) keep(m *message) {
	if len(m.payload) == 0 {
		delete(b.retained, m.topic)
		b.full = false
		return
	}
	if _, ok := b.retained[m.topic]; !ok && len(b.retained) >= maxRetained {
		b.stats.dropped.Add(1)
		if b.full {
			return
		}
		b.full = true
		b.log.Warn("too many retained topics: messages on new ones are delivered but not retained", "topic", m.topic, "max_retained", maxRetained)
		return
	}
	b.retained[m.topic] = m
}

// replayRetained queues the retained messages that match a new subscription, atomically with respect to fanOut, so
// that the client sees no older value after a newer one.
func (b *Broker) replayRetained(s *session, sub packets.Subscription) bool {
	b.fan.Lock()
	defer b.fan.Unlock()
	now := time.Now()
	var found []*message
	if !strings.ContainsAny(sub.Filter, "+#") {
		if m := b.retained[sub.Filter]; m != nil && !m.expired(now) {
			found = append(found, m)
		}
	} else {
		filter := strings.Split(sub.Filter, "/")
		for name, m := range b.retained {
			if matches(filter, name) && !m.expired(now) {
				found = append(found, m)
			}
		}
		slices.SortFunc(found, func(a, b *message) int { return strings.Compare(a.topic, b.topic) })
	}
	return s.replay(found, sub, 2*maxRetained)
}

// matches judges a topic name against the levels of a filter (MQTT 3.1.1, section 4.7).
func matches(filter []string, name string) bool {
	if strings.HasPrefix(name, "$") && (filter[0] == "+" || filter[0] == "#") {
		return false
	}
	more := true
	for i, level := range filter {
		if level == "#" {
			return true
		}
		if !more {
			return false
		}
		var part string
		part, name, more = strings.Cut(name, "/")
		if level != "+" && level != part {
			return false
		}
		if !more && i+2 == len(filter) && filter[i+1] == "#" {
			return true
		}
	}
	return !more
}
