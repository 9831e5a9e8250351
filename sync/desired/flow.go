package desired

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// minWindow and maxWindow bound the bytes asked for and not yet here.
	minWindow = 32 << 10
	maxWindow = 1 << 20
	// maxRequests bounds the subscriptions not yet answered, of small objects above all. A hub keeps maxFetches.
	maxRequests = 128
	// maxLarge bounds the objects of more than one request that are fetched at a time: they are put together in memory.
	maxLarge = 4
	// savePartBytes is how much more of an object has to be here before it is saved as a part again.
	savePartBytes = 32 << 10
	// firstTimeout is for the first answer, when nothing is known of the link; later timeouts follow measured times, as
	// RFC 6298 has it, and lie between minTimeout and maxTimeout.
	firstTimeout = 30 * time.Second
	minTimeout   = 15 * time.Second
	maxTimeout   = 2 * time.Minute
)

var errWrongDigest = errors.New("content does not match its digest")

// flow asks for objects and bounds what is in flight on the way down.
type flow struct {
	fetches []*fetch
	window  uint64
	// inflight counts bytes, waiting requests.
	inflight uint64
	waiting  int
	// Measured from asking to the complete answer; zero before the first.
	best, smooth, deviation time.Duration
}

// fetch is one object or list on its way.
type fetch struct {
	digest Digest
	kind   longshorepb.Kind
	entry  *longshorepb.Entry // nil for a list
	// limit is what the object may have at most, in encoded as in canonical bytes.
	limit uint64

	// part is the prefix that is here; ahead what came out of order, by offset.
	part  Part
	known bool // part.Total, Kind and Enc are
	ahead map[uint64][]byte
	saved int // bytes of the prefix that are stored
	// next is the first byte never asked for in this session; again the ranges whose request timed out.
	next     uint64
	again    []span
	requests []*request
	tries    int
	// notBefore delays the next request after a failure.
	notBefore time.Time
}

// span is a range of bytes of the encoded object.
type span struct{ from, len uint64 }

type request struct {
	span
	got          uint64
	at, deadline time.Time
}

func (w *flow) reset() {
	*w = flow{window: minWindow}
}

func (w *flow) get(d Digest) *fetch {
	for _, f := range w.fetches {
		if f.digest == d {
			return f
		}
	}
	return nil
}

// want begins to fetch an object, from where a stored part ends.
func (w *flow) want(d Digest, kind longshorepb.Kind, e *longshorepb.Entry, limit uint64, parts map[Digest]Part) {
	if w.get(d) != nil {
		return
	}
	f := &fetch{digest: d, kind: kind, entry: e, limit: limit, ahead: make(map[uint64][]byte)}
	if p, ok := parts[d]; ok && p.Kind == kind && p.Total <= limit && uint64(len(p.Data)) < p.Total {
		f.part, f.known, f.saved = p, true, len(p.Data)-p.unsaved
	}
	w.fetches = append(w.fetches, f)
}

// mayStart reports whether an object of size bytes may be fetched in addition.
func (w *flow) mayStart(size uint64) bool {
	if len(w.fetches) >= maxRequests || w.inflight >= w.window {
		return false
	}
	if size <= requestBytes {
		return true
	}
	large := 0
	for _, f := range w.fetches {
		if f.limit > requestBytes {
			large++
		}
	}
	return large < maxLarge
}

func (w *flow) remove(d Digest) {
	for i, f := range w.fetches {
		if f.digest == d {
			w.forget(f)
			w.fetches = slices.Delete(w.fetches, i, i+1)
			return
		}
	}
}

// keepOnly ends the fetches of what is not wanted, after keep has seen them.
func (w *flow) keepOnly(wanted map[Digest]*longshorepb.Entry, keep func(*fetch)) {
	w.fetches = slices.DeleteFunc(w.fetches, func(f *fetch) bool {
		if wanted[f.digest] != nil {
			return false
		}
		w.forget(f)
		keep(f)
		return true
	})
}

// onlyList ends the fetches of lists other than d, after keep has seen them.
func (w *flow) onlyList(d Digest, keep func(*fetch)) {
	w.fetches = slices.DeleteFunc(w.fetches, func(f *fetch) bool {
		if f.entry != nil || f.digest == d {
			return false
		}
		w.forget(f)
		keep(f)
		return true
	})
}

// forget drops the requests of f that were not answered.
func (w *flow) forget(f *fetch) {
	for _, q := range f.requests {
		w.inflight -= q.len
	}
	w.waiting -= len(f.requests)
	f.requests = nil
}

// expire puts requests that were not answered in time up for asking again.
func (w *flow) expire(now time.Time) {
	for _, f := range w.fetches {
		f.requests = slices.DeleteFunc(f.requests, func(q *request) bool {
			if now.Before(q.deadline) {
				return false
			}
			w.inflight -= q.len
			w.waiting--
			w.window = minWindow
			f.again = append(f.again, q.span)
			f.tries++
			return true
		})
	}
}

// ask returns what to ask for next, for those fetches that are wanted.
func (w *flow) ask(now time.Time, edge string, wanted func(*fetch) bool) []string {
	var topics []string
	for _, f := range w.fetches {
		if now.Before(f.notBefore) {
			continue
		}
		f.notBefore = time.Time{} // also if there is no room now: an answer makes some
		if !wanted(f) {
			continue
		}
		for w.inflight < w.window && w.waiting < maxRequests {
			s, ok := f.nextSpan()
			if !ok {
				break
			}
			f.requests = append(f.requests, &request{span: s, at: now, deadline: now.Add(w.timeout() << min(f.tries, 3))})
			w.inflight += s.len
			w.waiting++
			topics = append(topics, f.topic(edge, s.from))
		}
	}
	return topics
}

func (f *fetch) topic(edge string, offset uint64) string {
	if f.kind == longshorepb.Kind_KIND_MODEL {
		return topic.Topic{Kind: topic.Models, Digest: f.digest[:], Offset: offset}.String()
	}
	return topic.Topic{Kind: topic.Objects, Edge: edge, Digest: f.digest[:], Offset: offset}.String()
}

// nextSpan returns the next range to ask for. Before the total is known, only the first one may be.
func (f *fetch) nextSpan() (span, bool) {
	have := uint64(len(f.part.Data))
	for len(f.again) > 0 {
		s := f.again[0]
		f.again = f.again[1:]
		end := s.from + s.len
		if f.known {
			end = min(end, f.part.Total)
		}
		s.from = max(s.from, have)
		if s.from < end || !f.known {
			s.len = end - s.from
			return s, true
		}
	}
	if !f.known {
		if len(f.requests) > 0 || f.next > 0 {
			return span{}, false
		}
		s := span{0, min(requestBytes, f.limit)}
		f.next = max(s.len, 1)
		return s, true
	}
	f.next = max(f.next, have)
	if f.next >= f.part.Total {
		return span{}, false
	}
	s := span{f.next, min(requestBytes, f.part.Total-f.next)}
	f.next += s.len
	return s, true
}

// restart forgets what is here of f and tries again after a pause.
func (w *flow) restart(f *fetch, now time.Time) {
	w.forget(f)
	*f = fetch{
		digest: f.digest, kind: f.kind, entry: f.entry, limit: f.limit, ahead: make(map[uint64][]byte), tries: f.tries,
	}
	w.pause(f, now)
}

// pause lets f wait, longer with every failure.
func (w *flow) pause(f *fetch, now time.Time) {
	f.notBefore = now.Add(min(time.Second<<min(f.tries, 6), time.Minute))
	f.tries++
}

// wake ends all pauses.
func (w *flow) wake() {
	for _, f := range w.fetches {
		f.notBefore = time.Time{}
	}
}

func (w *flow) deadline() time.Time {
	var d time.Time
	earlier := func(t time.Time) {
		if !t.IsZero() && (d.IsZero() || t.Before(d)) {
			d = t
		}
	}
	for _, f := range w.fetches {
		earlier(f.notBefore)
		for _, q := range f.requests {
			earlier(q.deadline)
		}
	}
	return d
}

func (w *flow) timeout() time.Duration {
	if w.smooth == 0 {
		return firstTimeout
	}
	return min(max(w.smooth+4*w.deviation, minTimeout), maxTimeout)
}

// answered measures a complete answer. The window grows by what arrived while answers take hardly longer than the best
// one did, and shrinks when they queue: on a slow link a new head must not wait behind much.
func (w *flow) answered(q *request, now time.Time) {
	w.inflight -= q.len
	w.waiting--
	took := max(now.Sub(q.at), time.Millisecond)
	if w.smooth == 0 {
		w.best, w.smooth, w.deviation = took, took, took/2
	} else {
		w.best = min(w.best, took)
		w.deviation = (3*w.deviation + (took - w.smooth).Abs()) / 4
		w.smooth = (7*w.smooth + took) / 8
	}
	switch {
	case took <= w.best+w.best/4+250*time.Millisecond:
		w.window = min(w.window+q.len, maxWindow)
	case took > 2*w.best+2*time.Second:
		w.window = max(w.window-min(q.len/2, w.window), minWindow)
	}
}

// take adds a chunk to f; done says that f is complete.
func (w *flow) take(f *fetch, c *longshorepb.Chunk, now time.Time) (done bool, err error) {
	from, total, size := c.GetOffset(), c.GetTotal(), uint64(len(c.GetData()))
	switch {
	case c.GetKind() != f.kind:
		return false, fmt.Errorf("a %s came where a %s was asked for", kindName(c.GetKind()), kindName(f.kind))
	case total > f.limit:
		return false, fmt.Errorf("%w: %d encoded bytes, at most %d are expected", ErrTooLarge, total, f.limit)
	case from > total || size > total-from || size == 0 && from < total:
		return false, fmt.Errorf("chunk of %d bytes at %d of %d", size, from, total)
	}
	if f.known && (f.part.Total != total || f.part.Enc != c.GetEncoding()) {
		w.restart(f, now) // the hub encodes it in another way than the part that is here
		f.notBefore = time.Time{}
		if from > 0 {
			return false, nil
		}
		f.again = nil
	}
	if !f.known {
		if from > 0 {
			return false, nil // late, of before a restart
		}
		f.known = true
		f.part = Part{Total: total, Kind: f.kind, Enc: c.GetEncoding()}
		f.next = max(f.next, size)
		for _, q := range f.requests {
			n := min(q.len, total-min(q.from, total))
			w.inflight -= q.len - n
			q.len = n
		}
	}
	w.place(f, from, c.GetData(), now)
	return uint64(len(f.part.Data)) == total, nil
}

// place puts bytes where they belong, if they were asked for.
func (w *flow) place(f *fetch, from uint64, data []byte, now time.Time) {
	have := uint64(len(f.part.Data))
	_, twice := f.ahead[from]
	if from+uint64(len(data)) > have && !twice {
		asked := from == have
		for _, q := range f.requests {
			if from >= q.from && from < q.from+q.len {
				q.got += uint64(len(data))
				asked = true
			}
		}
		if !asked {
			return
		}
		f.ahead[from] = data
	}
	f.join()
	have = uint64(len(f.part.Data))
	f.requests = slices.DeleteFunc(f.requests, func(q *request) bool {
		if q.got < q.len && q.from+q.len > have {
			return false
		}
		w.answered(q, now)
		f.tries = 0
		return true
	})
}

// join appends to the prefix what follows it without a gap.
func (f *fetch) join() {
	for {
		have := uint64(len(f.part.Data))
		joined := false
		for from, data := range f.ahead {
			if from > have {
				continue
			}
			delete(f.ahead, from)
			if end := from + uint64(len(data)); end > have {
				f.part.Data = append(f.part.Data, data[have-from:]...)
				joined = true
				break
			}
		}
		if !joined {
			return
		}
	}
}

// request asks for the next parts of the target.
func (r *Replica) request(now time.Time) {
	t, w := r.target, &r.flow
	w.expire(now)
	for len(t.todo) > 0 {
		e := t.todo[0]
		d := Digest(e.GetDigest())
		if t.missing[d] != nil {
			if !w.mayStart(e.GetSize()) {
				break
			}
			w.want(d, e.GetKind(), e, e.GetSize(), r.parts)
		}
		t.todo = t.todo[1:]
	}
	topics := w.ask(now, r.cfg.Edge, func(f *fetch) bool {
		if t.list == nil {
			return f.digest == t.digest
		}
		return t.missing[f.digest] != nil
	})
	if len(topics) > 0 {
		r.out = append(r.out, Subscribe{Topics: topics})
	}
}

// receiveChunk takes an answer to a request.
func (r *Replica) receiveChunk(now time.Time, c *longshorepb.Chunk) error {
	d, err := toDigest(c.GetDigest())
	if err != nil {
		return err
	}
	f := r.flow.get(d)
	if c.GetGone() {
		if f != nil {
			r.flow.restart(f, now)
		}
		if c.GetNewest() == nil {
			return nil
		}
		return r.receiveHead(c.GetNewest())
	}
	if f == nil {
		return nil // late: nobody waits for it any more
	}
	done, err := r.flow.take(f, c, now)
	if err != nil {
		return err
	}
	if done {
		return r.complete(f, now)
	}
	if n := len(f.part.Data); n-f.saved >= savePartBytes {
		r.out = append(r.out, SavePart{
			Digest: d, Offset: uint64(f.saved), Data: f.part.Data[f.saved:n:n], Total: f.part.Total, Kind: f.kind, Enc: f.part.Enc,
		})
		f.saved = n
	}
	return nil
}

// complete verifies an object that is here and stores it.
func (r *Replica) complete(f *fetch, now time.Time) error {
	c := &longshorepb.Chunk{Kind: f.kind, Encoding: f.part.Enc, Data: f.part.Data}
	if f.kind == longshorepb.Kind_KIND_LIST {
		body, err := decode(c.GetEncoding(), c.GetData(), f.limit)
		if err == nil {
			err = r.takeList(f.digest, body)
		}
		return r.settle(f, now, err)
	}
	o, err := r.open(c, f.entry, f.limit)
	if err == nil {
		r.save(o)
	}
	return r.settle(f, now, err)
}

// settle ends a fetch, or begins it again if what arrived was damaged on the way.
func (r *Replica) settle(f *fetch, now time.Time, err error) error {
	var bad refusal
	switch {
	case err == nil:
		r.flow.remove(f.digest)
	case errors.As(err, &bad):
		r.flow.remove(f.digest)
		r.refuse(f.digest, err)
	default:
		r.flow.restart(f, now)
	}
	return err
}

// refusal is the error for content that matches its digest and is still not what an honest hub makes.
type refusal struct{ error }

func (e refusal) Unwrap() error { return e.error }
