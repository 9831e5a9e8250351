package uplink

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// session is one connection's incoming side: it drives the replica and feeds the writer.
type session struct {
	up     *Uplink
	conn   *mqttconn.Session
	number uint64
	writer *writer
	head   uint64 // counter of the newest head believed; until there is one the hub has not proved who it is
}

var errUnproved = errors.New("acknowledgement before the hub proved itself with a head for this session")

func newSession(up *Uplink, conn *mqttconn.Session, number uint64) *session {
	return &session{up: up, conn: conn, number: number, writer: newWriter(up, conn, number)}
}

// loop takes what arrives and does what the replica wants done, until the connection ends.
func (s *session) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if err := s.act(); err != nil {
			return err
		}
		if d := s.deadline(); d.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(d))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m, ok := <-s.conn.Messages():
			if !ok {
				<-ctx.Done()
				return ctx.Err()
			}
			s.receive(m)
		case <-s.writer.idle:
		case <-timer.C:
		}
	}
}

func (s *session) deadline() time.Time {
	s.up.mu.Lock()
	defer s.up.mu.Unlock()
	return s.up.replica.Deadline()
}

// act executes the replica's actions in order. It asks for more only when the writer has taken what it was given before:
// that bounds what waits.
func (s *session) act() error {
	for s.writer.wantsActions() {
		s.up.mu.Lock()
		actions := s.up.replica.Poll(time.Now())
		st := s.up.replica.Status()
		s.up.mu.Unlock()
		switch {
		case st.Superseded:
			return errSuperseded
		case st.Unknown:
			return fmt.Errorf("the hub knows no Edge %q (any more): create it (again), or take this box out of service; "+
				"until then it keeps what it holds", s.up.cfg.Edge)
		}
		if len(actions) == 0 {
			return nil
		}
		for _, a := range actions {
			if err := s.execute(a); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *session) execute(a desired.EdgeAction) error {
	switch a := a.(type) {
	case desired.Publish, desired.Subscribe:
		s.writer.do(a)
		return nil
	case desired.Commit:
		if err := s.up.cfg.Store.Apply(a); err != nil {
			return &storeError{err}
		}
		s.up.setStoreErr(nil)
		s.up.cfg.Logger.Info("list committed", "list", hex.EncodeToString(a.List.Digest[:]), "objects", len(a.List.Entries))
		s.up.cfg.Committed()
		s.writer.committed(a.List.Digest)
	default:
		if err := s.up.cfg.Store.Apply(a); err != nil {
			return &storeError{err}
		}
	}
	return nil
}

func (s *session) receive(m mqttconn.Message) {
	t, err := topic.Parse(m.Topic)
	if err != nil {
		s.up.reject(m.Topic, err)
		return
	}
	if t.Kind == topic.Ack {
		s.acknowledge(m)
		return
	}
	s.up.mu.Lock()
	err = s.up.replica.Receive(time.Now(), m.Topic, m.Payload)
	st := s.up.replica.Status()
	s.up.mu.Unlock()
	if err != nil {
		s.up.reject(m.Topic, err)
	}
	// Another head that names the list held: the hub has not heard that it is.
	if st.Head > s.head && s.head > 0 && st.Synced {
		s.writer.committed(st.Committed)
	}
	if s.head == 0 && st.Head > 0 && !st.Superseded && !st.Unknown {
		s.writer.trust(st.AccountHeld)
	}
	s.head = st.Head
}

// acknowledge gives back what the sink holds and opens the window again. A hub that has not proved itself in this session
// cannot make the edge drop anything.
func (s *session) acknowledge(m mqttconn.Message) {
	if s.head == 0 {
		s.up.reject(m.Topic, errUnproved)
		return
	}
	s.up.mu.Lock()
	ack, err := s.up.replica.OpenAck(m.Payload)
	s.up.mu.Unlock()
	if err != nil {
		s.up.reject(m.Topic, err)
		return
	}
	if err := s.up.cfg.Outbox.Ack(ack); err != nil {
		s.up.reject(m.Topic, err)
		return
	}
	s.up.mu.Lock()
	s.writer.flow.acked(ack, time.Now())
	s.up.mu.Unlock()
	s.writer.poke()
}
