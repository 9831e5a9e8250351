package mqttconn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

const (
	// farewellTimeout bounds how long the hub is waited for to take the DISCONNECT.
	farewellTimeout = time.Second
	// watchMax is how often a quiet connection is looked at, at least.
	watchMax = 5 * time.Second
	// grantedMax is the highest return code of a SUBACK that is not a refusal.
	grantedMax = 2
)

// errClosed says that the connection has ended.
var errClosed = errors.New("connection to the hub has ended")

// Message received.
type Message struct {
	Topic    string
	Payload  []byte
	Retained bool
}

// Session is one live connection. Its methods are safe for concurrent use.
type Session struct {
	log       *slog.Logger
	t         *transport
	keepAlive time.Duration
	stall     time.Duration
	maxPacket int

	messages chan Message
	writing  chan struct{} // holds a token while somebody writes
	lastOut  atomic.Int64  // Unix nanoseconds
	handing  atomic.Bool   // the reader waits for the handler, not for the hub

	mu      sync.Mutex
	err     error                  // why the connection ended
	lastID  uint16                 // of SUBSCRIBE
	asked   map[uint16]chan []byte // SUBSCRIBEs without SUBACK
	waiting map[any]time.Time      // what is outstanding, since when: packet ids, and ping
}

// ping is the key of an outstanding PINGREQ.
type ping struct{}

func newSession(cfg Config, t *transport) *Session {
	s := &Session{
		log: cfg.Logger, t: t, keepAlive: cfg.KeepAlive, stall: cfg.StallTimeout, maxPacket: cfg.MaxPacket,
		messages: make(chan Message, cfg.Queue), writing: make(chan struct{}, 1),
		asked: map[uint16]chan []byte{}, waiting: map[any]time.Time{},
	}
	s.lastOut.Store(time.Now().UnixNano())
	return s
}

// Messages delivers what arrives, in order. It is closed when the connection ends.
func (s *Session) Messages() <-chan Message { return s.messages }

// Bytes moved on this connection so far, with all overheads above TCP.
func (s *Session) Bytes() (in, out uint64) { return s.t.meter.in.Load(), s.t.meter.out.Load() }

// Publish sends a QoS 0 message; it blocks while the peer takes no bytes. ctx ends the wait for the turn to write;
// a message once begun is written, or the connection ends.
func (s *Session) Publish(ctx context.Context, topic string, payload []byte) error {
	pk := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	pk.TopicName, pk.Payload = topic, payload
	return s.write(ctx, pk)
}

// Subscribe asks for topics at QoS 0 and waits for the SUBACK; a refused filter is an error that names it. Messages
// must be received meanwhile, on another goroutine or with a Queue that holds all that may come: the SUBACK comes
// behind messages sent before it.
func (s *Session) Subscribe(ctx context.Context, filters ...string) error {
	if len(filters) == 0 {
		return nil
	}
	pk := packets.NewControlPacket(packets.Subscribe).(*packets.SubscribePacket)
	pk.Topics, pk.Qoss = filters, make([]byte, len(filters))
	id, answer := s.ask()
	defer s.forget(id)
	pk.MessageID = id
	if err := s.write(ctx, pk); err != nil {
		return err
	}
	select {
	case codes := <-answer:
		return refused(filters, codes)
	case <-ctx.Done():
		return ctx.Err()
	case <-s.t.done:
		return s.reason()
	}
}

func refused(filters []string, codes []byte) error {
	if len(codes) != len(filters) {
		return fmt.Errorf("hub answered %d of %d filters", len(codes), len(filters))
	}
	var names []string
	for i, code := range codes {
		if code > grantedMax {
			names = append(names, filters[i])
		}
	}
	if names != nil {
		return fmt.Errorf("hub refuses to subscribe this edge to %s", strings.Join(names, ", "))
	}
	return nil
}

// ask reserves a packet id for a SUBSCRIBE.
func (s *Session) ask() (uint16, <-chan []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		s.lastID++
		if _, taken := s.asked[s.lastID]; s.lastID != 0 && !taken {
			break
		}
	}
	c := make(chan []byte, 1)
	s.asked[s.lastID] = c
	s.waiting[s.lastID] = time.Now()
	return s.lastID, c
}

func (s *Session) forget(id uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asked, id)
	delete(s.waiting, id)
}

// write sends a packet; a failed write ends the connection, because the packet may be partly out.
func (s *Session) write(ctx context.Context, pk packets.ControlPacket) error {
	select {
	case s.writing <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.t.done:
		return s.reason()
	}
	defer func() { <-s.writing }()
	return s.send(pk)
}

// send writes a packet; the caller holds the token.
func (s *Session) send(pk packets.ControlPacket) error {
	err := pk.Write(s.t)
	s.lastOut.Store(time.Now().UnixNano())
	if err != nil {
		s.end(fmt.Errorf("write to the hub: %w", err))
		return s.reason()
	}
	return nil
}

// end closes the connection; the first reason counts.
func (s *Session) end(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	s.t.close()
}

func (s *Session) reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		return errClosed
	}
	return s.err
}

// run reads, watches and calls serve, and returns why the connection ended when all three have.
func (s *Session) run(parent context.Context, serve func(context.Context, *Session) error) error {
	ctx, cancel := context.WithCancel(parent)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		s.end(s.read())
		cancel()
	})
	wg.Go(func() { s.watch(ctx) })

	err := serve(ctx, s)
	if err != nil && ctx.Err() == nil {
		s.log.Warn("connection to the hub given up", "error", err)
	}
	if ctx.Err() == nil || parent.Err() != nil {
		s.farewell()
	}
	if err == nil {
		err = errClosed
	}
	s.end(err)
	cancel()
	wg.Wait()
	return s.reason()
}

// farewell sends DISCONNECT if the hub takes it in time.
func (s *Session) farewell() {
	ctx, cancel := context.WithTimeout(context.Background(), farewellTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, s.t.close)
	defer stop()
	_ = s.write(ctx, packets.NewControlPacket(packets.Disconnect))
}

// read hands messages on until the connection ends, and returns why it did.
func (s *Session) read() error {
	defer close(s.messages)
	for {
		pk, err := readPacket(s.t.reader, s.maxPacket)
		if err != nil {
			return fmt.Errorf("connection to the hub was lost: %w", err)
		}
		switch pk := pk.(type) {
		case *packets.PublishPacket:
			if pk.Qos != 0 {
				return fmt.Errorf("hub sent %q with QoS %d, granted was 0", pk.TopicName, pk.Qos)
			}
			s.handing.Store(true)
			select {
			case s.messages <- Message{Topic: pk.TopicName, Payload: pk.Payload, Retained: pk.Retain}:
			case <-s.t.done:
				return errClosed
			}
			s.handing.Store(false)
		case *packets.SubackPacket:
			s.answered(pk)
		case *packets.PingrespPacket:
			s.mu.Lock()
			delete(s.waiting, ping{})
			s.mu.Unlock()
		default:
			return fmt.Errorf("hub sent a %T, which nobody asked for", pk)
		}
	}
}

func (s *Session) answered(pk *packets.SubackPacket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.asked[pk.MessageID]; ok {
		c <- pk.ReturnCodes // holds one; the id is gone afterwards
		delete(s.asked, pk.MessageID)
		delete(s.waiting, pk.MessageID)
	}
}

// watch pings a quiet connection and ends one on which something is outstanding and no byte comes.
func (s *Session) watch(ctx context.Context) {
	tick := time.NewTicker(max(time.Millisecond, min(watchMax, s.keepAlive/4, s.stall/4)))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.t.done:
			return
		case now := <-tick.C:
			if s.stalled(now) {
				s.end(fmt.Errorf("no byte came from the hub for %v: the link seems dead", s.stall))
				return
			}
			s.pingIfQuiet(now)
		}
	}
}

// stalled says whether something is outstanding and no byte came for the stall timeout. While the handler is behind,
// bytes may wait unread, so nothing can be said.
func (s *Session) stalled(now time.Time) bool {
	if s.handing.Load() {
		return false
	}
	last := time.Unix(0, s.t.meter.lastIn.Load())
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, since := range s.waiting {
		if now.Sub(since) > s.stall && now.Sub(last) > s.stall {
			return true
		}
	}
	return false
}

// pingIfQuiet sends a PINGREQ when for the keepalive nothing was sent, or nothing came and no ping is out, unless somebody is
// writing: then bytes move anyway. The answer to a ping may stand behind a long message on a thin link; the hub has to hear from
// this side all the same.
func (s *Session) pingIfQuiet(now time.Time) {
	lastOut, lastIn := time.Unix(0, s.lastOut.Load()), time.Unix(0, s.t.meter.lastIn.Load())
	if now.Sub(lastOut) < s.keepAlive && (now.Sub(lastIn) < s.keepAlive || s.pinged()) {
		return
	}
	select {
	case s.writing <- struct{}{}:
		defer func() { <-s.writing }()
	default:
		return
	}
	s.expectPong(now)
	_ = s.send(packets.NewControlPacket(packets.Pingreq)) // ends the connection if it fails
}

// pinged reports whether a ping is out.
func (s *Session) pinged() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, out := s.waiting[ping{}]
	return out
}

// expectPong notes a ping about to be sent; of several that are out the first counts.
func (s *Session) expectPong(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, out := s.waiting[ping{}]; !out {
		s.waiting[ping{}] = now
	}
}
