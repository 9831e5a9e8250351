package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// knows says whether the hub has an Edge of that name.
func (s *site) knows(name string) error {
	edges, err := s.hub.Edges(s.t.Context())
	if _, ok := edges[name]; err == nil && !ok {
		err = fmt.Errorf("the hub does not know %s", name)
	}
	return err
}

// holds says whether the edge holds exactly these pods, and confirms so to the hub if it is linked.
func (s *site) holds(e *rig.Edge, linked bool, pods ...string) error {
	st, err := e.Status(s.t.Context())
	if err != nil {
		return err
	}
	var names []string
	for _, p := range st.Pods {
		names = append(names, p.Name)
	}
	slices.Sort(names)
	if !slices.Equal(names, pods) || linked && !st.List.Synced {
		return fmt.Errorf("%s holds %v, synced %t (link %s %s)", e.Name, names, st.List.Synced, st.Link.State, st.Link.Error)
	}
	if !linked {
		return nil
	}
	edges, err := s.hub.Edges(s.t.Context())
	if h := edges[e.Name]; err == nil && (!h.Synced || len(h.Pods) != len(pods)) {
		err = fmt.Errorf("the hub has of %s: %+v", e.Name, h)
	}
	return err
}

// G1 and G6: whatever happens to links and to the hub, an edge ends with what the folder says; a hub killed with kill -9
// has nothing to lose.
func TestG1G6ConvergesOverCutsAndKills(t *testing.T) {
	s := newSite(t)
	s.startHub()
	e := s.edge("dock-1", "")
	s.start(e)
	s.write("a.yaml", podManifest("a", "dock-1", "v1"))
	eventually(t, "first pod", func() error { return s.holds(e, true, "a") })

	s.cut("dock-1")
	s.write("b.yaml", podManifest("b", "dock-1", "v1"))
	if err := os.Remove(s.hub.Manifests() + "/a.yaml"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the link is seen down", func() error {
		st, err := e.Status(t.Context())
		if err == nil && st.Link.State != "down" {
			err = fmt.Errorf("link is %s", st.Link.State)
		}
		return err
	})
	if err := s.holds(e, false, "a"); err != nil {
		t.Error("without a link the edge must keep what it has:", err)
	}
	s.restore("dock-1")
	eventually(t, "after the cut", func() error { return s.holds(e, true, "b") })

	s.hub.Kill()
	s.write("c.yaml", podManifest("c", "dock-1", "v1"))
	s.startHub()
	eventually(t, "after kill -9 of the hub", func() error { return s.holds(e, true, "b", "c") })

	e.Kill()
	s.write("b.yaml", podManifest("b", "dock-1", "v2"))
	s.write("d.yaml", podManifest("d", "dock-1", "v1"))
	s.start(e)
	eventually(t, "after kill -9 of the edge", func() error { return s.holds(e, true, "b", "c", "d") })
	st, err := e.Status(t.Context())
	if err != nil || len(st.Pods) == 0 || st.Pods[0].Reason != "NoRuntime" {
		t.Errorf("pods must be reported as waiting for a runtime: %+v, %v", st.Pods, err)
	}
}

// A device that knows MQTT and nothing else must read the same specs before and after a hub was killed (G6), and see changes
// and deletions live.
func TestG6PlainTopicsOutliveTheHub(t *testing.T) {
	s := newSite(t)
	s.startHub()
	s.edge("panel", "")
	s.write("pods.yaml", podManifest("a", "panel", "v1")+"---\n"+podManifest("b", "panel", "v1"))
	token := password(t, s, "panel")
	retained := func() (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		out, err := mosquitto(ctx, t, s.hub.MQTT, "mosquitto_sub", "-u", "panel", "-P", token, "-t", "longshore/v1/nodes/panel/plain/#",
			"-F", "%r %t %p", "-C", "3", "-W", "20")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		slices.Sort(lines)
		if err == nil && (len(lines) != 3 || !strings.HasPrefix(lines[0], "1 ")) {
			err = fmt.Errorf("not three retained messages")
		}
		return strings.Join(lines, "\n"), err
	}
	var before string
	eventually(t, "specs as plain JSON", func() (err error) {
		before, err = retained()
		if err == nil && (!strings.Contains(before, "plain/index") || !strings.Contains(before, "plain/pods/default.a")) {
			err = fmt.Errorf("got %q", before)
		}
		return err
	})
	s.hub.Kill()
	s.startHub()
	after, err := retained()
	if err != nil || after != before {
		t.Errorf("after kill -9: %v\n%s\nbefore:\n%s", err, after, before)
	}

	// Live: a subscriber that stays sees the change and the deletion.
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	live := make(chan string, 1)
	go func() {
		out, _ := mosquitto(ctx, t, s.hub.MQTT, "mosquitto_sub", "-u", "panel", "-P", token, "-t", "longshore/v1/nodes/panel/plain/index", "-C", "2", "-W", "60")
		live <- out
	}()
	eventually(t, "the subscriber is connected", func() error {
		b, err := rig.Get(ctx, "http://"+s.hub.HTTP+"/metrics")
		if err == nil && !strings.Contains(string(b), "longshore_") {
			err = fmt.Errorf("no metrics")
		}
		return err
	})
	// The index may come before or after the subscription: either way its last line names only a.
	s.write("pods.yaml", podManifest("a", "panel", "v1"))
	select {
	case out := <-live:
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if last := lines[len(lines)-1]; !strings.Contains(last, `"a"`) || strings.Contains(last, `"b"`) {
			t.Errorf("the index after the deletion: %s", out)
		}
	case <-ctx.Done():
		t.Fatal("the subscriber saw nothing")
	}
}

const readings = "streams:\n- name: readings\n  topics: [\"sensors/#\"]\n"

// numbers publishes numbered readings until it is told to stop, and knows which were acknowledged.
type numbers struct {
	device *rig.Device

	mu     sync.Mutex
	acked  map[string]bool // value: had to be sent again
	sent   int
	filler string
}

func (n *numbers) publish(ctx context.Context, count int) error {
	for range count {
		n.mu.Lock()
		n.sent++
		payload := fmt.Sprintf("%06d%s", n.sent, n.filler)
		n.mu.Unlock()
		again, err := n.device.Publish(ctx, "sensors/"+n.device.ClientID, []byte(payload))
		if err != nil {
			return err
		}
		n.mu.Lock()
		n.acked[payload[:6]] = again
		n.mu.Unlock()
	}
	return nil
}

func (n *numbers) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.acked)
}

// drained says whether the edge holds nothing any more and the hub's account of the stream is balanced.
func (s *site) drained(e *rig.Edge, stream string) error {
	st, err := e.Status(s.t.Context())
	if err != nil {
		return err
	}
	sum, err := s.hub.Sum(s.t.Context(), e.Name, stream)
	if held := st.Stream(stream).Held; err == nil && (held > 0 || !sum.Balanced() || sum.Accepted == 0) {
		err = fmt.Errorf("held %d, %+v", held, sum)
	}
	return err
}

// namespace makes a network namespace with nothing but loopback: a box without any network.
func namespace(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root for a network namespace")
	}
	ip := need(t, "ip")
	name := fmt.Sprintf("longshore-%d", os.Getpid())
	for _, args := range [][]string{{"netns", "add", name}, {"netns", "exec", name, ip, "link", "set", "lo", "up"}} {
		if out, err := exec.Command(ip, args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command(ip, "netns", "del", name).Run() })
	return name
}

// G2 and G3: numbered readings, their acknowledgements logged; the link cut, the agent killed half way, a cold boot in a
// network namespace without any network, where a foreign client goes on publishing; then the link again. Every number that
// was acknowledged is in the sink, and nothing is there twice under one name.
func TestG2G3EveryAcknowledgedReadingArrives(t *testing.T) {
	s := newSite(t)
	s.startHub()
	s.write("pod.yaml", podManifest("a", "dock-1", "v1"))
	e := s.edge("dock-1", readings)
	s.start(e)
	eventually(t, "first sync", func() error { return s.holds(e, true, "a") })
	ctx, cancel := context.WithTimeout(t.Context(), 2*soon)
	defer cancel()
	n := &numbers{device: &rig.Device{Address: e.Broker, ClientID: "press-7"}, acked: map[string]bool{}}
	defer n.device.Close()
	if err := n.publish(ctx, 200); err != nil {
		t.Fatal(err)
	}
	s.cut("dock-1")
	published := make(chan error, 1)
	go func() { published <- n.publish(ctx, 600) }()
	eventually(t, "readings while the link is down", func() error {
		if c := n.count(); c < 400 {
			return fmt.Errorf("%d acknowledged", c)
		}
		return nil
	})
	e.Kill()
	s.start(e)
	if err := <-published; err != nil {
		t.Fatal(err)
	}
	e.Kill()

	ns := namespace(t)
	inside := []string{need(t, "ip"), "netns", "exec", ns}
	if err := e.Start(ctx, inside...); err != nil {
		t.Fatal(err)
	}
	box := e.Process
	t.Cleanup(func() { s.end(box) })
	status := func() (string, error) {
		out, err := exec.CommandContext(ctx, e.Bin.Path("edgehub"), "status", "--state", e.State()).CombinedOutput()
		return string(out), err
	}
	eventually(t, "a cold boot without any network shows the confirmed pod", func() error {
		out, err := status()
		if err == nil && !strings.Contains(out, "NoRuntime") {
			err = fmt.Errorf("got %s", out)
		}
		return err
	})
	var foreign strings.Builder
	for i := range 300 {
		fmt.Fprintf(&foreign, "9%05d\n", i)
	}
	_, port, _ := net.SplitHostPort(e.Broker)
	pub := exec.CommandContext(ctx, inside[0], append(inside[1:], need(t, "mosquitto_pub"), "-h", "127.0.0.1", "-p", port, "-i", "foreign", "-q", "1", "-t", "sensors/foreign", "-l", "-d")...)
	pub.Stdin = strings.NewReader(foreign.String())
	out, err := pub.CombinedOutput()
	acks := strings.Count(string(out), "received PUBACK")
	if err != nil || acks != 300 {
		t.Fatalf("mosquitto_pub: %v, %d acknowledged; %s", err, acks, box.Tail(10))
	}
	box.Kill()

	s.restore("dock-1")
	s.start(e)
	eventually(t, "the backlog is replayed", func() error { return s.drained(e, "readings") })
	s.checkRecords(n, e.Name, 300)
}

// checkRecords holds what the sink has against what was acknowledged.
func (s *site) checkRecords(n *numbers, edge string, foreign int) {
	s.t.Helper()
	records, err := s.hub.Records(s.t.Context(), edge, "readings")
	if err != nil {
		s.t.Fatal(err)
	}
	names, times := map[string]bool{}, map[string]int{}
	others := 0
	for _, r := range records {
		name := fmt.Sprintf("%s/%d", r.Epoch, r.Sequence)
		if names[name] {
			s.t.Errorf("record %s is there twice", name)
		}
		names[name] = true
		if strings.HasPrefix(r.Payload, "9") {
			others++
			continue
		}
		times[r.Payload[:6]]++
	}
	for number, again := range n.acked {
		if c := times[number]; c == 0 || c > 1 && !again {
			s.t.Errorf("acknowledged reading %s is %d times in the sink", number, c)
		}
	}
	if others != foreign {
		s.t.Errorf("%d readings of the foreign client, want %d", others, foreign)
	}
	if len(n.acked) == 0 {
		s.t.Error("nothing was acknowledged")
	}
}

// G3 and G4: a full quota drops the oldest readings, in the ledger and not in silence; the disk stays within its bound.
func TestG3G4QuotaIsLedgered(t *testing.T) {
	s := newSite(t)
	s.startHub()
	e := s.edge("dock-1", readings+"  maxBytes: 1MiB\n")
	s.start(e)
	eventually(t, "first sync", func() error { return s.holds(e, true) })
	s.cut("dock-1")
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	n := &numbers{device: &rig.Device{Address: e.Broker, ClientID: "press-7"}, acked: map[string]bool{}}
	defer n.device.Close()
	for range 6 {
		n.filler = noise(32 << 10)
		if err := n.publish(ctx, 20); err != nil {
			t.Fatal(err)
		}
		st, err := e.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if held := st.Stream("readings").HeldBytes; held > 1<<20 {
			t.Errorf("the stream holds %d bytes, its quota is 1 MiB", held)
		}
	}
	s.restore("dock-1")
	eventually(t, "the rest is replayed", func() error { return s.drained(e, "readings") })
	sum, err := s.hub.Sum(ctx, "dock-1", "readings")
	if err != nil || sum.Delivered+sum.Ledgered != uint64(n.count()) || sum.Ledgered == 0 || sum.Delivered == 0 {
		t.Errorf("acknowledged %d, account %+v, %v", n.count(), sum, err)
	}
	records, err := s.hub.Records(ctx, "dock-1", "readings")
	if err != nil || uint64(len(records)) != sum.Delivered {
		t.Errorf("%d records in the sink, %d delivered, %v", len(records), sum.Delivered, err)
	}
}

// noise is text that does not compress well: every run is another part of a linear congruence.
func noise(n int) string {
	b := make([]byte, n)
	x := uint64(time.Now().UnixNano())
	for i := range b {
		x = x*6364136223846793005 + 1442695040888963407
		b[i] = '!' + byte(x>>33)%90
	}
	return string(b)
}
