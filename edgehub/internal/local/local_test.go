package local

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/outbox"
)

// box is a broker on a real outbox.
type box struct {
	*Broker
	t   *testing.T
	log *outbox.Log

	mu      sync.Mutex
	offered []string
}

func newBox(t *testing.T, dir string, quotas map[string]outbox.Quota, streams ...Stream) *box {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	log, err := outbox.Open(dir, outbox.Config{Logger: slog.New(slog.DiscardHandler), Quotas: quotas})
	if err != nil {
		t.Fatal(err)
	}
	b := &box{t: t, log: log}
	b.Broker, err = New(Config{
		Logger: slog.New(slog.DiscardHandler), Listen: "127.0.0.1:0", Streams: streams, Outbox: log,
		Offer: func(topic string, payload []byte) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.offered = append(b.offered, topic+" "+string(payload))
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, log.Close()); err != nil {
			t.Error(err)
		}
	})
	return b
}

// mosquitto runs mosquitto_pub or mosquitto_sub, clients that nobody here wrote, against the box.
func (b *box) mosquitto(name string, args ...string) *exec.Cmd {
	b.t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		b.t.Fatalf("%s is missing: install the Debian package mosquitto-clients", name)
	}
	host, port, err := net.SplitHostPort(b.Addr().String())
	if err != nil {
		b.t.Fatal(err)
	}
	return exec.CommandContext(b.t.Context(), path, append([]string{"-h", host, "-p", port}, args...)...)
}

func (b *box) publish(args ...string) {
	b.t.Helper()
	if out, err := b.mosquitto("mosquitto_pub", args...).CombinedOutput(); err != nil {
		b.t.Fatalf("mosquitto_pub %v: %v: %s", args, err, out)
	}
}

// stored returns stream, topic and payload of everything that a log holds, as an uplink would send it.
func stored(t *testing.T, log *outbox.Log) []string {
	t.Helper()
	d, err := frame.NewDecoder()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var out []string
	var part []byte
	_, backlog := log.NewReaders()
	for {
		m, err := backlog.Next(16 << 10)
		if err != nil {
			t.Fatal(err)
		}
		if m == nil {
			slices.Sort(out)
			return out
		}
		frames := m.GetFrames()
		if f := m.GetFragment(); f != nil {
			if part = append(part, f.GetData()...); len(part) == int(f.GetTotal()) {
				frames, part = append(frames, part), nil
			}
		}
		for _, b := range frames {
			f, err := d.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Walk(func(_ uint64, r frame.Record) bool {
				out = append(out, f.Stream+" "+string(r.Topic)+" "+string(r.Payload))
				return true
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// G3: without this, a reading that its sensor believes delivered would be gone after a power cut.
func TestPubackMeansStored(t *testing.T) {
	dir := t.TempDir()
	b := newBox(t, dir, nil,
		Stream{Name: "vibration", Topics: []string{"sensors/+/vibration"}}, Stream{Name: "all", Topics: []string{"sensors/#", "plc/1"}})
	b.publish("-q", "1", "-t", "sensors/7/vibration", "-m", "one")
	b.publish("-q", "2", "-t", "sensors/7/temperature", "-m", "two")
	b.publish("-q", "1", "-V", "5", "-t", "plc/1", "-m", "three")
	b.publish("-q", "1", "-t", "elsewhere", "-m", "four")
	// mosquitto_pub ended, so the acknowledgements were there: what it sent must be too.
	want := []string{"all plc/1 three", "all sensors/7/temperature two", "vibration sensors/7/vibration one"}
	if got := stored(t, b.log); !slices.Equal(got, want) {
		t.Errorf("stored %q, want %q", got, want)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.offered) != 4 || !slices.Contains(b.offered, "elsewhere four") {
		t.Errorf("offered to the models: %q", b.offered)
	}
}

// G4: without this, devices could take all memory of a box that was told how many it has.
func TestConnectionsAreBounded(t *testing.T) {
	b, err := New(Config{Logger: slog.New(slog.DiscardHandler), Listen: "127.0.0.1:0", MaxConnections: 2})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	connect := func(id byte) net.Conn {
		c, err := net.Dial("tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		// The broker may have closed it already; reading tells.
		_, _ = c.Write([]byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 1, id})
		return c
	}
	connack := make([]byte, 4)
	for id := range byte(2) {
		if _, err := io.ReadFull(connect('a'+id), connack); err != nil || connack[3] != 0 {
			t.Fatalf("device %d: % x %v", id, connack, err)
		}
	}
	if n, err := connect('z').Read(connack); err == nil {
		t.Errorf("a third device was answered % x", connack[:n])
	}
}

// Without this, devices around the box could not talk to each other, nor get what models say, while the cloud is away.
func TestLocalSubscribersGetEverything(t *testing.T) {
	b := newBox(t, t.TempDir(), nil, Stream{Name: "s", Topics: []string{"sensors/#"}})
	sub := b.mosquitto("mosquitto_sub", "-q", "1", "-t", "#", "-C", "3", "-v", "-i", "panel", "-c")
	var out strings.Builder
	sub.Stdout = &out
	// A first run makes the persistent session: what comes from then on waits for the panel.
	if first, err := b.mosquitto("mosquitto_sub", "-q", "1", "-t", "#", "-i", "panel", "-c", "-E").CombinedOutput(); err != nil {
		t.Fatalf("mosquitto_sub: %v: %s", err, first)
	}
	b.publish("-q", "1", "-t", "sensors/1", "-m", "in a stream")
	b.publish("-q", "1", "-t", "panel/1", "-m", "in none")
	if err := b.Publish(t.Context(), "models/bearing", []byte("inner race")); err != nil {
		t.Fatal(err)
	}
	if err := sub.Run(); err != nil {
		t.Fatal("mosquitto_sub:", err)
	}
	if want := "sensors/1 in a stream\npanel/1 in none\nmodels/bearing inner race\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

// G4: without this, a device would believe stored what a full stream refused, or one full stream would stop the others.
func TestFullStreamRefusesWithoutPuback(t *testing.T) {
	b := newBox(t, t.TempDir(), map[string]outbox.Quota{"small": {MaxBytes: 64 << 10, Policy: outbox.Refuse}},
		Stream{Name: "small", Topics: []string{"small"}}, Stream{Name: "other", Topics: []string{"other"}})
	payload := strings.Repeat("0123456789abcdef", 1024)
	acked := 0
	for range 40 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		c, err := net.Dial("tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		ok := publishOnce(ctx, t, c, "small", randomize(payload, acked))
		cancel()
		if !ok {
			break
		}
		acked++
	}
	if acked == 0 || acked == 40 {
		t.Fatalf("%d messages of 40 were acknowledged, want some and not all", acked)
	}
	if got := len(stored(t, b.log)); got != acked {
		t.Errorf("%d messages are stored, %d were acknowledged", got, acked)
	}
	if n, why := b.Unstored(); n != 1 || why == nil || !strings.Contains(why.Error(), `stream "small"`) || !strings.Contains(why.Error(), "maxBytes") {
		t.Errorf("%d not stored because %v", n, why)
	}
	b.publish("-q", "1", "-t", "other", "-m", "fine")
	streams, _ := b.log.Stats()
	for _, s := range streams {
		if s.Stream == "small" && (s.Refused == 0 || s.Accepted != uint64(acked)) {
			t.Errorf("the stream counts %d accepted and %d refused", s.Accepted, s.Refused)
		}
	}
}

// G3, G4: a message too large for its stream would close its device's connection for ever, and the device's other messages would
// never come through; or it would be missing in the books of the cloud, if the device believes it accepted.
func TestTooLargeIsNotSentForEver(t *testing.T) {
	b := newBox(t, t.TempDir(), map[string]outbox.Quota{"small": {MaxBytes: 64 << 10}},
		Stream{Name: "small", Topics: []string{"small"}}, Stream{Name: "other", Topics: []string{"other"}})
	large := strings.Repeat("x", 40<<10) // above half the quota
	for _, qos := range []string{"0", "1", "2"} {
		b.publish("-q", qos, "-t", "small", "-m", large)
	}
	// mosquitto_pub of MQTT 5 shows the reason.
	out, err := b.mosquitto("mosquitto_pub", "-V", "5", "-q", "1", "-t", "small", "-m", large).CombinedOutput()
	if err != nil || !strings.Contains(strings.ToLower(string(out)), "quota exceeded") {
		t.Errorf("MQTT 5: %v: %s", err, out)
	}
	c, err := net.Dial("tcp", b.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if !publishOnce(t.Context(), t, c, "other", strings.Repeat("y", 129<<10)) { // above the largest record
		t.Error("above the largest record: not acknowledged")
	}
	b.publish("-q", "1", "-t", "small", "-m", "fine")
	if got := stored(t, b.log); !slices.Equal(got, []string{"small small fine"}) {
		t.Errorf("stored %q", got)
	}
	want := map[string][2]uint64{"small": {4, 3}, "other": {1, 1}} // accepted, dropped: MQTT 5 was told
	streams, _ := b.log.Stats()
	for _, s := range streams {
		if got := [2]uint64{s.Accepted, s.Dropped}; got != want[s.Stream] {
			t.Errorf("%s: accepted %d, dropped %d", s.Stream, s.Accepted, s.Dropped)
		}
	}
	if n, why := b.Unstored(); n != 5 || !errors.Is(why, outbox.ErrTooLarge) {
		t.Errorf("%d not stored because %v", n, why)
	}
}

// failing is a disk that is full for the first appends.
type failing struct {
	Appender
	mu   sync.Mutex
	left int
}

func (f *failing) Append(ctx context.Context, recs []outbox.Record) ([]error, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left > 0 {
		f.left--
		return make([]error, len(recs)), errors.New("no space left on device")
	}
	return f.Appender.Append(ctx, recs)
}

// G3: without this, a full disk would lose readings that their sensors believe delivered. mosquitto_pub sends again what was
// not acknowledged, so it ends well once there is space.
func TestFullDiskWithholdsPuback(t *testing.T) {
	b := newBox(t, t.TempDir(), nil, Stream{Name: "s", Topics: []string{"s"}})
	disk := &failing{Appender: b.log, left: 2}
	b.cfg.Outbox = disk
	for range 2 {
		c, err := net.Dial("tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if publishOnce(t.Context(), t, c, "s", "lost") {
			t.Error("acknowledged although not stored")
		}
	}
	b.publish("-q", "1", "-t", "s", "-m", "kept")
	if got := stored(t, b.log); !slices.Equal(got, []string{"s s kept"}) {
		t.Errorf("stored %q", got)
	}
}

// G5: without this, a device could forge what the agent and the hub say to each other.
func TestReservedTopicsAreRefused(t *testing.T) {
	b := newBox(t, t.TempDir(), nil, Stream{Name: "s", Topics: []string{"#"}})
	c, err := net.Dial("tcp", b.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	publishOnce(t.Context(), t, c, "longshore/v1/nodes/edge-1/reported", "forged")
	out, err := b.mosquitto("mosquitto_sub", "-t", "longshore/v1/nodes/edge-1/index", "-C", "1", "-W", "20").CombinedOutput()
	if !strings.Contains(string(out), "denied") { // the exit code says nothing
		t.Errorf("subscribing was not refused: %v %s", err, out)
	}
	if got := stored(t, b.log); len(got) != 0 {
		t.Errorf("stored %q", got)
	}
}

// Without this, a second program on the box would leave people with an agent that does not start and does not say why.
func TestTakenPortIsExplained(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = New(Config{Logger: slog.New(slog.DiscardHandler), Listen: l.Addr().String()})
	if err == nil || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("got %v, want an error that names the address", err)
	}
}
