package uplink

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/longshore-edge/longshore/sync/desired"
)

// noRoom is a store on a full disk until there is room.
type noRoom struct {
	Store
	room     *atomic.Bool
	sessions *atomic.Int64
}

func (s noRoom) NextSession() (uint64, error) {
	s.sessions.Add(1)
	return s.Store.NextSession()
}

func (s noRoom) Apply(a desired.EdgeAction) error {
	if !s.room.Load() {
		return desired.ErrDiskFull
	}
	return s.Store.Apply(a)
}

func (s noRoom) Put(key string, value []byte) error {
	if !s.room.Load() {
		return desired.ErrDiskFull
	}
	return s.Store.Put(key, value)
}

// G1, G3: a disk that is full of telemetry would stay full, if a list that finds no room kept the telemetry from going up.
func TestTelemetryGoesOnWithoutRoomForTheList(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	want := h.hold("1")
	var room atomic.Bool
	var sessions atomic.Int64
	e := newEdge(t, h, t.TempDir(), func(c *Config) { c.Store = noRoom{c.Store, &room, &sessions} })
	eventually(t, "the status says why", func() bool { return e.Status().StoreErr != nil })
	for i := range 200 {
		e.append("vibration", fmt.Sprint("reading ", i))
	}
	eventually(t, "everything is acknowledged", func() bool {
		streams, _ := e.outbox.Stats()
		return len(streams) == 1 && streams[0].Acked == 200
	})
	if n := sessions.Load(); n != 1 {
		t.Errorf("it took %d sessions", n)
	}
	room.Store(true)
	eventually(t, "the edge catches up", func() bool { return h.inSync() && e.Status().Replica.Committed == want.Digest })
}
