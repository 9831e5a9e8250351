package uplink

import (
	"log/slog"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// FuzzClocks: what a disk says of earlier boots' clocks must not keep the agent from starting, nor this boot's from being kept.
func FuzzClocks(f *testing.F) {
	f.Add(`[{"boot":"a","offset":5,"quality":2}]`, uint8(1))
	f.Add(`[]`, uint8(0))
	f.Add(`null`, uint8(2))
	f.Add(`[{"boot":"now","offset":-9223372036854775808,"quality":2}]`, uint8(2))
	f.Add(`{"boot":1}`, uint8(2))
	f.Fuzz(func(t *testing.T, stored string, quality uint8) {
		store := memory{clocksKey: []byte(stored)}
		c, err := newClocks(store, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		now := mapping{Boot: "now", Offset: 7e18, Quality: longshorepb.ClockQuality(quality % 3)}
		c.read = func() mapping { return now }
		if err := c.remember(); err != nil {
			t.Fatal(err)
		}
		again, err := newClocks(store, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if len(again.boots) > max(maxBoots, len(c.boots)) {
			t.Fatalf("%d boots are remembered", len(again.boots))
		}
		if got := c.of([]string{"now"}); len(got) != 1 || got[0].GetOffsetNs() != now.Offset {
			t.Fatalf("this boot's clock is %v", got)
		}
		again.read = func() mapping { return mapping{Boot: "later"} }
		if got := again.of([]string{"now"}); len(got) == 0 || got[len(got)-1].GetQuality() < now.Quality {
			t.Fatalf("in a later boot it is %v, stored %s", got, store[clocksKey])
		}
	})
}

// FuzzHeader: the header of a frame, also of the first piece of one, must be read as the whole frame is, or what is sent would
// never count as acknowledged.
func FuzzHeader(f *testing.F) {
	b, err := proto.Marshal(&longshorepb.Frame{Stream: "s", First: 7, Count: 3, BootId: "boot", Records: []byte("records")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Add([]byte{0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x18, 0x05})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, boot := header(b)
		whole := &longshorepb.Frame{}
		if proto.Unmarshal(b, whole) != nil {
			return
		}
		canonical, err := proto.MarshalOptions{Deterministic: true}.Marshal(whole)
		if err != nil {
			t.Fatal(err)
		}
		if string(canonical) != string(b) {
			return // only the outbox writes frames
		}
		want := span{whole.GetStream(), whole.GetFirst(), whole.GetFirst() + uint64(max(whole.GetCount(), 1)) - 1}
		if p != want || boot != whole.GetBootId() {
			t.Fatalf("%v of boot %q, want %v of %q", p, boot, want, whole.GetBootId())
		}
	})
}
