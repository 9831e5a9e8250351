package uplink

import (
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const (
	// windowMin and windowMax bound telemetry bytes sent and not acknowledged.
	windowMin = 32 << 10
	windowMax = 1 << 20
	// quickAck is the delay of an acknowledgement up to which the window grows, slowAck that from which it shrinks: the
	// window follows what the link carries in about two seconds.
	quickAck = time.Second
	slowAck  = 3 * time.Second
	// lossMin and lossMax bound the doubling time after which a batch without acknowledgement counts as lost.
	lossMin = 30 * time.Second
	lossMax = 5 * time.Minute
)

// span is a run [first, last] of sequences of one stream.
type span struct {
	stream      string
	first, last uint64
}

// batch is one telemetry message on its way, or the fragments of one frame, which are acknowledged together.
type batch struct {
	epoch    string
	spans    []span
	boots    []string
	bytes    int
	at       time.Time
	fragment bool
}

// flow bounds telemetry bytes in flight. It is a pure value: callers pass the time.
type flow struct {
	window, outstanding int
	batches             []*batch // oldest first
	patience            time.Duration
}

func newFlow() *flow { return &flow{window: windowMin, patience: lossMin} }

func (f *flow) state() (window, outstanding int) { return f.window, f.outstanding }

// allows returns the size of the next message and which lanes may send one. A quarter of the window is kept for the live
// lane, so that it does not wait behind the backlog. Messages are small while the link is slow.
func (f *flow) allows() (size int, live, backlog bool) {
	size = min(f.window/4, maxMessage)
	return size, f.outstanding+size <= f.window, f.outstanding+size <= f.window/4*3
}

// sent notes a batch. One that carries nothing to acknowledge is not waited for.
func (f *flow) sent(b *batch, now time.Time) {
	if len(b.spans) == 0 {
		return
	}
	b.at = now
	f.outstanding += b.bytes
	if b.fragment {
		for _, o := range f.batches {
			if o.fragment && o.epoch == b.epoch && slices.Equal(o.spans, b.spans) {
				o.bytes, o.at = o.bytes+b.bytes, now
				return
			}
		}
	}
	f.batches = append(f.batches, b)
}

// acked takes what an acknowledgement covers out of flight and adapts the window to the delay.
func (f *flow) acked(a *longshorepb.Ack, now time.Time) {
	full := f.outstanding > f.window/2
	for _, e := range a.GetEpochs() {
		for _, s := range e.GetStreams() {
			for _, b := range f.batches {
				if b.epoch == string(e.GetEpoch()) {
					b.spans = slices.DeleteFunc(b.spans, func(p span) bool { return covers(s, p) })
				}
			}
		}
	}
	f.batches = slices.DeleteFunc(f.batches, func(b *batch) bool {
		if len(b.spans) > 0 {
			return false
		}
		f.outstanding -= b.bytes
		f.patience = lossMin
		switch delay := now.Sub(b.at); {
		case delay < quickAck && full:
			f.window = min(f.window+b.bytes, windowMax)
		case delay > slowAck:
			f.window = max(f.window-b.bytes, windowMin)
		}
		return true
	})
}

func covers(s *longshorepb.StreamAck, p span) bool {
	if s.GetStream() != p.stream {
		return false
	}
	if p.last < s.GetWatermark() {
		return true
	}
	first := max(p.first, s.GetWatermark())
	return slices.ContainsFunc(s.GetAbove(), func(r *longshorepb.Range) bool {
		return r.GetFirst() <= first && p.last <= r.GetLast()
	})
}

// lost reports whether the oldest batch waits too long: the hub was too busy to take it.
func (f *flow) lost(now time.Time) bool {
	return len(f.batches) > 0 && now.Sub(f.batches[0].at) > f.patience
}

// rewind forgets what is in flight; the caller reads it again.
func (f *flow) rewind() {
	f.batches, f.outstanding, f.window = nil, 0, windowMin
	f.patience = min(2*f.patience, lossMax)
}

// describe says what a message carries.
func describe(t *longshorepb.Telemetry) *batch {
	b := &batch{epoch: string(t.GetEpoch())}
	for _, f := range t.GetFrames() {
		b.add(f)
	}
	if f := t.GetFragment(); f != nil {
		b.spans = append(b.spans, span{f.GetStream(), f.GetFirst(), f.GetFirst()})
		b.fragment = true
		if f.GetOffset() == 0 {
			if _, boot := header(f.GetData()); boot != "" {
				b.boots = append(b.boots, boot)
			}
		}
	}
	for _, l := range t.GetLedger() {
		b.spans = append(b.spans, span{l.GetStream(), l.GetFirst(), l.GetLast()})
	}
	return b
}

func (b *batch) add(frame []byte) {
	p, boot := header(frame)
	b.spans = append(b.spans, p)
	if !slices.Contains(b.boots, boot) {
		b.boots = append(b.boots, boot)
	}
}

// header reads what precedes the records of a serialized Frame, which may be cut short, without copying the records.
func header(frame []byte) (p span, boot string) {
	fields := (&longshorepb.Frame{}).ProtoReflect().Descriptor().Fields()
	records := fields.ByName("records").Number()
	var head []byte
	for rest := frame; len(rest) > 0; {
		num, _, n := protowire.ConsumeField(rest)
		if n < 0 || num == records {
			break
		}
		head = append(head, rest[:n]...)
		rest = rest[n:]
	}
	var f longshorepb.Frame
	if err := proto.Unmarshal(head, &f); err != nil {
		return span{}, ""
	}
	return span{f.GetStream(), f.GetFirst(), f.GetFirst() + uint64(max(f.GetCount(), 1)) - 1}, f.GetBootId()
}
