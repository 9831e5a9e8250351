package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// G4: anybody who can reach the door must not be able to eat the hub's memory before saying who they are: a header that
// announces 256 MiB costs nothing, five hundred times.
func TestG4HugeConnectHeadersCostNothing(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	before := rss(t, s.Hub.PID())
	conns := make([]net.Conn, 0, 500)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range 500 {
		c, err := net.DialTimeout("tcp", s.Hub.MQTT, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		if _, err := c.Write([]byte{0x10, 0xff, 0xff, 0xff, 0x7f, 0, 4, 'M', 'Q', 'T', 'T'}); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(rigtest.Soon))
		if b, err := io.ReadAll(c); len(b) > 0 || isTimeout(err) {
			t.Fatalf("connection %d was not refused: read %x, %v", i, b, err)
		}
	}
	// One such packet believed would already be 256 MiB.
	if grown := rss(t, s.Hub.PID()) - before; grown > 64<<20 {
		t.Errorf("the hub's memory grew by %d MiB", grown>>20)
	}
	s.Write("good.yaml", "apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: still-here}\n")
	rigtest.Eventually(t, "the hub goes on", func() error { return s.Knows("still-here") })
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error) //nolint:errorlint // net.Conn returns it bare
	return ok && ne.Timeout()
}

// rss of a process in bytes.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// password reads an edge's token from its credential, as somebody at a terminal would.
func password(t *testing.T, s *rigtest.Site, edge string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.Hub.Dir, edge+".credential.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if token, ok := strings.CutPrefix(line, "token:"); ok {
			return strings.Trim(strings.TrimSpace(token), `"'`)
		}
	}
	t.Fatalf("no token in the credential of %s", edge)
	return ""
}

// G5: a stolen box must not be a window into the others: with one edge's credential nothing of another edge is read or
// written, by topic, wildcard, shared subscription or will.
func TestG5ForeignTopicsAreRefused(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Edge("dock-1", "")
	s.Edge("dock-2", "")
	s.Write("pod.yaml", rigtest.PodManifest("secret-plan", "dock-2", "v1"))
	token := password(t, s, "dock-1")
	read := func(user, pw string, filters ...string) string {
		ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
		defer cancel()
		args := []string{"-u", user, "-P", pw, "-W", "2", "-v", "-i", "thief"}
		for _, f := range filters {
			args = append(args, "-t", f)
		}
		out, _ := rigtest.Mosquitto(ctx, t, s.Hub.MQTT, "mosquitto_sub", args...)
		return out
	}
	rigtest.Eventually(t, "the owner reads its own", func() error {
		out := read("dock-2", password(t, s, "dock-2"), "longshore/v1/nodes/dock-2/plain/#")
		if !strings.Contains(out, "secret-plan") {
			return fmt.Errorf("got %q", out)
		}
		return nil
	})
	for _, filter := range []string{
		"longshore/v1/nodes/dock-2/plain/#", "longshore/v1/nodes/+/plain/#", "longshore/v1/#", "#", "+/v1/nodes/dock-2/plain/index",
		"$share/g/longshore/v1/nodes/dock-2/plain/#", "$share/g/#", "longshore/v1/nodes/dock-2/index", "longshore/v1/nodes/dock-2/push",
		"longshore/v1/nodes/dock-1/../dock-2/plain/index",
	} {
		if out := read("dock-1", token, filter); strings.Contains(out, "secret-plan") || strings.Contains(out, "dock-2/") {
			t.Errorf("dock-1 read with %q: %s", filter, out)
		}
	}
	if out := read("dock-2", token, "longshore/v1/nodes/dock-2/plain/#"); strings.Contains(out, "secret-plan") {
		t.Error("dock-1's token was taken for dock-2")
	}
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	if out, err := rigtest.Mosquitto(ctx, t, s.Hub.MQTT, "mosquitto_sub", "-u", "dock-1", "-P", token, "-W", "2", "-t", "longshore/v1/nodes/dock-1/plain/index",
		"--will-topic", "longshore/v1/nodes/dock-2/reported", "--will-payload", "x"); err == nil {
		t.Errorf("a will on a foreign topic was accepted: %s", out)
	}
	for _, name := range []string{"longshore/v1/nodes/dock-2/hello", "longshore/v1/nodes/dock-2/reported", "longshore/v1/nodes/dock-2/telemetry", "longshore/v1/nodes/dock-2/plain/index", "anything"} {
		_, _ = rigtest.Mosquitto(ctx, t, s.Hub.MQTT, "mosquitto_pub", "-u", "dock-1", "-P", token, "-t", name, "-m", "forged", "-q", "1")
	}
	if out := read("dock-2", password(t, s, "dock-2"), "longshore/v1/nodes/dock-2/plain/#"); strings.Contains(out, "forged") || !strings.Contains(out, "secret-plan") {
		t.Errorf("after forged publishes dock-2 reads %q", out)
	}
}
