package fault

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// mqttConnect connects a bare MQTT 3.1.1 client, with a clean session.
func mqttConnect(t *testing.T, address, client string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, rigtest.Soon)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	body := binary.BigEndian.AppendUint16([]byte{0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 0}, uint16(len(client)))
	body = append(body, client...)
	answer := make([]byte, 4)
	_, err = c.Write(append([]byte{0x10, byte(len(body))}, body...))
	if err == nil {
		_, err = io.ReadFull(c, answer)
	}
	if err != nil || answer[0] != 0x20 || answer[3] != 0 {
		t.Fatalf("connect %s: %x, %v", client, answer, err)
	}
	return c
}

// flood is a PUBLISH at QoS 0 of so many bytes.
func flood(topic string, size int) []byte {
	body := binary.BigEndian.AppendUint16(nil, uint16(len(topic)))
	body = append(append(body, topic...), make([]byte, size)...)
	return append([]byte{0x30, byte(len(body)&0x7f | 0x80), byte(len(body) >> 7)}, body...)
}

// A subscriber that reads nothing, on a topic that another client publishes to as fast as it can, must cost no other client
// anything: devices get their PUBACKs, subscribers all their messages in order, readings reach the cloud, and memory stays
// bounded.
func TestG4StuckReaderAndFloodDisturbNobody(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings)
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 10)
	settled(t, s, e)
	memory := metric(t, e.HTTP, "process_resident_memory_bytes")

	stuck := mqttConnect(t, e.Broker, "stuck")
	if _, err := stuck.Write([]byte{0x82, 12, 0, 1, 0, 7, 'f', 'l', 'o', 'o', 'd', '/', '#', 0}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stuck, make([]byte, 5)); err != nil { // SUBACK, and never a byte more
		t.Fatal("subscribe:", err)
	}
	publisher := mqttConnect(t, e.Broker, "flood")
	over, ended := make(chan struct{}), make(chan int)
	go func() {
		message, sent := flood("flood/a", 4<<10), 0
		for {
			select {
			case <-over:
				ended <- sent
				return
			default:
			}
			_ = publisher.SetWriteDeadline(time.Now().Add(rigtest.Soon))
			if _, err := publisher.Write(message); err != nil {
				<-over
				ended <- sent
				return
			}
			sent++
		}
	}()

	// The neighbours: a subscriber that wants every reading of the device, and the device.
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	host, port, err := net.SplitHostPort(e.Broker)
	if err != nil {
		t.Fatal(err)
	}
	sub := exec.CommandContext(ctx, rigtest.Need(t, "mosquitto_sub"), "-h", host, "-p", port, "-q", "1", "-t", "sensors/#", "-t", "ready", "-F", "%p", "-C", "501")
	out, err := sub.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	heard := make(chan bool, 1)
	go func() { heard <- lines.Scan() }()
	rigtest.Eventually(t, "the neighbour subscribes", func() error {
		select {
		case <-heard:
			heard <- true
			return nil
		default:
			_, err := rigtest.Mosquitto(ctx, t, e.Broker, "mosquitto_pub", "-r", "-t", "ready", "-m", "go")
			if err == nil {
				err = fmt.Errorf("nothing heard yet")
			}
			return err
		}
	})
	<-heard
	publishNow(t, n, 500)
	var got []string
	for lines.Scan() {
		if lines.Text() != "go" {
			got = append(got, strings.TrimSpace(lines.Text()))
		}
	}
	_ = sub.Wait()
	close(over)
	sent := <-ended
	if sent < 1000 {
		t.Errorf("only %d messages of the flood were taken: the test shows little", sent)
	}
	if len(got) < 490 {
		t.Errorf("the neighbour got %d of 500 messages", len(got))
	}
	for i := range got {
		if want := fmt.Sprintf("press-%06d", 11+i); got[i] != want {
			t.Fatalf("the neighbour got %s instead of %s", got[i], want)
		}
	}
	settled(t, s, e)
	s.CheckRecords("dock-1", n)
	// Bounded: 16 MiB may be queued for the stuck reader; the flood was much more.
	if grown := metric(t, e.HTTP, "process_resident_memory_bytes") - memory; grown > 256<<20 {
		t.Errorf("the agent's memory grew by %.0f MiB", grown/(1<<20))
	}
	if dropped := metric(t, e.HTTP, "longshore_edge_devices_dropped_total"); dropped == 0 {
		t.Error("what the stuck reader did not get is not counted")
	}
	t.Logf("%d messages of the flood, %d dropped", sent, int64(metric(t, e.HTTP, "longshore_edge_devices_dropped_total")))
}

// G4: a client with a persistent session is away while more than 8,192 messages come for it. What is kept for it is bounded,
// what is not is counted, and it gets the oldest ones in order when it is back. Its neighbours notice nothing: one that
// subscribes to the same gets every message in order, and a device gets its PUBACKs.
func TestG4BacklogOfAbsentClientIsBoundedAndCounted(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	e := s.Edge("dock-1", rigtest.Readings)
	s.Start(e)
	ctx, cancel := context.WithTimeout(t.Context(), 2*rigtest.Soon)
	defer cancel()
	subscribe := func(client string, args ...string) string {
		t.Helper()
		out, err := rigtest.Mosquitto(ctx, t, e.Broker, "mosquitto_sub", append([]string{"-c", "-i", client, "-q", "1", "-t", "orders"}, args...)...)
		if err != nil {
			t.Error(err, out)
		}
		return out
	}
	subscribe("panel", "-E") // subscribes and leaves
	subscribe("viewer", "-E")
	const sent = 9000
	viewed := make(chan string, 1)
	go func() { viewed <- subscribe("viewer", "-F", "%p", "-C", fmt.Sprint(sent)) }()
	publishMany(ctx, t, e, "orders", sent)
	publishNow(t, rigtest.NewNumbers(t, e, "press"), 100)
	for i, got := range strings.Fields(<-viewed) {
		if want := fmt.Sprintf("%06d", i); got != want {
			t.Fatalf("the neighbour got %s instead of %s", got, want)
		}
	}
	dropped := int(metric(t, e.HTTP, "longshore_edge_devices_dropped_total"))
	if kept := sent - dropped; kept > 8192 || kept < 4096 {
		t.Errorf("%d of %d messages are kept, %d are counted as dropped", kept, sent, dropped)
	}
	got := strings.Fields(subscribe("panel", "-F", "%p", "-C", fmt.Sprint(sent-dropped)))
	if len(got) != sent-dropped {
		t.Errorf("the client got %d messages, %d were dropped of %d", len(got), dropped, sent)
	}
	for i := 1; i < len(got); i++ {
		if got[i] <= got[i-1] {
			t.Fatalf("out of order: %s after %s", got[i], got[i-1])
		}
	}
}

// publishMany publishes numbers at QoS 1 with a foreign client, and returns when all are acknowledged.
func publishMany(ctx context.Context, t *testing.T, e *rig.Edge, topic string, count int) {
	t.Helper()
	host, port, err := net.SplitHostPort(e.Broker)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for i := range count {
		fmt.Fprintf(&b, "%06d\n", i)
	}
	cmd := exec.CommandContext(ctx, rigtest.Need(t, "mosquitto_pub"), "-h", host, "-p", port, "-q", "1", "-t", topic, "-l")
	cmd.Stdin = strings.NewReader(b.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("publish: %v: %s", err, out)
	}
}
