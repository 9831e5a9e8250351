package outbox

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
)

const (
	// minMessage is the smallest message a Reader builds, in bytes.
	minMessage = 512
	// maxFailed is how often a place on the disk is tried before what stands there counts as lost.
	maxFailed = 5
)

// Reader walks what is not acknowledged and builds batches to send.
// One for the live lane (records appended since the session began, newest epoch) and one for the backlog lane, which also
// carries the ledger. A Reader is for one goroutine; it stays valid while the Log is open and needs no closing.
type Reader struct {
	log  *Log
	live bool
	// now is the epoch that was current when the Reader was made; split is the first sequence of its live part by stream, 1
	// for streams that came later.
	now   *epoch
	split map[string]uint64

	cursors map[*track]*cursor
	// turn is the stream served last, so that the next comes first.
	turn string
	// told holds the ledger entries sent, seen the ledgerings looked at.
	told map[*loss]bool
	seen uint64
	part *part
	buf  []byte
}

// cursor is the next sequence to send of a track, and where to look for it.
type cursor struct {
	seq uint64
	seg *segment
	off int64
	// failed counts reads that failed here.
	failed int
}

// part is a frame that is sent in fragments.
type part struct {
	t           *track
	first, last uint64
	body        []byte
	off         int
}

// NewReaders returns the readers of a new session: the backlog lane from the oldest record not acknowledged up to here,
// the live lane from here on. Both together cover every record; what the live lane could not send before its connection
// ended is the next session's backlog. New readers are also the way to send again what a hub past its bounds dropped:
// take them when acknowledgements do not come for longer than a round trip to the sink may take.
func (l *Log) NewReaders() (live, backlog *Reader) {
	l.mu.Lock()
	defer l.mu.Unlock()
	split := map[string]uint64{}
	for name, t := range l.current().tracks {
		split[name] = t.next
	}
	reader := func(live bool) *Reader {
		return &Reader{
			log: l, live: live, now: l.current(), split: split, cursors: map[*track]*cursor{}, told: map[*loss]bool{},
		}
	}
	return reader(true), reader(false)
}

// Next returns the next message to send, at most maxBytes serialized (never above 16 KiB, at least 512); nil if there is none
// now. Ranges acknowledged meanwhile are skipped. The caller adds Clocks and leaves room for them. An error is one of
// the disk; the next call tries again.
func (r *Reader) Next(maxBytes int) (*longshorepb.Telemetry, error) {
	if maxBytes = min(maxBytes, frame.MaxMessage); maxBytes < minMessage {
		return nil, fmt.Errorf("a message of %d bytes is below the least, %d", maxBytes, minMessage)
	}
	if !r.live {
		if m := r.nextLosses(maxBytes); m != nil {
			return m, nil
		}
	}
	if m := r.nextPart(maxBytes); m != nil {
		return m, nil
	}
	b := &builder{max: maxBytes, m: &longshorepb.Telemetry{Historical: !r.live}}
	lanes, err := r.lanes()
	if err != nil {
		return nil, err
	}
	for _, lane := range lanes {
		if len(b.m.GetFrames()) > 0 && b.epoch != lane.t.epoch {
			break
		}
		if err := r.fill(b, lane.t, lane.start, lane.end); err != nil {
			if len(b.m.GetFrames()) > 0 {
				break // send what there is; the error comes again
			}
			return nil, fmt.Errorf("read outbox: %w", err)
		}
		if r.part != nil || b.full {
			break
		}
	}
	if len(b.m.GetFrames()) == 0 {
		return r.nextPart(maxBytes), nil
	}
	return b.m, nil
}

// lane is the part [start, end) of a track that a Reader is to send.
type lane struct {
	t          *track
	start, end uint64
}

// lanes returns what the Reader has to send from, in the order of sending.
func (r *Reader) lanes() ([]lane, error) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.log.closed {
		return nil, ErrClosed
	}
	var out []lane
	for _, e := range r.log.epochs {
		if r.live && e != r.now {
			continue
		}
		names := slices.Sorted(maps.Keys(e.tracks))
		if i, _ := slices.BinarySearch(names, r.turn+"\x00"); i < len(names) {
			names = append(names[i:], names[:i]...)
		}
		for _, name := range names {
			t := e.tracks[name]
			n := lane{t, t.low(), t.next}
			if split := max(r.split[name], 1); e == r.now && r.live {
				n.start = split
			} else if e == r.now {
				n.end = split
			}
			if c := r.cursors[t]; c != nil {
				n.start = max(n.start, c.seq)
			}
			if n.start < n.end {
				out = append(out, n)
			}
		}
	}
	return out, nil
}

// builder gathers frames of one epoch for a message.
type builder struct {
	max, used int
	epoch     *epoch
	m         *longshorepb.Telemetry
	// full says that a frame waits that did not fit any more.
	full bool
}

// begin makes room for a stream's frames and says what is left for them.
func (b *builder) begin(t *track) (left int) {
	if b.epoch != t.epoch { // nothing is in the message yet
		b.epoch = t.epoch
		b.m.Epoch = slices.Clone(t.epoch.id[:])
		b.used = proto.Size(b.m)
	}
	return b.max - b.used - lowSize(t.stream)
}

func (b *builder) stream(t *track, low uint64) {
	b.m.Low = append(b.m.Low, &longshorepb.StreamLow{Stream: t.stream, Low: low})
	b.used += lowSize(t.stream)
}

// lowSize bounds the size of a StreamLow in a message.
func lowSize(stream string) int { return 2 + 2 + len(stream) + 1 + 10 }

func frameSize(n int) int { return 1 + protowire.SizeBytes(n) }

// fill adds frames of [start, end) of a track to the message, or sets r.part to the first one if that fits no message.
func (r *Reader) fill(b *builder, t *track, start, end uint64) (err error) {
	c := r.cursors[t]
	if c == nil {
		c = &cursor{}
		r.cursors[t] = c
	}
	c.seq = max(c.seq, start)
	left := b.begin(t)
	added := false
	var f file
	var open *segment
	w := window{buf: r.buf, seed: seed(t.epoch.id, t.stream)}
	defer func() {
		r.buf = w.buf
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		if added {
			r.log.mu.Lock()
			b.stream(t, t.low())
			r.log.mu.Unlock()
			r.turn = t.stream
		}
	}()
	for {
		s, size, limit, err := r.locate(t, c, end)
		if err != nil || s == nil {
			return err
		}
		if s != open {
			if f != nil {
				if err := f.Close(); err != nil {
					return err
				}
			}
			if f, err = r.log.disk.Open(s.path); err != nil {
				f = nil
				if err := r.unreadable(t, c, s, limit, err); err != nil {
					return err
				}
				continue
			}
			open, w.r, w.buf, w.at = s, f, w.buf[:0], 0
			if c.seg != s {
				c.seg, c.off = s, 0
			}
		}
		w.end = size
		found, _, ok, err := nextBatch(&w, c.off, c.seq)
		if err != nil {
			if err := r.unreadable(t, c, s, limit, err); err != nil {
				return err
			}
			continue
		}
		c.failed = 0
		if !ok || found.first >= limit {
			found.first = limit
		}
		if found.first > c.seq {
			if err := r.lose(t, c.seq, found.first-1); err != nil {
				return err
			}
			continue
		}
		if frameSize(int(found.size)) > left {
			b.full = true
			if len(b.m.GetFrames()) == 0 {
				r.part = &part{t: t, first: found.first, last: found.last(), body: slices.Clone(found.body)}
				c.seq, c.off = found.last()+1, found.end()
			}
			return nil
		}
		b.m.Frames = append(b.m.Frames, slices.Clone(found.body))
		b.used += frameSize(int(found.size))
		left -= frameSize(int(found.size))
		added = true
		c.seq, c.off = found.last()+1, found.end()
	}
}

// locate moves a cursor to the next sequence below end that is still held and returns its segment, how many bytes of it are
// good, and the sequence at which it ends. It is nil if there is none. Sequences that should be in a segment and are
// in none are ledgered.
func (r *Reader) locate(t *track, c *cursor, end uint64) (s *segment, size int64, limit uint64, err error) {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, 0, 0, ErrClosed
	}
	for c.seq < end {
		held := t.done.Missing(c.seq, end-1)
		if len(held) == 0 {
			c.seq = end
			break
		}
		c.seq = held[0].First
		s := t.segmentAt(c.seq)
		if s != nil && s.first <= c.seq {
			return s, s.bytes, min(s.next, end), nil
		}
		last := held[0].Last
		if s != nil {
			last = min(last, s.first-1)
		}
		if err := l.lose(t, c.seq, last, reasonCorrupt); err != nil {
			return nil, 0, 0, err
		}
	}
	return nil, 0, 0, nil
}

// lose ledgers sequences that their segment does not hold any more.
func (r *Reader) lose(t *track, first, last uint64) error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if err := r.log.lose(t, first, last, reasonCorrupt); err != nil {
		return err
	}
	return r.log.release(nil)
}

// unreadable judges an error of reading a segment: nil if the segment was given back meanwhile, or is now ledgered because it
// is not there or could not be read for too often.
func (r *Reader) unreadable(t *track, c *cursor, s *segment, limit uint64, cause error) error {
	r.log.mu.Lock()
	gone := !slices.Contains(t.segs, s)
	r.log.mu.Unlock()
	if gone {
		return nil
	}
	if c.failed++; c.failed < maxFailed && !errors.Is(cause, os.ErrNotExist) {
		return cause
	}
	c.failed = 0
	return r.lose(t, c.seq, limit-1)
}

// nextPart returns the next fragment of a frame too large for a message; nil if there is none.
func (r *Reader) nextPart(maxBytes int) *longshorepb.Telemetry {
	p := r.part
	if p == nil {
		return nil
	}
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if p.t.done.Contains(p.first, p.last) {
		r.part = nil
		return nil
	}
	b := &builder{max: maxBytes, m: &longshorepb.Telemetry{Historical: !r.live}}
	b.begin(p.t)
	b.stream(p.t, p.t.low())
	room := maxBytes - b.used - len(p.t.stream) - 48 // the fragment's other fields
	n := min(room, len(p.body)-p.off)
	b.m.Fragment = &longshorepb.Fragment{
		Stream: p.t.stream, First: p.first, Offset: uint32(p.off), Total: uint32(len(p.body)), Data: p.body[p.off : p.off+n],
	}
	p.off += n
	r.turn = p.t.stream
	if p.off == len(p.body) {
		r.part = nil
	}
	return b.m
}

// nextLosses returns ledger entries the sink has not confirmed and this Reader has not sent; nil if there are none.
func (r *Reader) nextLosses(maxBytes int) *longshorepb.Telemetry {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.seen == l.ledgerings+1 {
		return nil
	}
	for _, e := range l.epochs {
		b := &builder{max: maxBytes, m: &longshorepb.Telemetry{Historical: true}}
		for _, name := range slices.Sorted(maps.Keys(e.tracks)) {
			t := e.tracks[name]
			left := b.begin(t)
			n := len(b.m.GetLedger())
			for _, x := range t.losses {
				if r.told[x] {
					continue
				}
				out := &longshorepb.Loss{Stream: name, First: x.First, Last: x.Last, Reason: x.Reason, WallNs: x.WallNs}
				size := frameSize(proto.Size(out))
				if size > left {
					break
				}
				left -= size
				b.used += size
				b.m.Ledger = append(b.m.Ledger, out)
				r.told[x] = true
			}
			if len(b.m.GetLedger()) > n {
				b.stream(t, t.low())
			}
		}
		if len(b.m.GetLedger()) > 0 {
			return b.m
		}
	}
	r.seen = l.ledgerings + 1
	return nil
}
