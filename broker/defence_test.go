package broker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
)

// G4: one display that hangs must not stop the other devices of a site.
func TestStuckReaderBlocksNobody(t *testing.T) {
	// The stuck client lives as long as the test: the others must not need its end.
	_, addr := serve(t, broker.Config{StallTimeout: 10 * patience, MaxQueued: 100_000})
	stuck, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer stuck.Close()
	_ = stuck.(*net.TCPConn).SetReadBuffer(4096)
	mute := &client{t: t, conn: stuck, version: 4}
	for _, pk := range []packets.Packet{
		options{id: "stuck"}.packet(),
		{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1, Filters: packets.Subscriptions{{Filter: "x", Qos: 1}}},
	} {
		if err := mute.write(pk); err != nil {
			t.Fatal(err)
		}
	}
	good := dial(t, addr, options{id: "good"})
	good.subscribe(1, "x")
	p := dial(t, addr, options{id: "p"})
	payload := strings.Repeat("x", 32<<10)
	for n := range 400 { // 12 MiB: more than any socket buffer takes
		p.publish("x", payload, 1, uint16(n+1))
	}
	for range 400 {
		good.next(packets.Publish)
	}
}

// A peer that vanished without a word must not hold its connection and its session's queue for ever.
func TestStalledPeerIsClosed(t *testing.T) {
	b, addr := serve(t, broker.Config{StallTimeout: 100 * time.Millisecond})
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.(*net.TCPConn).SetReadBuffer(4096)
	mute := &client{t: t, conn: conn, version: 4}
	if err := mute.write(options{id: "mute"}.packet()); err != nil {
		t.Fatal(err)
	}
	sub := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1, Filters: packets.Subscriptions{{Filter: "x"}}}
	if err := mute.write(sub); err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, 64<<10)
	eventually(t, "stalled connection closed", func() bool {
		if err := b.Publish(t.Context(), "x", payload, 0, false); err != nil {
			t.Fatal(err)
		}
		return b.Stats().Stalled == 1 && b.Stats().Connections == 0
	})
}

// A device behind a thin radio link takes its message slowly; being slow is no reason to be cut off.
func TestSlowReaderLives(t *testing.T) {
	const stall = 3 * time.Second // more than a busy machine may keep the reader waiting
	b, addr := serve(t, broker.Config{StallTimeout: stall})
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10)
	slow, err := start(t, &thinConn{Conn: conn, pace: time.NewTicker(12 * time.Millisecond)}, options{id: "slow", keepalive: 6})
	if err != nil {
		t.Fatal(err)
	}
	slow.subscribe(1, "x")
	began := time.Now()
	const total = 40
	for range total {
		if err := b.Publish(t.Context(), "x", make([]byte, 100<<10), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	pings := make(chan struct{})
	go func() { // a live client pings
		defer close(pings)
		for {
			select {
			case <-stop:
				return
			case <-time.After(300 * time.Millisecond):
				_ = slow.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
			}
		}
	}()
	for range total {
		slow.next(packets.Publish)
	}
	close(stop)
	<-pings
	if d := time.Since(began); d < 2*stall {
		t.Logf("took only %v: the link was not thin enough to show anything", d)
	}
	if b.Stats().Stalled != 0 {
		t.Error("cut off as stalled")
	}
}

// thinConn reads a little at a time.
type thinConn struct {
	net.Conn
	pace *time.Ticker
}

func (c *thinConn) Read(p []byte) (int, error) {
	<-c.pace.C
	return c.Conn.Read(p[:min(len(p), 8<<10)])
}

// G3: what a slow or absent client's queue can't hold must be counted, never vanish.
func TestFullQueueIsCounted(t *testing.T) {
	const limit, total = 50, 500
	b, addr := serve(t, broker.Config{MaxQueued: limit})
	got := newLedger()
	c := dial(t, addr, options{id: "c", persist: true})
	c.subscribe(1, "q")
	c.disconnect()
	eventually(t, "client away", func() bool { return b.Stats().Connections == 0 })
	for n := range total {
		if err := b.Publish(t.Context(), "q", []byte(strconv.Itoa(n)), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	if d := b.Stats().Dropped; d != total-limit {
		t.Errorf("dropped %d, want %d", d, total-limit)
	}
	dial(t, addr, options{id: "c", persist: true, onMsg: got.note})
	eventually(t, "queued messages delivered", func() bool { return len(got.missing(limit)) == 0 })
	if lost := got.missing(total); len(lost) != total-limit {
		t.Errorf("%d messages missing, %d counted", len(lost), total-limit)
	}
}

// G3: a burst to a client that reads must arrive whole as long as its queue holds it.
func TestBurstIsNotDropped(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	got := newLedger()
	c := dial(t, addr, options{id: "c", onMsg: got.note})
	c.subscribe(1, "b")
	for n := range 5000 {
		if err := b.Publish(t.Context(), "b", []byte(strconv.Itoa(n)), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "burst delivered", func() bool { return len(got.missing(5000)) == 0 })
	if d := b.Stats().Dropped; d != 0 {
		t.Errorf("dropped %d", d)
	}
}

// An MQTT 5 device that announces a small Receive Maximum must neither be flooded nor stop receiving for good.
func TestReceiveMaximum(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	for _, qos := range []byte{1, 2} {
		c := dial(t, addr, options{id: "v5", version: 5, silent: true, edit: func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = 5 }})
		c.subscribe(qos, "v")
		for n := range 100 {
			if err := b.Publish(t.Context(), "v", []byte(strconv.Itoa(n)), qos, false); err != nil {
				t.Fatal(err)
			}
		}
		var held []uint16
		for len(held) < 5 {
			held = append(held, c.next(packets.Publish).PacketID)
		}
		if err := c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}}); err != nil {
			t.Fatal(err)
		}
		if pk := c.next(packets.Pingresp, packets.Publish); pk.FixedHeader.Type == packets.Publish {
			t.Errorf("QoS %d: sixth message before an acknowledgement", qos)
		}
		for n := range 100 {
			if qos == 1 {
				_ = c.ack(packets.Puback, held[0])
			} else {
				_ = c.ack(packets.Pubrec, held[0])
				c.next(packets.Pubrel)
				_ = c.ack(packets.Pubcomp, held[0])
			}
			held = held[1:]
			if n < 95 {
				held = append(held, c.next(packets.Publish).PacketID)
			}
		}
		c.disconnect()
	}
}

// lines collects log messages.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.buf.Write(p) }
func (l *lines) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.buf.String(), s)
}

// A hub that ran out of file descriptors for a moment must accept connections again afterwards.
func TestAcceptSurvivesEMFILE(t *testing.T) {
	var log lines
	_, addr := serve(t, broker.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	dial(t, addr, options{id: "before"}).close()

	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
	}
	defer restore()
	probe, err := os.Open(os.DevNull) // the lowest free number
	if err != nil {
		t.Fatal(err)
	}
	var fill []*os.File
	defer func() {
		for _, f := range fill {
			f.Close()
		}
	}()
	low := syscall.Rlimit{Cur: uint64(probe.Fd()) + 16, Max: old.Max}
	probe.Close()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	for { // take every descriptor, then give back one for the client's own socket
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		fill = append(fill, f)
	}
	fill[len(fill)-1].Close()
	fill = fill[:len(fill)-1]
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "accept ran out of descriptors", func() bool { return log.has("can't accept connections") })
	restore()
	if _, err := start(t, conn, options{id: "during"}); err != nil {
		t.Errorf("the connection that waited: %v", err)
	}
	dial(t, addr, options{id: "after"})
}

// G4: connections that never say CONNECT, as port scanners leave them, must not pile up.
func TestHandshakeTimeout(t *testing.T) {
	b, addr := serve(t, broker.Config{HandshakeTimeout: 50 * time.Millisecond})
	for _, bytes := range []string{"", "\x10", "\x10\x20\x00\x04MQTT"} {
		conn, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, bytes); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("after %q: %v, want the connection closed", bytes, err)
		}
	}
	eventually(t, "no connection left", func() bool { return b.Stats().Connections == 0 })
}

// G4: five bytes from anybody must not cost the hub 256 MiB.
func TestOversizePacketsCostNoMemory(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for n := range 500 {
		conn, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		header := []byte{0x10, 0xff, 0xff, 0xff, 0x7f}
		if n%2 == 0 {
			header = []byte{0x10, 0xa0, 0x9c, 0x01} // 20,000 bytes: fine for a message, not for who is not known yet
		}
		if _, err := conn.Write(header); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
			t.Fatalf("connection still open: %v", err)
		}
		conn.Close()
	}
	c := dial(t, addr, options{id: "inside"}) // the same after CONNECT
	if _, err := c.conn.Write([]byte{0x30, 0xff, 0xff, 0xff, 0x7f}); err != nil {
		t.Fatal(err)
	}
	<-c.done
	runtime.ReadMemStats(&after)
	if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > 64 {
		t.Errorf("%d MiB allocated", grown)
	}
	dial(t, addr, options{id: "still serving"})
}

// Garbage on the port must end that connection and nothing else.
func TestGarbageIsRefused(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	connect := "\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01g"
	connect5 := "\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01g"
	for _, s := range []string{
		"GET / HTTP/1.1\r\n\r\n",
		"\x10\xff\xff\xff\xff\x7f",
		"\x10\x0c\x00\x04MQTT\x09\x02\x00\x3c\x00\x00",
		"\x10\x02\x00\x04",
		connect + "\x00\x00",                       // reserved packet type
		connect + connect,                          // second CONNECT
		connect + "\x82\x02\x00\x01",               // SUBSCRIBE without filter
		connect + "\x82\x05\x00\x01\x00\x01a",      // SUBSCRIBE without QoS
		connect5 + "\x82\x06\x00\x01\x00\x00\x01a", // SUBSCRIBE without options: mochi's decoder panics
		connect + "\x36\x05\x00\x01a\x00\x01",      // QoS 3
		connect + "\x32\x03\x00\x01a",              // no packet id
		connect + "\x30\x05\x00\x03a/+",            // wildcard in a name
		connect + "\x30\x04\x00\x02\xc3\x28",       // not UTF-8
		connect + "\x62\x00",                       // PUBREL without id
		connect + "\x40\x01\x00",                   // short PUBACK
		connect + "\x30\x02\x00\x00",               // empty topic
		connect + "\x20\x02\x00\x00",               // a server's packet
	} {
		conn, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, s); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, conn); err != nil && os.IsTimeout(err) {
			t.Errorf("after %q the connection stays open", s)
		}
		conn.Close()
	}
	eventually(t, "no connection left", func() bool { return b.Stats().Connections == 0 })
	dial(t, addr, options{id: "still serving"})
}

// A client that subscribes late must get every retained message, however many; `m/#` includes `m` itself.
func TestRetainedReplayIsWhole(t *testing.T) {
	b, addr := serve(t, broker.Config{MaxQueued: 10})
	const total = 3000
	topics := map[string]bool{"m": true}
	for n := range total - 1 {
		topics[fmt.Sprintf("m/%d/x", n)] = true
	}
	for name := range topics {
		if err := b.Publish(t.Context(), name, []byte(name), 1, true); err != nil {
			t.Fatal(err)
		}
	}
	for _, qos := range []byte{0, 1} {
		c := dial(t, addr, options{id: "c"})
		c.subscribe(qos, "m/#")
		for range total {
			pk := c.next(packets.Publish)
			if !pk.FixedHeader.Retain || string(pk.Payload) != pk.TopicName {
				t.Fatalf("got %q on %q, retain %v", pk.Payload, pk.TopicName, pk.FixedHeader.Retain)
			}
		}
		c.disconnect()
	}
	if d := b.Stats().Dropped; d != 0 {
		t.Errorf("dropped %d", d)
	}
}

// A retained value must never be followed by an older one, or a device ends with yesterday's setting.
func TestRetainedAndLiveKeepOrder(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	var last atomic.Int64
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer close(done)
		for n := int64(1); ctx.Err() == nil; n++ {
			last.Store(n)
			_ = b.Publish(ctx, "v", []byte(strconv.FormatInt(n, 10)), 1, true)
			<-time.After(50 * time.Microsecond) // leave the machine to the clients
		}
	}()
	for range 50 {
		c := dial(t, addr, options{id: "c"})
		c.subscribe(1, "v")
		prev := 0
		for range 20 {
			n, err := strconv.Atoi(string(c.next(packets.Publish).Payload))
			if err != nil {
				t.Fatal(err)
			}
			if n < prev {
				t.Fatalf("%d after %d", n, prev)
			}
			prev = n
		}
		c.close()
	}
	cancel()
	<-done
}

// A keepalive above 43,690 s is legal; it must not become a timeout of no seconds at all.
func TestLongKeepalive(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	for _, keepalive := range []uint16{0, 43_690, 43_691, 65_535} {
		c := dial(t, addr, options{id: "c", keepalive: keepalive})
		for range 3 {
			if err := c.write(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}}); err != nil {
				t.Fatalf("keepalive %d: %v", keepalive, err)
			}
			c.next(packets.Pingresp)
		}
		c.disconnect()
	}
}

// A device that went silent must be noticed within one and a half times the keepalive it promised.
func TestKeepaliveEndsSilentClient(t *testing.T) {
	_, addr := serve(t, broker.Config{})
	c := dial(t, addr, options{id: "c", keepalive: 1})
	select {
	case <-c.done:
	case <-time.After(patience):
		t.Error("still connected")
	}
}

// G3: a shared subscription must not hand messages to members that are away while others are there.
func TestSharedSubscriptionPrefersPresentMembers(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	for _, id := range []string{"away1", "away2"} {
		c := dial(t, addr, options{id: id, persist: true})
		c.subscribe(1, "$share/g/s")
		c.disconnect()
	}
	eventually(t, "members away", func() bool { return b.Stats().Connections == 0 })
	got := newLedger()
	here := dial(t, addr, options{id: "here", onMsg: got.note})
	here.subscribe(1, "$share/g/s")
	for n := range 100 {
		if err := b.Publish(t.Context(), "s", []byte(strconv.Itoa(n)), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all messages at the present member", func() bool { return len(got.missing(100)) == 0 })
}

// G4: the hub must say no at its limit, instead of dying with all its connections.
func TestMaxConnections(t *testing.T) {
	b, addr := serve(t, broker.Config{MaxConnections: 3})
	var cs []*client
	for n := range 3 {
		cs = append(cs, dial(t, addr, options{id: strconv.Itoa(n)}))
	}
	if _, err := tryDial(t, addr, options{id: "one too many"}); err == nil {
		t.Error("a fourth connection was accepted")
	}
	cs[0].disconnect()
	eventually(t, "place free", func() bool { return b.Stats().Connections == 2 })
	dial(t, addr, options{id: "3"})
}

// G4: a session whose time is over must go, and what it held must be counted.
func TestSessionExpires(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	c := dial(t, addr, options{id: "c", version: 5, persist: true, edit: func(pk *packets.Packet) { pk.Properties.SessionExpiryInterval = 1 }})
	c.subscribe(1, "q")
	c.disconnect()
	eventually(t, "client away", func() bool { return b.Stats().Connections == 0 })
	for range 3 {
		if err := b.Publish(t.Context(), "q", []byte("x"), 1, false); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "session expired", func() bool { return b.Stats().Dropped == 3 })
	if c := dial(t, addr, options{id: "c", version: 5, persist: true}); c.present {
		t.Error("session still present")
	}
}

// An MQTT 5 device that can't take large packets must still get the small ones after one.
func TestClientMaximumPacketSize(t *testing.T) {
	b, addr := serve(t, broker.Config{})
	c := dial(t, addr, options{id: "c", version: 5, edit: func(pk *packets.Packet) { pk.Properties.MaximumPacketSize = 100 }})
	for _, qos := range []byte{0, 1, 2} {
		c.subscribe(qos, "t")
		for n, size := range []int{1000, 10} {
			if err := b.Publish(t.Context(), "t", make([]byte, size), qos, false); err != nil {
				t.Fatal(err, n)
			}
		}
		if pk := c.next(packets.Publish); len(pk.Payload) != 10 {
			t.Errorf("QoS %d: got %d bytes", qos, len(pk.Payload))
		}
	}
	if d := b.Stats().Dropped; d != 3 {
		t.Errorf("dropped %d, want 3", d)
	}
}

// Response topic, correlation and user properties carry an MQTT 5 device's requests: they must arrive.
func TestPropertiesSurvive(t *testing.T) {
	_, addr := serve(t, broker.Config{Store: (&disk{}).store})
	c := dial(t, addr, options{id: "c", version: 5})
	c.subscribe(1, "t")
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1}, PacketID: 1, TopicName: "t", Payload: []byte("p")}
	pk.Properties.ResponseTopic, pk.Properties.CorrelationData = "answer/here", []byte{1, 2, 3}
	pk.Properties.ContentType = "text/plain"
	pk.Properties.User = []packets.UserProperty{{Key: "k", Val: "v"}}
	pk.Properties.MessageExpiryInterval = 1000
	if err := c.write(pk); err != nil {
		t.Fatal(err)
	}
	got := c.next(packets.Publish).Properties
	if got.ResponseTopic != "answer/here" || !bytes.Equal(got.CorrelationData, []byte{1, 2, 3}) || got.ContentType != "text/plain" ||
		len(got.User) != 1 || got.User[0].Val != "v" || got.MessageExpiryInterval == 0 || got.MessageExpiryInterval > 1000 {
		t.Errorf("properties arrived as %+v", got)
	}
}
