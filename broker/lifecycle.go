package broker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
)

const (
	// neverExpires is the MQTT 5 session expiry interval that means for ever.
	neverExpires = math.MaxUint32
	// farewellTimeout bounds how long a client is waited for to take its DISCONNECT.
	farewellTimeout = time.Second
)

// errTakenOver says that a newer connection of the same client came.
var errTakenOver = errors.New("the same client connected again")

// openConn makes a connection of what carries MQTT bytes over w and answers its CONNECT packet. It returns nil if that failed.
func (b *Broker) openConn(listener string, mqttConn net.Conn, w *wire, login Login) *Conn {
	l := &link{Conn: mqttConn, wire: w, done: make(chan struct{})}
	c := &Conn{
		id: b.lastID.Add(1), broker: b, link: l, login: login, listener: listener,
		slots: make(chan struct{}, b.cfg.MaxPending), wake: make(chan struct{}, 1), gone: make(chan struct{}),
	}
	l.conn = c
	if !b.register(c) {
		_ = l.Close()
		return nil
	}
	head, err := readConnectHeader(mqttConn, b.cfg.MaxConnectPacket)
	if err != nil {
		b.stats.refused.Add(1)
		b.log.Info("connection refused", "listener", listener, "remote", login.Remote, "error", err)
		_ = l.Close()
		b.unregister(c)
		return nil
	}
	l.head = head
	c.client = b.engine.NewClient(l, listener, "", false)
	if err := b.connect(c); err != nil {
		b.conclude(c, err)
		return nil
	}
	return c
}

// serve handles what the client of an open connection sends, on the caller's goroutine, until the last trace of it is gone.
// While nothing comes, little is on the stack: there are many connections.
func (b *Broker) serve(c *Conn) { b.conclude(c, b.read(c)) }

// read handles packet after packet.
func (b *Broker) read(c *Conn) error {
	for !c.client.Closed() {
		var fh packets.FixedHeader
		if err := c.client.ReadFixedHeader(&fh); err != nil {
			return err
		}
		if err := b.process(c, &fh); err != nil {
			return err
		}
	}
	return nil
}

// conclude ends a connection for a reason, or without one.
func (b *Broker) conclude(c *Conn, err error) {
	_ = c.link.Close()
	c.client.Stop(nil)
	if c.session != nil {
		b.finish(c)
	}
	b.unregister(c)
	if reason := c.closeReason(); reason != "" {
		err = errors.New(reason)
	}
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, packets.CodeDisconnect) {
		b.log.Debug("connection ended", "listener", c.listener, "client", c.login.ClientID, "identity", c.identity.Name, "remote", c.login.Remote)
		return
	}
	b.log.Info("connection ended", "listener", c.listener, "client", c.login.ClientID, "identity", c.identity.Name, "remote", c.login.Remote, "error", err)
}

// malformed turns a panic of mochi's decoders into an error: some truncated packets do that (an MQTT 5 SUBSCRIBE without options is
// enough), which must end the connection, not the program. Any other panic goes on. It is to be deferred.
func (b *Broker) malformed(c *Conn, err *error) {
	if c.handling {
		return
	}
	if r := recover(); r != nil {
		b.stats.refused.Add(1)
		*err = fmt.Errorf("malformed packet: %v", r)
	}
}

// connect reads the CONNECT packet and answers it; an error ends the connection.
func (b *Broker) connect(c *Conn) (err error) {
	defer b.malformed(c, &err)
	cl := c.client
	var fh packets.FixedHeader
	if err := cl.ReadFixedHeader(&fh); err != nil {
		return fmt.Errorf("read CONNECT: %w", err)
	}
	pk, err := cl.ReadPacket(&fh)
	if err != nil {
		return fmt.Errorf("read CONNECT: %w", err)
	}
	cl.ParseConnect(c.listener, pk)
	if code := validConnect(cl, &pk); code != packets.CodeSuccess {
		return errors.Join(code, b.engine.SendConnack(cl, code, false, nil))
	}
	if err := b.identify(c, &pk); err != nil {
		return err
	}
	if err := b.engine.SendConnack(cl, packets.CodeSuccess, c.present, nil); err != nil {
		return fmt.Errorf("acknowledge CONNECT: %w", err)
	}
	b.established(c)
	c.handling = false
	return nil
}

// validConnect judges what the packet says of itself (MQTT 3.1.1 and 5, section 3.1).
func validConnect(cl *mqtt.Client, pk *packets.Packet) packets.Code {
	if code := pk.ConnectValidate(); code != packets.CodeSuccess {
		return code
	}
	if cl.Properties.ProtocolVersion < 5 && !pk.Connect.Clean && pk.Connect.ClientIdentifier == "" {
		return packets.ErrUnspecifiedError
	}
	if cl.Properties.ProtocolVersion < 3 {
		return packets.ErrUnsupportedProtocolVersion
	}
	return packets.CodeSuccess
}

// identify authenticates, judges the will and takes over the session; an earlier connection of the same client has
// ended completely when it returns. Whom it refuses has got a CONNACK that says so.
func (b *Broker) identify(c *Conn, pk *packets.Packet) error {
	cl := c.client
	c.login.ClientID = cl.ID
	c.login.Username = string(pk.Connect.Username)
	c.login.Password = pk.Connect.Password
	refuse := func(v5, v3 packets.Code, err error) error {
		b.stats.refused.Add(1)
		if cl.Properties.ProtocolVersion < 5 {
			v5 = v3 // mochi does not translate all
		}
		_ = b.engine.SendConnack(cl, v5, false, nil)
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), b.cfg.HandshakeTimeout)
	defer cancel()
	id, err := b.cfg.Auth.Authenticate(ctx, c.login)
	c.login.Password = nil
	if err != nil {
		return refuse(packets.ErrBadUsernameOrPassword, packets.Err3NotAuthorized, fmt.Errorf("authenticate: %w", err))
	}
	c.identity = id
	key := id.Name + "\x00" + cl.ID
	if c.will != nil {
		if b.virtual(c.will.topic) || !c.mayPublish(c.will.topic) {
			return refuse(packets.ErrNotAuthorized, packets.Err3NotAuthorized, fmt.Errorf("will on topic %q is not allowed to %q", c.will.topic, id.Name))
		}
		c.will.origin, c.will.from, c.will.client = key, id, cl.ID
	}
	if err := b.claim(c, key, pk.Connect.Clean); err != nil {
		return err
	}
	// mochi's key of a client, in its topic tree too: an identity can't reach another's session by its client id.
	cl.ID = key
	cl.State.Subscriptions = c.session.subs
	b.judgeAgain(c)
	return nil
}

// judgeAgain ends subscriptions of a resumed session that the identity may no longer have.
func (b *Broker) judgeAgain(c *Conn) {
	for filter := range c.session.subs.GetAll() {
		if !c.maySubscribe(filter) {
			b.engine.Topics.Unsubscribe(filter, c.session.key)
			c.session.subs.Delete(filter)
		}
	}
}

// established runs after the CONNACK was written.
func (b *Broker) established(c *Conn) {
	cl := c.client
	c.established = true
	alive := time.Duration(cl.State.Keepalive) * time.Second * 3 / 2
	if alive == 0 {
		_ = c.link.wire.SetReadDeadline(time.Time{})
	}
	c.link.wire.readLimit.Store(int64(alive))
	window := flightWindow
	if rm := int(cl.Properties.Props.ReceiveMaximum); cl.Properties.ProtocolVersion == 5 && rm > 0 {
		window = min(window, rm)
	}
	c.session.attach(c, window)
	if b.cfg.Virtual != nil {
		b.cfg.Virtual.Connected(c)
	}
}

// process reads the rest of a packet and has mochi answer it. An MQTT 5 client is told what it did wrong.
func (b *Broker) process(c *Conn, fh *packets.FixedHeader) (err error) {
	defer b.malformed(c, &err)
	pk, err := c.client.ReadPacket(fh)
	if err != nil {
		return err
	}
	err = b.engine.InjectPacket(c.client, pk)
	var code packets.Code
	if errors.As(err, &code) && c.client.Properties.ProtocolVersion == 5 && code.Code >= packets.ErrUnspecifiedError.Code {
		_ = b.engine.DisconnectClient(c.client, code)
	}
	return err
}

// claim makes c the owner of the client's session. An owner before it is closed and has left no goroutine when claim
// returns; of several that wait only the newest gets it.
func (b *Broker) claim(c *Conn, key string, clean bool) error {
	for {
		b.mu.Lock()
		s := b.sessions[key]
		if s == nil || s.owner == nil {
			var will *message
			if s != nil && clean {
				will = b.discard(s)
				s = nil
			}
			if s == nil {
				s = newSession(key)
				b.sessions[key] = s
			} else {
				c.present = true
			}
			s.owner = c
			c.session = s
			b.mu.Unlock()
			b.submitWill(will)
			return nil
		}
		if s.next != nil && s.next != c {
			s.next.Close(errTakenOver.Error())
		}
		s.next = c
		old := s.owner
		b.mu.Unlock()

		old.takeOver()
		select {
		case <-old.gone:
		case <-c.link.done:
			b.mu.Lock()
			if s.next == c {
				s.next = nil
			}
			b.mu.Unlock()
			return errTakenOver
		}
	}
}

// takeOver closes c for a newer connection of its client, and tells an MQTT 5 client why if it takes that in time.
func (c *Conn) takeOver() {
	if c.client.Properties.ProtocolVersion == 5 {
		written := make(chan struct{})
		go func() {
			defer close(written)
			_ = c.client.WritePacket(packets.Packet{
				FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ReasonCode: packets.ErrSessionTakenOver.Code,
			})
		}()
		defer func() { <-written }()
		select {
		case <-written:
		case <-time.After(farewellTimeout):
		}
	}
	c.Close(errTakenOver.Error())
}

// finish ends c's hold on its session: the write goroutine has ended, the owner of the virtual topics was told, the
// will is on its way, and the session stays or goes as the client asked.
func (b *Broker) finish(c *Conn) {
	c.closeWriter()
	if c.established && b.cfg.Virtual != nil {
		b.cfg.Virtual.Disconnected(c)
	}
	s := c.session
	expiry := c.sessionExpiry()
	s.detach(time.Now(), expiry)
	if c.established && c.will != nil {
		delay := time.Duration(c.willDelay) * time.Second
		if expiry >= 0 {
			delay = min(delay, expiry)
		}
		if delay > 0 {
			s.leaveWill(c.will, time.Now().Add(delay))
		} else {
			b.submitWill(c.will)
		}
	}
	b.mu.Lock()
	s.owner = nil
	var will *message
	if expiry == 0 {
		will = b.discard(s)
	}
	b.mu.Unlock()
	b.submitWill(will)
	close(c.gone)
}

// sessionExpiry is how long the session outlives the connection; negative: for ever.
func (c *Conn) sessionExpiry() time.Duration {
	p := c.client.Properties
	switch {
	case p.ProtocolVersion == 5 && p.Props.SessionExpiryInterval != neverExpires:
		return time.Duration(p.Props.SessionExpiryInterval) * time.Second
	case p.ProtocolVersion < 5 && p.Clean:
		return 0
	}
	return -1
}

// discard forgets a session without owner. b.mu is held. It returns the delayed will, which is due now.
func (b *Broker) discard(s *session) *message {
	for filter := range s.subs.GetAll() {
		b.engine.Topics.Unsubscribe(filter, s.key)
		s.subs.Delete(filter)
	}
	delete(b.sessions, s.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	will := s.will
	s.will = nil
	return will
}

// submitWill hands a will to Store like any other message. A nil will is none.
func (b *Broker) submitWill(will *message) {
	if will == nil {
		return
	}
	m := *will
	if m.props != nil && m.props.MessageExpiryInterval > 0 {
		m.expiry = time.Now().Unix() + int64(m.props.MessageExpiryInterval)
	}
	b.commits.add(b.stopped, pending{m: &m})
}

// keepHouse drops expired sessions and retained messages, and sends delayed wills, until ctx ends.
func (b *Broker) keepHouse(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, will := range b.sweepSessions(now) {
				b.submitWill(will)
			}
			b.sweepRetained(now)
		}
	}
}

// sweepSessions discards expired sessions, and those longest away beyond MaxConnections. It returns the wills due.
func (b *Broker) sweepSessions(now time.Time) (wills []*message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var away []*session
	for _, s := range b.sessions {
		if s.owner != nil {
			continue
		}
		expired, will := s.due(now)
		if will != nil {
			wills = append(wills, will)
		}
		if expired {
			wills = b.drop(s, "session expired", wills)
			continue
		}
		away = append(away, s)
	}
	if excess := len(away) - b.cfg.MaxConnections; excess > 0 {
		slices.SortFunc(away, func(a, b *session) int { return a.awaySince.Compare(b.awaySince) })
		for _, s := range away[:excess] {
			wills = b.drop(s, "too many sessions of absent clients: the one longest away is forgotten", wills)
		}
	}
	return wills
}

// drop discards a session whose client did not ask for it, and counts what it held.
func (b *Broker) drop(s *session, why string, wills []*message) []*message {
	lost := s.waitingMessages()
	b.stats.dropped.Add(lost)
	if will := b.discard(s); will != nil {
		wills = append(wills, will)
	}
	if lost > 0 {
		b.log.Warn("session of an absent client dropped", "client", clientOf(s.key), "reason", why, "messages", lost)
	}
	return wills
}

func (b *Broker) sweepRetained(now time.Time) {
	b.fan.Lock()
	defer b.fan.Unlock()
	for name, m := range b.retained {
		if m.expired(now) {
			delete(b.retained, name)
		}
	}
}

// clientOf returns the client id in a session key.
func clientOf(key string) string {
	_, client, _ := strings.Cut(key, "\x00")
	return client
}
