package outbox

import (
	"slices"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/seqset"
)

// epoch is what one start of the agent wrote. Guarded by Log.mu.
type epoch struct {
	id [16]byte
	// tracks by stream.
	tracks map[string]*track
}

// finished says that nothing of the epoch is held or still to be told.
func (e *epoch) finished() bool {
	for _, t := range e.tracks {
		if len(t.segs) > 0 || len(t.losses) > 0 || t.done.Watermark() < t.next {
			return false
		}
	}
	return true
}

// track is one stream of one epoch. Guarded by Log.mu.
type track struct {
	epoch  *epoch
	stream string
	// next is the next sequence to be appended; every one below was accepted.
	next uint64
	// done is what is acknowledged or in the ledger: not held any more.
	done seqset.Set
	// acked and dropped count records; their sum is done.Count().
	acked, dropped uint64
	// losses the sink has not confirmed, sorted by first.
	losses []*loss
	// segs in order of first, without overlap.
	segs []*segment
}

// loss is a ledger entry. It is never changed, only replaced.
type loss struct {
	First  uint64 `json:"first"`
	Last   uint64 `json:"last"`
	Reason string `json:"reason"`
	WallNs int64  `json:"wallNs"`
}

// Reasons of losses.
const (
	reasonBytes    = "QuotaBytes"
	reasonAge      = "QuotaAge"
	reasonCorrupt  = "Corrupt"
	reasonTooLarge = "TooLarge"
)

// low is the oldest sequence still held.
func (t *track) low() uint64 { return t.done.Watermark() }

func (t *track) held() uint64 { return t.next - 1 - t.done.Count() }

func (t *track) diskBytes() (n int64) {
	for _, s := range t.segs {
		n += s.onDisk()
	}
	return n
}

// lose moves what is still held of [first, last] to the ledger and says whether that was anything. Entries that touch
// are merged, so that a long time offline costs one entry.
func (t *track) lose(first, last uint64, reason string, wall int64) bool {
	fresh := t.done.Add(first, last)
	for _, r := range fresh {
		t.dropped += r.Len()
		t.ledger(&loss{r.First, r.Last, reason, wall})
	}
	return len(fresh) > 0
}

func (t *track) ledger(n *loss) {
	i, _ := slices.BinarySearchFunc(t.losses, n.First, func(l *loss, first uint64) int {
		if l.First < first {
			return -1
		}
		return 1
	})
	if i > 0 {
		if p := t.losses[i-1]; p.Last+1 == n.First && p.Reason == n.Reason {
			t.losses[i-1] = &loss{p.First, n.Last, n.Reason, n.WallNs}
			return
		}
	}
	t.losses = slices.Insert(t.losses, i, n)
}

// mark is what lose changes, to take it back if it can't be made durable.
type mark struct {
	done    seqset.Set
	dropped uint64
	losses  []*loss
}

func (t *track) mark() mark { return mark{t.done.Clone(), t.dropped, slices.Clone(t.losses)} }

func (t *track) restore(m mark) { t.done, t.dropped, t.losses = m.done, m.dropped, m.losses }

// confirm takes an acknowledgement that was checked against next.
func (t *track) confirm(a *longshorepb.StreamAck) (changed bool) {
	covers := func(first, last uint64) {
		for _, r := range t.done.Add(first, last) {
			t.acked += r.Len()
			changed = true
		}
		kept := t.losses[:0]
		for _, l := range t.losses {
			if l.First < first || l.Last > last {
				kept = append(kept, l)
			}
		}
		changed = changed || len(kept) < len(t.losses)
		clear(t.losses[len(kept):])
		t.losses = kept
	}
	if w := a.GetWatermark(); w > 1 {
		covers(1, w-1)
	}
	for _, r := range a.GetAbove() {
		covers(r.GetFirst(), r.GetLast())
	}
	return changed
}

// segmentAt returns the segment that holds seq, or else the first after it; nil if there is none.
func (t *track) segmentAt(seq uint64) *segment {
	for _, s := range t.segs {
		if seq < s.next {
			return s
		}
	}
	return nil
}

// epochAt finds an epoch by its id; nil if there is none.
func (l *Log) epochAt(id []byte) *epoch {
	for _, e := range l.epochs {
		if string(e.id[:]) == string(id) {
			return e
		}
	}
	return nil
}

// track returns the stream's track of the current epoch.
func (l *Log) track(stream string) *track {
	t := l.current().tracks[stream]
	if t == nil {
		t = &track{epoch: l.current(), stream: stream, next: 1}
		l.current().tracks[stream] = t
	}
	return t
}

// tracksOf returns a stream's tracks, oldest epoch first.
func (l *Log) tracksOf(stream string) (out []*track) {
	for _, e := range l.epochs {
		if t := e.tracks[stream]; t != nil {
			out = append(out, t)
		}
	}
	return out
}

// age of log time at, in a log whose clock reads now.
func age(now, at int64) time.Duration { return time.Duration(max(now-at, 0)) }
