package mirror

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// coalesce is the least time between two lists taken for one edge: the first change of a burst goes at once, the rest
	// together.
	coalesce = 10 * time.Millisecond
	// contact is how often the state of a connected edge is handed on though nothing changed.
	contact = 30 * time.Second
	// proofTimeout bounds one proof.
	proofTimeout = time.Minute
	// farewellTime is how long a superseded instance may take to answer before its connection is closed: one that does, lives.
	farewellTime = 10 * time.Second
	// proofPause is the first pause after a proof that failed; it doubles up to proofPauseMax.
	proofPause    = time.Second
	proofPauseMax = 30 * time.Second
)

// sender writes everything that goes down one connection. It takes what is newest at the moment of sending, so nothing queues
// behind a slow link. Its fields belong to its task, and once that cannot run any more to the Mirror.
type sender struct {
	m    *Mirror
	c    *conn
	task task
	view *View // nil before the first turn
	over bool  // finish was called

	session *desired.Session
	snap    Snapshot
	// listAt is when the list changed last.
	listAt time.Time

	acksFull, acksOn bool

	// The farewell: why and when the connection is closed. If the edge was superseded while it was connected, received is how
	// many bytes had come from it before.
	ending   string
	endAt    time.Time
	farewell bool
	received uint64
	// strangerAt is when the Edge was first missing.
	strangerAt time.Time

	plain plainState

	// The proof of this hub's view of the edge: asked, under way, or done and waiting for a fresh list.
	proofs   sync.WaitGroup
	unprove  context.CancelFunc // nil before the first
	proving  bool
	proved   chan error // 1 slot
	proofIs  bool       // done
	proofAt  time.Time  // when to ask again after a failure
	pause    time.Duration
	wanted   bool
	inSync   bool
	told     time.Time // when the state was handed on last
	tell     bool      // the state changed since
	deadline time.Time // when to look again though nothing happens
	timer    *time.Timer
}

// errSilent ends a connection without news for the source: another hub holds the edge.
type errSilent string

func (e errSilent) Error() string { return string(e) }

func newSender(m *Mirror, c *conn) *sender {
	s := &sender{m: m, c: c, proved: make(chan error, 1), pause: proofPause}
	s.task = task{group: &m.turns, do: s.turn}
	return s
}

// turn sends what there is to send, until the connection has ended.
func (s *sender) turn() {
	if s.over {
		return
	}
	if ended, err := s.rounds(); ended {
		s.finish(err, true)
	}
}

// rounds returns when nothing is left to do. ended says that the connection has ended, or is to be closed for the reason err.
func (s *sender) rounds() (ended bool, err error) {
	select {
	case <-s.m.named:
	case <-s.c.Done():
		return true, nil
	default:
		return false, nil // Run wakes all when the cluster is known
	}
	if s.view == nil {
		s.view = s.m.cfg.Cache.View(s.c.edge, s.c.Identity().Key, s.c.wake)
	}
	for busy := true; busy; {
		select {
		case <-s.c.Done():
			return true, nil
		case err := <-s.proved:
			s.proofEnded(err)
		default:
		}
		if s.m.turns.isClosed() {
			return false, nil
		}
		if busy, err = s.step(time.Now()); err != nil {
			return true, err
		}
	}
	s.rest()
	return false, nil
}

// rest has the task woken at the deadline, if there is one.
func (s *sender) rest() {
	switch {
	case s.timer == nil && !s.deadline.IsZero():
		s.timer = time.AfterFunc(time.Until(s.deadline), s.task.wake)
	case s.timer == nil:
	case s.deadline.IsZero():
		s.timer.Stop()
	default:
		s.timer.Reset(time.Until(s.deadline))
	}
}

// finish ends the sender and, if it has not ended, the connection; err is the reason. tell says whether the end is news for the source.
func (s *sender) finish(err error, tell bool) {
	m, c := s.m, s.c
	s.over = true
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.unprove != nil {
		s.unprove()
	}
	s.proofs.Wait()
	if s.view != nil {
		s.view.Close()
	}
	if s.farewell && c.Received() > s.received {
		m.outlived(c)
	}
	if s.session != nil {
		m.counters.sessions.Add(-1)
		s.sync(false)
	}
	c.hangUp()
	select {
	case <-c.Done():
	default:
		switch {
		case err == nil:
		case s.ending != "":
			c.Close(s.ending)
		default:
			m.refuse(c, err.Error())
		}
	}
	var silent errSilent
	m.ended(c, tell && !errors.As(err, &silent))
	m.cfg.Logger.Debug("sender ended", "edge", c.edge, "remote", c.Remote())
}

// by moves the deadline forward to t, if t is set.
func (s *sender) by(t time.Time) {
	if !t.IsZero() && (s.deadline.IsZero() || t.Before(s.deadline)) {
		s.deadline = t
	}
}

// step does one round: what came in, then at most about 32 KiB of heads and objects, one acknowledgement, and some plain
// messages, so that none starves the others. busy says that there may be more to send at once.
func (s *sender) step(now time.Time) (busy bool, err error) {
	s.deadline = time.Time{}
	in := s.c.take()
	if in.close != "" {
		return false, errors.New(in.close)
	}
	if s.ending != "" {
		if !now.Before(s.endAt) {
			return false, errors.New(s.ending)
		}
		s.by(s.endAt)
		return false, nil
	}
	fresh := s.look(now)
	if !s.snap.Synced {
		s.giveBack(in)
		return false, nil
	}
	if !s.snap.Known {
		return false, s.dismiss(now, in)
	}
	if in.opened {
		if err := s.open(now); err != nil {
			return false, err
		}
	}
	if in.again && s.session != nil {
		s.session.Again(now)
	}
	if s.session != nil {
		sent, err := s.syncRound(now, in, fresh)
		if err != nil {
			return false, err
		}
		busy = busy || sent
	}
	s.acksOn = s.acksOn || in.acks
	s.acksFull = s.acksFull || in.acks
	sent, err := s.sendAck()
	if err != nil {
		return false, err
	}
	busy = busy || sent
	if sent, err = s.sendPlain(in.filters); err != nil {
		return false, err
	}
	busy = busy || sent
	s.account(now, in)
	return busy, nil
}

// dismiss ends a connection whose Edge does not exist (any more). An edge hub is told so; its hello may still be on its way. A
// plain device is told nothing: MQTT 3.1.1 has no words for it. The error is a reason to close the connection at once.
func (s *sender) dismiss(now time.Time, in inbox) error {
	reason := fmt.Errorf("there is no Edge %q: create it (kind Edge, metadata.name %s), the device comes back by itself", s.c.edge, s.c.edge)
	if s.strangerAt.IsZero() {
		s.strangerAt = now
	}
	switch {
	case s.session != nil:
	case s.c.hello() != nil:
		session, err := s.newSession(now)
		if err != nil {
			return err
		}
		s.session = session
		s.m.counters.sessions.Add(1)
	case len(s.c.plainFilters()) > 0 || !now.Before(s.strangerAt.Add(farewellTime)):
		return reason
	default:
		s.giveBack(in)
		s.by(s.strangerAt.Add(farewellTime))
		return nil
	}
	s.session.Dismiss(now)
	for _, a := range s.session.Poll(now) {
		if a, ok := a.(desired.Send); ok {
			if err := s.send(a.Topic, a.Payload, a.Retain); err != nil {
				return err
			}
		}
	}
	s.end(now, reason.Error())
	return nil
}

// end closes the connection when the edge has had time to read what was sent last; a healthy one leaves before.
func (s *sender) end(now time.Time, reason string) {
	s.ending, s.endAt = reason, now.Add(farewellTime)
	s.m.counters.refused.Add(1)
	s.m.cfg.Logger.Warn("session ended, the edge is told", "edge", s.c.edge, "remote", s.c.Remote(), "reason", reason)
	s.sync(false)
	s.by(s.endAt)
}

// giveBack keeps what came in until it can be answered.
func (s *sender) giveBack(in inbox) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	now := &s.c.in
	now.opened = now.opened || in.opened
	now.again = now.again || in.again
	now.acks = now.acks || in.acks
	now.reported = now.reported || in.reported
	now.supersede = now.supersede || in.supersede
	now.fetches = append(in.fetches, now.fetches...)
	now.filters = append(in.filters, now.filters...)
}

// look takes a new snapshot, unless the list changed a moment ago: then it waits for the rest of the burst. fresh says that
// the snapshot holds every change up to now.
func (s *sender) look(now time.Time) (fresh bool) {
	if next := s.listAt.Add(coalesce); s.snap.Synced && now.Before(next) {
		s.by(next)
		return false
	}
	before := s.snap.List
	s.snap = s.view.Snapshot(now)
	s.by(s.snap.RetryAt)
	if s.snap.List != before {
		s.listAt = now
		s.tell = true // which pods and models are the edge's may have changed
	}
	return s.snap.Fresh
}

// open answers the hello.
func (s *sender) open(now time.Time) error {
	session, err := s.newSession(now)
	if err != nil {
		return err
	}
	superseded, err := s.m.claim(s.c)
	if err != nil {
		return err
	}
	s.session, s.tell = session, true
	s.m.counters.sessions.Add(1)
	s.m.counters.opened.Add(1)
	hello := s.c.hello()
	s.m.cfg.Logger.Info("session opened", "edge", s.c.edge, "remote", s.c.Remote(), "session", hello.Session,
		"instance", hexInstance(hello), "agent", hello.AgentVersion)
	if superseded {
		s.supersede(now)
	}
	return nil
}

func (s *sender) newSession(now time.Time) (*desired.Session, error) {
	session, err := desired.NewSession(desired.SessionConfig{
		Cluster: s.m.cluster, Edge: s.c.edge, EdgeKey: s.c.Identity().Key, Key: s.m.cfg.Key, Objects: s.view,
		AccountHeld: s.c.accountHeld(),
	}, s.c.hello(), now)
	if err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	return session, nil
}

func (s *sender) supersede(now time.Time) {
	s.m.counters.superseded.Add(1)
	s.m.cfg.Logger.Warn("another instance with the same identity took over, this one is told to stop", "edge", s.c.edge,
		"remote", s.c.Remote(), "instance", s.c.instance())
	s.session.Supersede(now)
}

// syncRound feeds the session and sends what it wants sent.
func (s *sender) syncRound(now time.Time, in inbox, fresh bool) (busy bool, err error) {
	if in.supersede {
		s.farewell, s.received = true, s.c.Received()
		s.supersede(now)
	} else if err := s.held(now); err != nil {
		return false, err
	}
	if s.snap.List != nil {
		s.session.SetList(now, s.snap.List)
	}
	if s.proofIs && fresh {
		s.proofIs = false
		s.session.Proved(now, s.snap.List)
	}
	for _, f := range in.fetches {
		s.m.counters.fetches.Add(1)
		s.session.Fetch(now, f.digest, f.offset)
	}
	if in.reported {
		s.session.Reported(now, s.c.reportedList())
	}
	for _, a := range s.session.Poll(now) {
		busy = true
		switch a := a.(type) {
		case desired.Send:
			if err := s.send(a.Topic, a.Payload, a.Retain); err != nil {
				return false, err
			}
		case desired.Prove:
			s.wanted = true
		case desired.Close:
			if !s.farewell {
				return false, errors.New(a.Reason)
			}
			s.end(now, a.Reason)
			return false, nil
		}
	}
	s.prove(now)
	s.by(s.session.Deadline())
	s.sync(s.session.InSync())
	return busy, nil
}

// held ends the session if the Edge's status says that another hub holds a newer one.
func (s *sender) held(now time.Time) error {
	h, mine := s.snap.Holder, s.c.hello()
	if !h.Online || h.Hub == s.m.cfg.HubName || h.Session <= int64(mine.Session) {
		return nil
	}
	if h.Instance != hexInstance(mine) {
		s.supersede(now)
		for _, a := range s.session.Poll(now) {
			if a, ok := a.(desired.Send); ok {
				if err := s.send(a.Topic, a.Payload, a.Retain); err != nil {
					return err
				}
			}
		}
	}
	return errSilent(fmt.Sprintf("hub %q holds a newer session of this edge", h.Hub))
}

func (s *sender) sync(inSync bool) {
	if inSync == s.inSync {
		return
	}
	s.inSync, s.tell = inSync, true
	if inSync {
		s.m.counters.inSync.Add(1)
	} else {
		s.m.counters.inSync.Add(-1)
	}
}

// prove asks the source in a goroutine of its own, one at a time.
func (s *sender) prove(now time.Time) {
	if !s.wanted || s.proving {
		return
	}
	if now.Before(s.proofAt) {
		s.by(s.proofAt)
		return
	}
	s.wanted, s.proving = false, true
	ctx, cancel := context.WithCancel(context.Background())
	s.unprove = cancel
	s.proofs.Go(func() {
		defer cancel()
		select {
		case s.m.proofs <- struct{}{}:
			defer func() { <-s.m.proofs }()
		case <-ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(ctx, proofTimeout)
		defer cancel()
		s.proved <- s.m.cfg.Upstream.Prove(ctx, s.c.edge)
		s.c.wake()
	})
}

func (s *sender) proofEnded(err error) {
	s.proving = false
	if err == nil {
		s.m.counters.proofs.Add(1)
		s.proofIs, s.pause = true, proofPause
		return
	}
	s.m.counters.proofsFailed.Add(1)
	s.m.cfg.Logger.Warn("the view of an edge could not be proved, no change is sent to it", "edge", s.c.edge, "err", err, "retry", s.pause)
	s.wanted, s.proofAt = true, time.Now().Add(s.pause)
	s.pause = min(2*s.pause, proofPauseMax)
}

func (s *sender) sendAck() (sent bool, err error) {
	if !s.acksOn || s.session == nil {
		return false, nil
	}
	ack := s.c.acknowledgement(s.acksFull)
	s.acksFull = false
	if ack == nil {
		return false, nil
	}
	return true, s.send(topic.Topic{Kind: topic.Ack, Edge: s.c.edge}.String(), s.session.SignAck(ack), false)
}

// send writes one message and counts it.
func (s *sender) send(name string, payload []byte, retain bool) error {
	if err := s.c.Send(name, payload, retain); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	c := &s.m.counters
	c.sentBytes.Add(uint64(len(payload)))
	t, _ := topic.Parse(name)
	switch t.Kind {
	case topic.Index:
		c.heads.Add(1)
	case topic.Objects, topic.Models, topic.Push:
		c.chunks.Add(1)
	case topic.Ack:
		c.acks.Add(1)
	default:
		c.plain.Add(1)
	}
	return nil
}

// account hands the edge's state on after a change, and now and then without one.
func (s *sender) account(now time.Time, in inbox) {
	if s.session == nil && !s.snap.Plain {
		return
	}
	if s.session == nil {
		s.m.attend(s.c)
	}
	if !s.tell && !in.reported && now.Before(s.told.Add(contact)) {
		s.by(s.told.Add(contact))
		return
	}
	s.tell, s.told = false, now
	s.by(now.Add(contact))
	state := s.c.state()
	state.Synced = s.inSync
	state.keepOnly(s.view, s.snap.List)
	s.m.publish(s.c, state)
}
