package outbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
)

// accepted is a record whose producer was told that it is safe.
type accepted struct {
	epoch   string
	stream  string
	seq     uint64
	payload string
}

// box is an edge on a simulated disk, with its cloud.
type box struct {
	t     testing.TB
	disk  *simDisk
	clock *simClock
	cfg   Config
	log   *Log
	cloud *cloud
	boots int
	// promised are the records accepted, count numbers the payloads.
	promised []accepted
	count    int
	// corrupt says that damage is part of the test.
	corrupt bool
}

func newBox(t testing.TB, seed uint64, cfg Config) *box {
	return &box{t: t, disk: newSimDisk(seed), clock: &simClock{boot: "boot 0"}, cfg: cfg, cloud: newCloud(t)}
}

// open fails only if the power goes.
func (b *box) open() bool {
	b.t.Helper()
	l, err := open("/state", b.cfg, b.disk, b.clock)
	if err != nil {
		if !errors.Is(err, errPower) {
			b.t.Fatalf("open: %v", err)
		}
		return false
	}
	b.log = l
	return true
}

// reboot is a power cut and the start after it.
func (b *box) reboot() {
	b.disk = b.disk.reboot()
	b.boots++
	b.clock = &simClock{boot: fmt.Sprintf("boot %d", b.boots)}
}

// append appends n records of a stream and notes what was promised.
func (b *box) append(stream string, n int, payload func(i int) string) error {
	b.t.Helper()
	var recs []Record
	for range n {
		b.count++
		recs = append(recs, Record{Stream: stream, Payload: []byte(payload(b.count))})
	}
	h, next := b.next(stream)
	verdicts, err := b.log.Append(context.Background(), recs)
	for i, v := range verdicts {
		if v == nil {
			b.promised = append(b.promised, accepted{string(h.GetEpoch()), stream, next, string(recs[i].Payload)})
			next++
		} else if err == nil {
			err = v
		}
	}
	return err
}

// next returns the current epoch's head and the sequence that the stream's next record gets.
func (b *box) next(stream string) (h *longshorepb.OutboxHead, next uint64) {
	heads := b.log.Heads()
	h = heads[len(heads)-1]
	for _, s := range h.GetStreams() {
		if s.GetStream() == stream {
			return h, s.GetNext()
		}
	}
	return h, 1
}

// tooLarge has n records that can never be stored ledgered, and notes them as promised.
func (b *box) tooLarge(stream string, n int) error {
	b.t.Helper()
	h, next := b.next(stream)
	if err := b.log.LoseTooLarge(stream, n); err != nil {
		return err
	}
	for i := range n {
		b.promised = append(b.promised, accepted{string(h.GetEpoch()), stream, next + uint64(i), "never stored"})
	}
	return nil
}

// send passes up to n messages of both lanes to the cloud; every third is lost if lossy. It fails if the power goes.
func (b *box) send(live, backlog *Reader, n int, lossy bool) error {
	b.t.Helper()
	idle := 0
	for k := 0; k < n && idle < 2; k++ {
		r := live
		if k%2 == 1 {
			r = backlog
		}
		m, err := r.Next(2048)
		if err != nil {
			return err
		}
		if m == nil {
			idle++
			continue
		}
		idle = 0
		if !lossy || k%3 != 0 {
			b.receive(m)
		}
	}
	return nil
}

func (b *box) receive(m *longshorepb.Telemetry) {
	b.t.Helper()
	for _, x := range m.GetLedger() {
		if x.GetReason() != reasonCorrupt || b.corrupt {
			continue
		}
		for _, p := range b.promised {
			if p.epoch == string(m.GetEpoch()) && p.stream == x.GetStream() && x.GetFirst() <= p.seq && p.seq <= x.GetLast() {
				b.t.Fatalf("promised record %d of %q is claimed damaged", p.seq, p.stream)
			}
		}
	}
	b.cloud.receive(m)
}

// settle sends everything and checks that every promise was kept.
func (b *box) settle() {
	b.t.Helper()
	live, backlog := b.log.NewReaders()
	if err := b.send(live, backlog, 1<<20, false); err != nil {
		b.t.Fatal(err)
	}
	for _, p := range b.promised {
		if !b.cloud.account([]byte(p.epoch), p.stream).Holds(p.seq, p.seq) {
			b.t.Fatalf("promised record %d of %q (%.20q) is neither delivered nor ledgered", p.seq, p.stream, p.payload)
		}
		key := fmt.Sprintf("%x %s %d", p.epoch, p.stream, p.seq)
		if have, ok := b.cloud.records[key]; ok && have != p.payload {
			b.t.Fatalf("record %s is %.20q, promised was %.20q", key, have, p.payload)
		}
	}
	accepted, delivered, ledgered, duplicates := b.cloud.sums()
	if accepted != delivered+ledgered || duplicates != 0 {
		b.t.Fatalf("accepted %d, delivered %d, ledgered %d, duplicates %d", accepted, delivered, ledgered, duplicates)
	}
	if err := b.log.Ack(b.cloud.ack()); err != nil {
		b.t.Fatal(err)
	}
	stats, _ := b.log.Stats()
	for _, s := range stats {
		if s.Held != 0 {
			b.t.Fatalf("held after everything is acknowledged: %+v", s)
		}
	}
	if heads := b.log.Heads(); len(heads) != 1 {
		b.t.Fatalf("epochs left: %v", heads)
	}
}

// live is a day in the life of a box: appends, losses on the way, acknowledgements, quota drops, restarts. It ends when
// the power goes.
func (b *box) live(rng *rand.Rand) error {
	small := func(i int) string { return fmt.Sprintf("record %d", i) }
	large := func(i int) string { return fmt.Sprintf("record %d %s", i, randomText(6000)) }
	for start := range 3 {
		if !b.open() {
			return errPower
		}
		live, backlog := b.log.NewReaders()
		for range 6 {
			steps := []func() error{
				func() error { return b.append("small", 1+rng.IntN(5), small) },
				func() error { return b.append("large", 1+rng.IntN(3), large) },
				func() error { return b.append("large", 2, large) },
				func() error { return b.tooLarge("small", 1+rng.IntN(3)) },
				func() error { return b.send(live, backlog, 1+rng.IntN(12), true) },
				func() error { return b.log.Ack(b.cloud.ack()) },
				func() error { live, backlog = b.log.NewReaders(); return nil },
				b.log.tend,
			}
			if err := steps[rng.IntN(len(steps))](); err != nil {
				if b.disk.off {
					return errPower
				}
				b.t.Fatalf("a step failed with the power on: %v", err)
			}
		}
		if start == 1 { // the agent crashes; what it wrote stays
			b.disk.locked = map[string]bool{}
			continue
		}
		if err := b.log.Close(); err != nil {
			return errPower
		}
	}
	return nil
}

// G2, G3: wherever the power goes, in the middle of a write, a sync, a rename or a removal, also twice in a row: nothing
// promised to a producer is lost in silence, nothing comes twice, and the outbox opens again.
func TestG3PowerCutAnywhere(t *testing.T) {
	cfg := Config{Quotas: map[string]Quota{"large": {MaxBytes: 64 << 10}}, SegmentBytes: 8 << 10}
	total := 0
	for seed := range uint64(4) {
		b := newBox(t, seed, cfg)
		if err := b.live(rand.New(rand.NewPCG(seed, 2))); err != nil {
			t.Fatal(err)
		}
		ops := b.disk.ops
		for cut := 1; cut <= ops; cut++ {
			b := newBox(t, seed, cfg)
			b.disk.cut = cut
			if err := b.live(rand.New(rand.NewPCG(seed, 2))); !errors.Is(err, errPower) {
				t.Fatalf("seed %d: the power did not go at %d of %d: %v", seed, cut, ops, err)
			}
			b.reboot()
			if cut%3 == 0 { // again, while it recovers
				b.disk.cut = 1 + cut%7
				if b.open() {
					_ = b.log.Close() // the power may go now, or not at all
				}
				b.reboot()
			}
			if !b.open() {
				t.Fatal("the power is on, yet gone")
			}
			b.settle()
			total++
		}
	}
	t.Logf("%d power cuts", total)
}

// What the cloud has acknowledged must not be claimed as lost after a power cut, whichever of the files are still there: the
// edge's own figures would be wrong.
func TestPowerCutAfterAcknowledgement(t *testing.T) {
	for seed := range uint64(10) {
		b := newBox(t, seed, Config{SegmentBytes: 4 << 10})
		b.open()
		for range 6 {
			if err := b.append("s", 1, func(i int) string { return fmt.Sprintf("%d %s", i, randomText(5000)) }); err != nil {
				t.Fatal(err)
			}
		}
		live, backlog := b.log.NewReaders()
		if err := b.send(live, backlog, 1000, false); err != nil {
			t.Fatal(err)
		}
		if err := b.log.Ack(b.cloud.ack()); err != nil {
			t.Fatal(err)
		}
		b.reboot()
		b.open()
		b.settle()
		if s, _ := b.log.Stats(); s[0].Dropped != 0 || s[0].Acked != 6 {
			t.Fatalf("seed %d: %+v", seed, s[0])
		}
	}
}

// A full disk must cost nothing that was promised: appends fail with an error that says what to do until there is room again.
// Acknowledgements give room back though nothing can be written.
func TestFullDisk(t *testing.T) {
	b := newBox(t, 1, Config{SegmentBytes: 8 << 10})
	text := func(i int) string { return fmt.Sprintf("%d %s", i, randomText(900)) }
	if !b.open() {
		t.Fatal()
	}
	b.disk.limited, b.disk.space = true, 60_000
	var err error
	for n := 0; err == nil && n < 100; n++ {
		err = b.append("s", 1, text)
	}
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "free space") {
		t.Fatalf("append on a full disk: %v", err)
	}
	for range 3 {
		if err := b.append("s", 1, text); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("still full: %v", err)
		}
	}
	promised := len(b.promised)
	live, backlog := b.log.NewReaders()
	if err := b.send(live, backlog, 1000, false); err != nil {
		t.Fatal(err)
	}
	if len(b.cloud.order) != promised {
		t.Fatalf("%d of %d promised records can be read", len(b.cloud.order), promised)
	}
	b.disk.space = 0
	b.corrupt = true // what was acknowledged without a note of it is claimed as lost, and the cloud knows better
	if err := b.log.Ack(b.cloud.ack()); err != nil {
		t.Fatal(err)
	}
	if err := b.append("s", 20, text); err != nil {
		t.Fatalf("after room was given back: %v", err)
	}
	b.reboot()
	b.open()
	b.settle()
}

// Telemetry must leave room to what else is on the disk, or a box that it filled up could not even start and connect to deliver it.
func TestReserveIsLeftFree(t *testing.T) {
	const reserve = 40_000
	text := func(i int) string { return fmt.Sprintf("%d %s", i, randomText(900)) }
	for _, policy := range []Policy{DropOldest, Refuse} {
		b := newBox(t, 1, Config{SegmentBytes: 8 << 10, Reserve: reserve, Default: Quota{Policy: policy}})
		if !b.open() {
			t.Fatal()
		}
		b.disk.limited, b.disk.space = true, 90_000
		var err error
		for n := 0; err == nil && n < 200; n++ {
			err = b.append("s", 1, text)
			if b.disk.space < reserve*3/4 {
				t.Fatalf("%s: %d bytes are left free", policy, b.disk.space)
			}
		}
		s, _ := b.log.Stats()
		switch policy {
		case DropOldest:
			if err != nil || s[0].Dropped == 0 || s[0].Held < 10 {
				t.Errorf("drop-oldest: %v, %+v", err, s[0])
			}
		case Refuse:
			if !errors.Is(err, ErrDiskLow) || !errors.Is(err, ErrFull) || s[0].Dropped != 0 || s[0].Refused != 1 {
				t.Errorf("refuse: %v, %+v", err, s[0])
			}
		}
		b.settle()
		if err := b.append("s", 1, text); err != nil {
			t.Errorf("%s: after room was given back: %v", policy, err)
		}
		b.reboot()
		b.open()
		b.settle()
	}
}

// A disk that others filled must not keep the box from starting and sending what it holds; and as soon as there is room again,
// records must be taken, though nobody touches the agent.
func TestStartOnFullDisk(t *testing.T) {
	for seed := range uint64(10) {
		b := newBox(t, seed, Config{SegmentBytes: 8 << 10, Reserve: 20_000})
		text := func(i int) string { return fmt.Sprintf("%d %s", i, randomText(900)) }
		b.open()
		if err := b.append("s", 40, text); err != nil {
			t.Fatal(err)
		}
		b.reboot()
		b.disk.limited = true
		if !b.open() {
			t.Fatal()
		}
		if b.log.Failing() == nil {
			t.Error("the outbox does not say that it takes nothing")
		}
		b.corrupt = seed%2 == 1 // a segment that goes before its loss is written down counts as damaged if the power goes
		if seed%2 == 0 {        // acknowledgements make room
			b.settle()
		}
		if err := b.append("s", 2, text); err != nil { // and so does dropping the oldest
			t.Fatalf("append: %v", err)
		}
		if err := b.log.Failing(); err != nil {
			t.Error(err)
		}
		b.reboot()
		b.open()
		b.settle()
	}
}

// After a failed fsync the kernel may have thrown the pages away and say so never again: what comes later must not build
// on them.
func TestFailedSyncAbandonsTheSegment(t *testing.T) {
	for seed := range uint64(20) {
		b := newBox(t, seed, Config{})
		b.open()
		text := func(i int) string { return fmt.Sprint("record ", i) }
		if err := b.append("s", 3, text); err != nil {
			t.Fatal(err)
		}
		b.disk.failSyncs = 1 + int(seed%3)
		for range b.disk.failSyncs {
			if err := b.append("s", 2, text); !errors.Is(err, syscall.EIO) {
				t.Fatalf("append with a failing disk: %v", err)
			}
		}
		if err := b.append("s", 4, text); err != nil {
			t.Fatal(err)
		}
		if len(b.promised) != 7 {
			t.Fatalf("%d records promised", len(b.promised))
		}
		b.reboot()
		b.open()
		b.settle()
		if len(b.cloud.order) < 7 {
			t.Fatalf("%d records arrived", len(b.cloud.order))
		}
	}
}

// One flipped bit costs the batch it is in, which is then in the ledger, and nothing else; wherever the bit is.
func TestFlippedBitCostsItsBatch(t *testing.T) {
	const batches = 12
	prepare := func() (*box, string, []byte) {
		b := newBox(t, 1, Config{})
		b.open()
		for range batches {
			if err := b.append("s", 2, func(i int) string { return fmt.Sprintf("record %d LSB1", i) }); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.log.Close(); err != nil {
			t.Fatal(err)
		}
		for path, in := range b.disk.now {
			if strings.HasSuffix(path, ".seg") {
				return b, path, in.data
			}
		}
		t.Fatal("no segment")
		return nil, "", nil
	}
	_, _, whole := prepare()
	// Each batch has the bit in other bytes of it, together in about every one.
	for at := 0; at < len(whole); at += 5 {
		b, path, data := prepare()
		data[at] ^= 1 << (at % 8)
		b.disk.now[path].data, b.corrupt = data, true
		b.open()
		b.settle()
		_, delivered, ledgered, _ := b.cloud.sums()
		if delivered != 2*batches-2 || ledgered != 2 {
			t.Fatalf("bit in byte %d of %d: delivered %d, ledgered %d", at, len(whole), delivered, ledgered)
		}
		if b.cloud.losses[0].GetReason() != reasonCorrupt {
			t.Fatalf("ledger says %v", b.cloud.losses)
		}
	}
}

// The same where the agent crashed, so that nothing but the damaged batch itself tells that it is the last.
func TestFlippedBitInTheLastBatch(t *testing.T) {
	for at := range 40 {
		b := newBox(t, 1, Config{})
		b.open()
		for range 3 {
			if err := b.append("s", 2, func(i int) string { return fmt.Sprintf("record %d", i) }); err != nil {
				t.Fatal(err)
			}
		}
		for path, in := range b.disk.now {
			if strings.HasSuffix(path, ".seg") {
				in.data[len(in.data)-1-at] ^= 1
			}
		}
		b.disk.locked, b.corrupt = map[string]bool{}, true
		b.open()
		b.settle()
		if _, delivered, ledgered, _ := b.cloud.sums(); delivered != 4 || ledgered != 2 {
			t.Fatalf("byte %d from the end: delivered %d, ledgered %d", at, delivered, ledgered)
		}
	}
}

// A sink that acknowledges a part of a frame gets the rest, also after a restart.
func TestPartOfAFrameAcknowledged(t *testing.T) {
	b := newBox(t, 1, Config{})
	for _, part := range []*longshorepb.StreamAck{
		{Stream: "s", Watermark: 4}, {Stream: "s", Watermark: 4, Above: []*longshorepb.Range{{First: 6, Last: 9}}},
	} {
		b.open()
		if err := b.append("s", 10, func(i int) string { return fmt.Sprint("record ", i) }); err != nil {
			t.Fatal(err)
		}
		heads := b.log.Heads()
		epoch := heads[len(heads)-1].GetEpoch()
		for n := uint64(1); n < 10; n++ {
			if n < part.GetWatermark() || len(part.GetAbove()) > 0 && n >= 6 {
				if _, err := b.cloud.account(epoch, "s").Book(n, n); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := b.log.Ack(&longshorepb.Ack{Epochs: []*longshorepb.EpochAck{{Epoch: epoch, Streams: []*longshorepb.StreamAck{part}}}}); err != nil {
			t.Fatal(err)
		}
		if err := b.log.Close(); err != nil {
			t.Fatal(err)
		}
	}
	b.open()
	b.settle()
	if _, delivered, ledgered, _ := b.cloud.sums(); delivered != 20 || ledgered != 0 {
		t.Errorf("delivered %d, ledgered %d", delivered, ledgered)
	}
}

// A lost or damaged state file must not make the outbox forget, repeat or hide anything.
func TestDamagedStateFile(t *testing.T) {
	b := newBox(t, 1, Config{SegmentBytes: 4 << 10})
	b.corrupt = true // what was acknowledged is claimed as lost, and the cloud knows better
	text := func(i int) string { return fmt.Sprintf("%d %s", i, randomText(500)) }
	for range 3 {
		b.open()
		for range 20 {
			if err := b.append("s", 1, text); err != nil {
				t.Fatal(err)
			}
		}
		live, backlog := b.log.NewReaders()
		if err := b.send(live, backlog, 8, false); err != nil {
			t.Fatal(err)
		}
		if err := b.log.Ack(b.cloud.ack()); err != nil {
			t.Fatal(err)
		}
		if err := b.log.Close(); err != nil {
			t.Fatal(err)
		}
	}
	state := b.disk.now["/state/state"]
	state.data[len(state.data)/2] ^= 1
	b.open()
	b.settle()
	if _, delivered, ledgered, _ := b.cloud.sums(); delivered != 60 || ledgered != 0 {
		t.Errorf("delivered %d, ledgered %d of 60", delivered, ledgered)
	}
}

// Age counts by time the box was on, over restarts and boots; a wrong wall clock changes nothing. What is too old is
// dropped and ledgered as that.
func TestAgeQuota(t *testing.T) {
	b := newBox(t, 1, Config{Default: Quota{MaxAge: time.Hour}})
	text := func(i int) string { return fmt.Sprint("record ", i) }
	b.open()
	if err := b.append("s", 3, text); err != nil {
		t.Fatal(err)
	}
	b.clock.pass(int64(40 * time.Minute))
	if err := b.append("s", 3, text); err != nil {
		t.Fatal(err)
	}
	if err := b.log.Close(); err != nil {
		t.Fatal(err)
	}
	b.reboot()
	b.open()
	b.clock.pass(int64(10 * time.Minute))
	if err := b.log.tend(); err != nil {
		t.Fatal(err)
	}
	if s, _ := b.log.Stats(); s[0].Held != 6 || s[0].OldestAge < 50*time.Minute || s[0].OldestAge > 51*time.Minute {
		t.Fatalf("after 50 minutes: %+v", s[0])
	}
	b.clock.pass(int64(15 * time.Minute))
	if err := b.log.tend(); err != nil {
		t.Fatal(err)
	}
	if s, _ := b.log.Stats(); s[0].Held != 3 || s[0].Dropped != 3 {
		t.Fatalf("after 65 minutes: %+v", s[0])
	}
	b.settle()
	if len(b.cloud.losses) == 0 || b.cloud.losses[0].GetReason() != reasonAge {
		t.Errorf("losses %v", b.cloud.losses)
	}
}

// No bytes on the disk may crash the agent at its start or make it claim records that were never promised as delivered.
func FuzzRecoverSegment(f *testing.F) {
	seedBox := newBox(f, 1, Config{})
	seedBox.open()
	if err := seedBox.append("s", 3, func(i int) string { return strings.Repeat("x", 50*i) }); err != nil {
		f.Fatal(err)
	}
	for path, in := range seedBox.disk.now {
		if strings.HasSuffix(path, ".seg") {
			f.Add(in.data, uint16(3))
			f.Add(in.data[:len(in.data)-1], uint16(0))
		}
	}
	f.Add([]byte("LSB1LSB1"), uint16(9))
	f.Fuzz(func(t *testing.T, tail []byte, at uint16) {
		b := newBox(t, 1, Config{})
		b.corrupt = true
		b.open()
		if err := b.append("s", 2, func(i int) string { return fmt.Sprint(i) }); err != nil {
			t.Fatal(err)
		}
		if err := b.append("s", 2, func(i int) string { return fmt.Sprint(i) }); err != nil {
			t.Fatal(err)
		}
		for path, in := range b.disk.now {
			if strings.HasSuffix(path, ".seg") {
				cut := min(int(at), len(in.data))
				in.data = append(in.data[:cut:cut], tail...)
			}
		}
		b.disk.locked = map[string]bool{}
		b.open()
		live, backlog := b.log.NewReaders()
		for _, r := range []*Reader{live, backlog} {
			for {
				m, err := r.Next(frame.MaxMessage)
				if err != nil {
					t.Fatal(err)
				}
				if m == nil {
					break
				}
				for _, raw := range m.GetFrames() {
					if _, err := b.cloud.decoder.Decode(raw); err != nil {
						t.Fatalf("a frame that passed the checksum: %v", err)
					}
				}
			}
		}
	})
}
