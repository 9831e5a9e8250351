package fault

import (
	"context"
	"fmt"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// goroutines of both hubs.
type goroutines struct{ hub, edge float64 }

func count(t *testing.T, s *rigtest.Site, e *rig.Edge) goroutines {
	t.Helper()
	return goroutines{metric(t, s.Hub.HTTP, "go_goroutines"), metric(t, e.HTTP, "go_goroutines")}
}

// slack is what differs between two looks at rest: the looks themselves, and connections of them that idle.
const slack = 4

// atRest waits until both hubs have no more goroutines than before.
func atRest(t *testing.T, s *rigtest.Site, e *rig.Edge, before goroutines) {
	t.Helper()
	rigtest.Eventually(t, "the goroutines are back at the baseline", func() error {
		if now := count(t, s, e); now.hub > before.hub+slack || now.edge > before.edge+slack {
			return fmt.Errorf("%+v, before %+v", now, before)
		}
		return nil
	})
}

// G1 and G3: the box's provider gives it another address again and again, and in the end the router forgets the connection
// without a word to either side. The edge follows by itself, with nothing left over of the connections that died.
func TestG1G3AddressChangesAndMappingIsForgotten(t *testing.T) {
	t.Parallel()
	net := newNetwork(t)
	s, e := net.start()
	n := rigtest.NewNumbers(t, e, "press")
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v0"))
	publishNow(t, n, 20)
	settled(t, s, e, "a")
	before := count(t, s, e)
	session := func() uint64 {
		st, err := e.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Link.Session
	}
	for i := range 6 {
		old := session()
		net.moveOutside()
		publishNow(t, n, 10) // what the edge sends now comes from an address that the hub does not know
		rigtest.Eventually(t, "another session", func() error {
			if now := session(); now == old {
				return fmt.Errorf("session %d", now)
			}
			return nil
		})
		s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", fmt.Sprintf("v%d", i+1)))
		settled(t, s, e, "a")
	}
	atRest(t, s, e, before)

	net.iptables("-A", "FORWARD", "-p", "tcp", "--tcp-flags", "RST", "RST", "-j", "DROP")
	net.iptables("-A", "FORWARD", "-j", "DROP")
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	publishNow(t, n, 20)
	net.moveOutside()
	net.iptables("-D", "FORWARD", "-j", "DROP")
	// Neither side hears of the end: the edge learns it from silence after its keepalive and stall timeout, 90 s together.
	ctx, cancel := context.WithTimeout(t.Context(), 3*rigtest.Soon)
	defer cancel()
	if err := rig.Until(ctx, func() error { return s.Holds(e, true, "a", "b") }); err != nil {
		t.Fatal(err)
	}
	settled(t, s, e, "a", "b")
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
	atRest(t, s, e, before)
}

// G1 and G3: every third packet is lost, both ways, also those of the first connection.
func TestG1G3LossyLink(t *testing.T) {
	t.Parallel()
	net := newNetwork(t)
	net.iptables("-A", "FORWARD", "-m", "statistic", "--mode", "random", "--probability", "0.3", "-j", "DROP")
	s, e := net.start()
	n := rigtest.NewNumbers(t, e, "press")
	ctx, cancel := context.WithTimeout(t.Context(), 3*rigtest.Soon)
	defer cancel()
	converged := func(pods ...string) {
		t.Helper()
		publishNow(t, n, 50)
		err := rig.Until(ctx, func() error { return s.Holds(e, true, pods...) })
		if err == nil {
			err = rig.Until(ctx, func() error { return s.Drained(e, "readings") })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	converged("a")
	before := count(t, s, e)
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	converged("a", "b")
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
	atRest(t, s, e, before)
}

// G1 and G3: at 64 kbit/s a ConfigMap of 1 MiB, the largest that Kubernetes takes, comes down while a backlog goes up: neither
// starves the other, nor the connection. It compresses to a half, as configuration does at least.
func TestG1G3SlowLink(t *testing.T) {
	t.Parallel()
	net := newNetwork(t)
	s, e := net.start()
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 10)
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	settled(t, s, e, "a")
	before := count(t, s, e)
	for _, dev := range []string{"out0", "in0"} {
		net.in(net.router, "tc", "qdisc", "add", "dev", dev, "root", "tbf", "rate", "64kbit", "burst", "4kb", "latency", "1s")
	}
	n.Filler = rigtest.Noise(2 << 10)
	publishNow(t, n, 60)
	began, err := e.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.Write("config.yaml", fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: large}\ndata:\n  text: |\n    %x\n---\n", rigtest.Noise((1<<19)-100))+
		rigtest.PodManifest("b", "dock-1", "v1")+"    envFrom: [{configMapRef: {name: large}}]\n")
	ctx, cancel := context.WithTimeout(t.Context(), 3*rigtest.Soon)
	defer cancel()
	if err := rig.Until(ctx, func() error { return s.Holds(e, true, "a", "b") }); err != nil {
		t.Fatal(err)
	}
	if err := rig.Until(ctx, func() error { return s.Drained(e, "readings") }); err != nil {
		t.Fatal(err)
	}
	st, err := e.Status(t.Context())
	if err != nil || st.Link.Session != began.Link.Session {
		t.Errorf("the connection did not last: session %d, then %d (%v)", began.Link.Session, st.Link.Session, err)
	}
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
	atRest(t, s, e, before)
}
