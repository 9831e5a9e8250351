package uplink

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// randomText is text that does not compress below half.
func randomText(t *testing.T, n int) string {
	t.Helper()
	b := make([]byte, n/2)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

func ackOf(watermark uint64, above ...*longshorepb.Range) *longshorepb.Ack {
	return &longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: []byte("e"), Streams: []*longshorepb.StreamAck{{Stream: "s", Watermark: watermark, Above: above}}}}}
}

// Without this, the window would never open again after an acknowledgement in parts, or open too early.
func TestFlowCountsWhatIsAcknowledged(t *testing.T) {
	now := time.Unix(1000, 0)
	f := newFlow()
	for i := range uint64(4) {
		f.sent(&batch{epoch: "e", spans: []span{{"s", i*10 + 1, i*10 + 10}}, bytes: 1000}, now)
	}
	f.sent(&batch{epoch: "e", bytes: 1000}, now) // nothing to acknowledge: not waited for
	for _, c := range []struct {
		ack  *longshorepb.Ack
		want int
	}{
		{ackOf(10), 4000}, // record 10 is still lacking
		{ackOf(11), 3000},
		{ackOf(11, &longshorepb.Range{First: 21, Last: 29}), 3000},
		{ackOf(11, &longshorepb.Range{First: 21, Last: 30}), 2000},
		{ackOf(15, &longshorepb.Range{First: 15, Last: 30}), 1000},
		{&longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: []byte("other"), Streams: ackOf(99).Epochs[0].Streams}}}, 1000},
		{ackOf(41), 0},
	} {
		if f.acked(c.ack, now); f.outstanding != c.want {
			t.Fatalf("after %v: %d bytes outstanding, want %d", c.ack, f.outstanding, c.want)
		}
	}
}

// Without this, a fast link would be used at a trickle, and a slow one filled until specs wait for minutes.
func TestFlowWindowFollowsTheLink(t *testing.T) {
	now := time.Unix(1000, 0)
	f := newFlow()
	next := uint64(1)
	round := func(delay time.Duration) {
		for {
			size, live, _ := f.allows()
			if !live {
				break
			}
			f.sent(&batch{epoch: "e", spans: []span{{"s", next, next}}, bytes: size}, now)
			next++
		}
		now = now.Add(delay)
		f.acked(ackOf(next), now)
	}
	for range 20 {
		round(50 * time.Millisecond)
	}
	if f.window != windowMax {
		t.Errorf("on a fast link the window is %d, want %d", f.window, windowMax)
	}
	for range 40 {
		round(8 * time.Second)
	}
	if f.window != windowMin {
		t.Errorf("on a slow link the window is %d, want %d", f.window, windowMin)
	}
	if size, _, backlog := f.allows(); size > 8<<10 || !backlog {
		t.Errorf("on a slow link messages have %d bytes, backlog allowed %v", size, backlog)
	}
}

// Without this, a live reading would wait behind the backlog's whole window.
func TestFlowKeepsRoomForTheLiveLane(t *testing.T) {
	f := newFlow()
	for {
		size, _, backlog := f.allows()
		if !backlog {
			break
		}
		f.sent(&batch{epoch: "e", spans: []span{{"s", 1, 1}}, bytes: size}, time.Unix(1000, 0))
	}
	if _, live, _ := f.allows(); !live {
		t.Error("the backlog took all of the window")
	}
}

// memory is a store that keeps values only.
type memory map[string][]byte

func (m memory) Get(k string) ([]byte, error)   { return m[k], nil }
func (m memory) Put(k string, v []byte) error   { m[k] = v; return nil }
func (m memory) Load() (desired.Stored, error)  { return desired.Stored{}, nil }
func (m memory) Apply(desired.EdgeAction) error { return errors.New("keeps values only") }
func (m memory) NextSession() (uint64, error)   { return 0, errors.New("keeps values only") }

// Without this, readings of a boot whose clock was set late would keep the year 1970 after a power cut.
func TestClockOfAnEarlierBootIsRemembered(t *testing.T) {
	store := memory{}
	log := slog.New(slog.DiscardHandler)
	c, err := newClocks(store, log)
	if err != nil {
		t.Fatal(err)
	}
	at := mapping{Boot: "b1", Offset: 5, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_UNSET}
	c.read = func() mapping { return at }
	remember := func() {
		t.Helper()
		if err := c.remember(); err != nil {
			t.Fatal(err)
		}
	}
	remember()
	at = mapping{Boot: "b1", Offset: 1_800_000_000e9, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED}
	remember()
	at = mapping{Boot: "b1", Offset: 7, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_PLAUSIBLE}
	remember() // worse: not taken

	if c, err = newClocks(store, log); err != nil { // the next boot
		t.Fatal(err)
	}
	at = mapping{Boot: "b2", Offset: 9, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_UNSET}
	c.read = func() mapping { return at }
	remember()
	got := c.of([]string{"b1", "b2", "never seen"})
	want := []*longshorepb.Clock{
		{BootId: "b1", OffsetNs: 1_800_000_000e9, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED},
		{BootId: "b2", OffsetNs: 9, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_UNSET},
	}
	if len(got) != 2 || !proto.Equal(got[0], want[0]) || !proto.Equal(got[1], want[1]) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Without this, a batch would carry no clock and its readings no time.
func TestHeaderOfACutFrame(t *testing.T) {
	b, err := proto.Marshal(&longshorepb.Frame{Stream: "s", First: 7, Count: 3, BootId: "boot", Records: make([]byte, 5000)})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{len(b), len(b) / 2} {
		if p, boot := header(b[:n]); p != (span{"s", 7, 9}) || boot != "boot" {
			t.Errorf("of %d bytes: %v %q", n, p, boot)
		}
	}
}
