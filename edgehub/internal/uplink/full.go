package uplink

import (
	"context"
	"errors"
	"time"

	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// roomKey is written to find out whether the store has room again.
	roomKey = "uplink/room"
	// roomPause is how often that is tried.
	roomPause = time.Second
)

// serve is the session's incoming side from its first message to its last.
func (s *session) serve(ctx context.Context) error {
	err := s.loop(ctx)
	if errors.Is(err, desired.ErrDiskFull) {
		return s.deliver(ctx, err)
	}
	return err
}

// deliver goes on with telemetry alone after what the hub sent found no room on the disk: what the cloud acknowledges makes room. It
// returns the cause, so that the next session begins with what could not be stored, as soon as there is some.
func (s *session) deliver(ctx context.Context, cause error) error {
	s.up.cfg.Logger.Error("cannot store what the hub sends; only telemetry goes on until there is room", "error", cause)
	s.up.setStoreErr(cause)
	tick := time.NewTicker(roomPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m, ok := <-s.conn.Messages():
			if !ok {
				<-ctx.Done()
				return ctx.Err()
			}
			if t, err := topic.Parse(m.Topic); err == nil && t.Kind == topic.Ack {
				s.acknowledge(m)
			}
		case <-tick.C:
			if err := s.up.cfg.Store.Put(roomKey, nil); !errors.Is(err, desired.ErrDiskFull) {
				return cause
			}
		}
	}
}
