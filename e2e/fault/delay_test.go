package fault

import (
	"fmt"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// G1 and G3: every byte is a second on its way, in each direction, as over satellites. A backlog is replayed while specs
// change: both arrive, the readings once, and the link holds all the time instead of being given up and built anew. The delay
// is that of a relay: TCP itself sees short ways, and connecting is quick.
func TestG1G3LongDelay(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings+"telemetry: {backlogRate: 16KiB}\n")
	s.Links["dock-1"].Delay(time.Second)
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	s.Write("p0.yaml", rigtest.PodManifest("p0", "dock-1", "v1"))
	publishNow(t, n, 10)
	settled(t, s, e, "p0")
	before := count(t, s, e)
	session := func() uint64 {
		t.Helper()
		st, err := e.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Link.Session
	}
	first := session()

	s.Cut("dock-1")
	linkIs(t, s, e, "down")
	n.Filler = rigtest.Noise(1 << 10)
	publishNow(t, n, 300)
	opened := metric(t, s.Hub.HTTP, "longshore_sessions_opened_total")
	s.Restore("dock-1")
	rigtest.Eventually(t, "another session", func() error {
		if now := session(); now == first {
			return fmt.Errorf("session %d", now)
		}
		return nil
	})
	began := session()
	pods, held := []string{"p0"}, uint64(1)
	for held > 0 && len(pods) < 10 {
		pod := fmt.Sprintf("p%d", len(pods))
		pods = append(pods, pod)
		s.Write(pod+".yaml", rigtest.PodManifest(pod, "dock-1", "v1"))
		rigtest.Eventually(t, "the edge follows", func() error { return s.Holds(e, true, pods...) })
		st, err := e.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held = st.Stream("readings").Held
	}
	if len(pods) < 3 {
		t.Error("the backlog was gone before specs changed: the test shows little")
	}
	settled(t, s, e, pods...)
	if now := session(); now != began {
		t.Errorf("the connection did not last: session %d, then %d", began, now)
	}
	if now := metric(t, s.Hub.HTTP, "longshore_sessions_opened_total"); now != opened+1 {
		t.Errorf("the hub saw %.0f sessions begin since the link was cut, want 1", now-opened)
	}
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
	atRest(t, s, e, before)
}
