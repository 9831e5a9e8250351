package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// commitBatch bounds the messages handed to Store at once.
const commitBatch = 512

// pending is a message that waits to be stored, and who is to be told.
type pending struct {
	m    *message
	conn *Conn // nil for a will
	id   uint16
}

// commits is the queue before Store. Every connection may have MaxPending messages in it, all together limit bytes.
type commits struct {
	limit int
	wake  chan struct{} // 1-slot: look again

	mu    sync.Mutex
	queue []pending
	used  int           // bytes from add to release
	freed chan struct{} // closed at the next release; nil if nobody waits
}

func newCommits(limit int) *commits {
	return &commits{limit: limit, wake: make(chan struct{}, 1)}
}

// add appends, and waits for room first if need be, unless done is closed before.
func (q *commits) add(done <-chan struct{}, p pending) {
	for {
		freed := q.tryAdd(p)
		if freed == nil {
			break
		}
		select {
		case <-freed:
		case <-done:
			return
		}
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// tryAdd appends, or returns what to wait for.
func (q *commits) tryAdd(p pending) <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used >= q.limit {
		if q.freed == nil {
			q.freed = make(chan struct{})
		}
		return q.freed
	}
	q.used += p.m.size()
	q.queue = append(q.queue, p)
	return nil
}

func (q *commits) release(bytes int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.used -= bytes
	if q.freed != nil {
		close(q.freed)
		q.freed = nil
	}
}

func (q *commits) take() []pending {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(q.queue), commitBatch)
	batch := q.queue[:n:n]
	q.queue = q.queue[n:]
	if len(q.queue) == 0 {
		q.queue = nil
	}
	return batch
}

// commit stores what clients publish, acknowledges it and fans it out, until ctx ends.
func (b *Broker) commit(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-b.commits.wake:
		}
		for batch := b.commits.take(); len(batch) > 0 && ctx.Err() == nil; batch = b.commits.take() {
			verdicts := b.store(ctx, batch)
			if ctx.Err() != nil {
				return nil // what the store did is unknown: nothing more is acknowledged
			}
			for i, p := range batch {
				b.settle(p, verdicts[i])
				b.commits.release(p.m.size())
			}
		}
	}
}

// store asks for the verdicts; without a Store all is accepted.
func (b *Broker) store(ctx context.Context, batch []pending) []error {
	if b.cfg.Store == nil {
		return make([]error, len(batch))
	}
	ms := make([]Message, len(batch))
	for i, p := range batch {
		ms[i] = Message{From: p.m.from, ClientID: p.m.client, Topic: p.m.topic, Payload: p.m.payload, QoS: p.m.qos, Retain: p.m.retain, Version: p.m.version}
	}
	verdicts := b.cfg.Store(ctx, ms)
	if len(verdicts) != len(batch) {
		panic(fmt.Sprintf("broker: Store returned %d verdicts for %d messages", len(verdicts), len(batch)))
	}
	return verdicts
}

// settle acknowledges and fans out an accepted message, answers an unstorable one, or ends the connection of a refused one.
func (b *Broker) settle(p pending, refused error) {
	unstorable := errors.Is(refused, ErrUnstorable)
	told := unstorable && p.m.version == 5
	owed := p.conn
	if p.m.qos == 2 && p.conn != nil {
		owed = p.conn.session.stored(p.id, refused == nil || unstorable && !told)
	}
	if refused != nil {
		b.stats.refused.Add(1)
	}
	switch {
	case told && owed != nil && p.m.qos > 0:
		owed.refuse(ackOf(p.m.qos), p.id)
		return
	case unstorable:
		owed.settled(p)
		return
	case refused != nil:
		if p.conn == nil || p.conn.closeReason() == "" { // else one line was enough
			if log, skipped := b.complaints.about(p.m.client, time.Now()); log {
				b.log.Warn("message not stored", "client", p.m.client, "topic", p.m.topic, "error", refused, "not_logged_before", skipped)
			}
		}
		for _, c := range []*Conn{p.conn, owed} {
			if c != nil {
				c.Close("message not stored: " + refused.Error())
			}
		}
		return
	}
	owed.settled(p)
	b.fanOut(p.m)
}

// settled acknowledges a message, if anybody is owed that.
func (c *Conn) settled(p pending) {
	switch {
	case c == nil:
	case p.m.qos == 0:
		<-c.slots
	default:
		c.acknowledge(ackOf(p.m.qos), p.id)
	}
}

// refuse queues a PUBACK or PUBREC of MQTT 5 that says that the message was not taken; the PUBLISH's slot is freed once it is
// written.
func (c *Conn) refuse(kind byte, id uint16) {
	c.mu.Lock()
	c.acks = append(c.acks, packets.Packet{
		FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id, ReasonCode: packets.ErrQuotaExceeded.Code,
	})
	c.mu.Unlock()
	c.poke()
}

// ackOf is the packet that acknowledges a PUBLISH of QoS 1 or 2.
func ackOf(qos byte) byte {
	if qos == 1 {
		return packets.Puback
	}
	return packets.Pubrec
}
