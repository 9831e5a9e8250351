package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// G1 and G6: whatever happens to links and to the hub, an edge ends with what the folder says; a hub killed with kill -9
// has nothing to lose.
func TestG1G6ConvergesOverCutsAndKills(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", "")
	s.Start(e)
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	rigtest.Eventually(t, "first pod", func() error { return s.Holds(e, true, "a") })

	s.Cut("dock-1")
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	if err := os.Remove(s.Hub.Manifests() + "/a.yaml"); err != nil {
		t.Fatal(err)
	}
	rigtest.Eventually(t, "the link is seen down", func() error {
		st, err := e.Status(t.Context())
		if err == nil && st.Link.State != "down" {
			err = fmt.Errorf("link is %s", st.Link.State)
		}
		return err
	})
	if err := s.Holds(e, false, "a"); err != nil {
		t.Error("without a link the edge must keep what it has:", err)
	}
	s.Restore("dock-1")
	rigtest.Eventually(t, "after the cut", func() error { return s.Holds(e, true, "b") })

	s.Hub.Kill()
	s.Write("c.yaml", rigtest.PodManifest("c", "dock-1", "v1"))
	s.StartHub()
	rigtest.Eventually(t, "after kill -9 of the hub", func() error { return s.Holds(e, true, "b", "c") })

	e.Kill()
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v2"))
	s.Write("d.yaml", rigtest.PodManifest("d", "dock-1", "v1"))
	s.Start(e)
	rigtest.Eventually(t, "after kill -9 of the edge", func() error { return s.Holds(e, true, "b", "c", "d") })
	st, err := e.Status(t.Context())
	if err != nil || len(st.Pods) == 0 || st.Pods[0].Reason != "NoRuntime" {
		t.Errorf("pods must be reported as waiting for a runtime: %+v, %v", st.Pods, err)
	}
}

// A device that knows MQTT and nothing else must read the same specs before and after a hub was killed (G6), and see changes
// and deletions live.
func TestG6PlainTopicsOutliveTheHub(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Edge("panel", "")
	s.Write("pods.yaml", rigtest.PodManifest("a", "panel", "v1")+"---\n"+rigtest.PodManifest("b", "panel", "v1"))
	token := password(t, s, "panel")
	retained := func() (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
		defer cancel()
		out, err := rigtest.Mosquitto(ctx, t, s.Hub.MQTT, "mosquitto_sub", "-u", "panel", "-P", token, "-t", "longshore/v1/nodes/panel/plain/#",
			"-F", "%r %t %p", "-C", "3", "-W", "20")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		slices.Sort(lines)
		if err == nil && (len(lines) != 3 || !strings.HasPrefix(lines[0], "1 ")) {
			err = fmt.Errorf("not three retained messages")
		}
		return strings.Join(lines, "\n"), err
	}
	var before string
	rigtest.Eventually(t, "specs as plain JSON", func() (err error) {
		before, err = retained()
		if err == nil && (!strings.Contains(before, "plain/index") || !strings.Contains(before, "plain/pods/default.a")) {
			err = fmt.Errorf("got %q", before)
		}
		return err
	})
	s.Hub.Kill()
	s.StartHub()
	after, err := retained()
	if err != nil || after != before {
		t.Errorf("after kill -9: %v\n%s\nbefore:\n%s", err, after, before)
	}

	// Live: a subscriber that stays sees the change and the deletion.
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	live := make(chan string, 1)
	go func() {
		out, _ := rigtest.Mosquitto(ctx, t, s.Hub.MQTT, "mosquitto_sub", "-u", "panel", "-P", token, "-t", "longshore/v1/nodes/panel/plain/index", "-C", "2", "-W", "60")
		live <- out
	}()
	rigtest.Eventually(t, "the subscriber is connected", func() error {
		b, err := rig.Get(ctx, "http://"+s.Hub.HTTP+"/metrics")
		if err == nil && !strings.Contains(string(b), "longshore_") {
			err = fmt.Errorf("no metrics")
		}
		return err
	})
	// The index may come before or after the subscription: either way its last line names only a.
	s.Write("pods.yaml", rigtest.PodManifest("a", "panel", "v1"))
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

// namespace makes a network namespace with nothing but loopback: a box without any network.
func namespace(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root for a network namespace")
	}
	ip := rigtest.Need(t, "ip")
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
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Write("pod.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	e := s.Edge("dock-1", rigtest.Readings)
	s.Start(e)
	rigtest.Eventually(t, "first sync", func() error { return s.Holds(e, true, "a") })
	ctx, cancel := context.WithTimeout(t.Context(), 2*rigtest.Soon)
	defer cancel()
	n := rigtest.NewNumbers(t, e, "press-7")
	if err := n.Publish(ctx, 200); err != nil {
		t.Fatal(err)
	}
	s.Cut("dock-1")
	published := make(chan error, 1)
	go func() { published <- n.Publish(ctx, 600) }()
	rigtest.Eventually(t, "readings while the link is down", func() error {
		if c := n.Count(); c < 400 {
			return fmt.Errorf("%d acknowledged", c)
		}
		return nil
	})
	e.Kill()
	s.Start(e)
	if err := <-published; err != nil {
		t.Fatal(err)
	}
	e.Kill()

	ns := namespace(t)
	inside := []string{rigtest.Need(t, "ip"), "netns", "exec", ns}
	if err := e.Start(ctx, inside...); err != nil {
		t.Fatal(err)
	}
	box := e.Process
	s.EndWithTest(box)
	status := func() (string, error) {
		out, err := exec.CommandContext(ctx, e.Bin.Path("edgehub"), "status", "--state", e.State()).CombinedOutput()
		return string(out), err
	}
	rigtest.Eventually(t, "a cold boot without any network shows the confirmed pod", func() error {
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
	pub := exec.CommandContext(ctx, inside[0], append(inside[1:], rigtest.Need(t, "mosquitto_pub"), "-h", "127.0.0.1", "-p", port, "-i", "foreign", "-q", "1", "-t", "sensors/foreign", "-l", "-d")...)
	pub.Stdin = strings.NewReader(foreign.String())
	out, err := pub.CombinedOutput()
	acks := strings.Count(string(out), "received PUBACK")
	if err != nil || acks != 300 {
		t.Fatalf("mosquitto_pub: %v, %d acknowledged; %s", err, acks, box.Tail(10))
	}
	box.Kill()

	s.Restore("dock-1")
	s.Start(e)
	rigtest.Eventually(t, "the backlog is replayed", func() error { return s.Drained(e, "readings") })
	if others := s.CheckRecords(e.Name, n); others != 300 {
		t.Errorf("%d readings of the foreign client, want 300", others)
	}
}

// G3 and G4: a full quota drops the oldest readings, in the ledger and not in silence; the disk stays within its bound.
func TestG3G4QuotaIsLedgered(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings+"  maxBytes: 1MiB\n")
	s.Start(e)
	rigtest.Eventually(t, "first sync", func() error { return s.Holds(e, true) })
	s.Cut("dock-1")
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	n := rigtest.NewNumbers(t, e, "press-7")
	for range 6 {
		n.Filler = rigtest.Noise(32 << 10)
		if err := n.Publish(ctx, 20); err != nil {
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
	s.Restore("dock-1")
	rigtest.Eventually(t, "the rest is replayed", func() error { return s.Drained(e, "readings") })
	sum, err := s.Hub.Sum(ctx, "dock-1", "readings")
	if err != nil || sum.Delivered+sum.Ledgered != uint64(n.Count()) || sum.Ledgered == 0 || sum.Delivered == 0 {
		t.Errorf("acknowledged %d, account %+v, %v", n.Count(), sum, err)
	}
	records, err := s.Hub.Records(ctx, "dock-1", "readings")
	if err != nil || uint64(len(records)) != sum.Delivered {
		t.Errorf("%d records in the sink, %d delivered, %v", len(records), sum.Delivered, err)
	}
}
