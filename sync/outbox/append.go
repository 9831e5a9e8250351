package outbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/longshore-edge/longshore/sync/frame"
)

const (
	// maxGroup bounds the bytes that share one fsync.
	maxGroup = 1 << 20
	// frameTarget is the bytes of records, before compression, at which a frame is closed.
	frameTarget = 32 << 10
	// frameBytes is the serialized size above which a frame of several records is halved, so that it fits one message.
	frameBytes = frame.MaxMessage - 512
)

// writer appends to one stream of the current epoch.
type writer struct {
	stream string
	quota  Quota
	// segmentBytes is the size at which a segment is closed.
	segmentBytes int64

	// q guards the queue. Whoever finds no leader commits what is queued, for all, and hands on.
	q       sync.Mutex
	queue   []*request
	leading bool

	// io is held for writing; it guards what follows.
	io   sync.Mutex
	file file
	seg  *segment
	// pending says that the directory entry of file is not durable yet.
	pending bool
}

// leave ends the segment that is written to, if any. What was acknowledged is synced already. Callers hold io.
func (w *writer) leave() {
	if w.file != nil {
		_ = w.file.Close() // nothing in it waits to be written
	}
	w.file, w.seg, w.pending = nil, nil, false
}

// request is one caller's records for one stream.
type request struct {
	recs []Record
	size int64
	// verdicts match recs.
	verdicts []error
	// turn gets true when this caller is to lead, false when its records are committed.
	turn chan bool
}

// Append writes records and returns when they are on disk (fsync), sharing the sync with other callers (group commit). The
// verdicts match recs: nil means accepted, will be delivered or ledgered. err is set when nothing was accepted because
// of the disk (or ctx ended before the records' turn came), such as on a full disk. Records of one stream
// keep their order.
func (l *Log) Append(ctx context.Context, recs []Record) (verdicts []error, err error) {
	verdicts = make([]error, len(recs))
	byStream := map[string][]int{}
	var order []string
	for i, r := range recs {
		if verdicts[i] = l.admissible(r); verdicts[i] != nil {
			continue
		}
		if byStream[r.Stream] == nil {
			order = append(order, r.Stream)
		}
		byStream[r.Stream] = append(byStream[r.Stream], i)
	}
	if len(order) == 1 {
		err = l.appendStream(ctx, order[0], recs, byStream[order[0]], verdicts)
	} else {
		errs := make([]error, len(order))
		var wg sync.WaitGroup
		for i, name := range order {
			wg.Go(func() { errs[i] = l.appendStream(ctx, name, recs, byStream[name], verdicts) })
		}
		wg.Wait()
		err = errors.Join(errs...)
	}
	if err != nil && !slices.Contains(verdicts, nil) {
		return verdicts, fmt.Errorf("append to outbox: %w", err)
	}
	return verdicts, nil
}

func (l *Log) admissible(r Record) error {
	if err := frame.ValidStream(r.Stream); err != nil {
		return err
	}
	if len(r.Payload) > l.cfg.MaxRecord || len(r.Topic) > frame.MaxTopic {
		return fmt.Errorf("%w: %d bytes on a topic of %d, at most %d on one of %d", ErrTooLarge, len(r.Payload), len(r.Topic), l.cfg.MaxRecord, frame.MaxTopic)
	}
	if limit := l.cfg.quota(r.Stream).MaxBytes / 2; cost(r) > limit {
		return fmt.Errorf("%w: %d bytes are above half the quota of stream %q", ErrTooLarge, len(r.Payload), r.Stream)
	}
	return nil
}

// cost bounds from above what a record adds to a file.
func cost(r Record) int64 { return int64(len(r.Payload) + len(r.Topic) + 64) }

func (l *Log) writer(stream string) (*writer, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.writers[stream]
	if l.closed {
		return nil, ErrClosed
	}
	if w == nil {
		if len(l.writers) >= maxStreams {
			return nil, fmt.Errorf("stream %q would be one more than the %d an outbox takes", stream, maxStreams)
		}
		q := l.cfg.quota(stream)
		w = &writer{stream: stream, quota: q, segmentBytes: min(l.cfg.SegmentBytes, q.MaxBytes/8)}
		l.writers[stream] = w
	}
	return w, nil
}

// appendStream appends recs[i] for i in which, in pieces that fit a group. It returns the first error of the disk.
func (l *Log) appendStream(ctx context.Context, stream string, recs []Record, which []int, verdicts []error) error {
	w, err := l.writer(stream)
	for len(which) > 0 {
		req := &request{turn: make(chan bool, 1)}
		for _, i := range which {
			if len(req.recs) > 0 && req.size+cost(recs[i]) > w.groupBytes() {
				break
			}
			req.recs = append(req.recs, recs[i])
			req.size += cost(recs[i])
		}
		req.verdicts = make([]error, len(req.recs))
		if err == nil {
			err = l.submit(ctx, w, req)
		}
		for j := range req.recs {
			if verdicts[which[j]] = req.verdicts[j]; err != nil {
				verdicts[which[j]] = err
			}
		}
		which = which[len(req.recs):]
	}
	return err
}

func (w *writer) groupBytes() int64 {
	if w == nil {
		return maxGroup
	}
	return min(maxGroup, w.segmentBytes)
}

// submit has req committed, by another caller or by this one. ctx ends only the wait for its turn.
func (l *Log) submit(ctx context.Context, w *writer, req *request) error {
	w.q.Lock()
	w.queue = append(w.queue, req)
	lead := !w.leading
	w.leading = true
	w.q.Unlock()
	if !lead {
		select {
		case lead = <-req.turn:
		case <-ctx.Done():
			w.q.Lock()
			if i := slices.Index(w.queue, req); i >= 0 && len(req.turn) == 0 {
				w.queue = slices.Delete(w.queue, i, i+1)
				w.q.Unlock()
				return ctx.Err()
			}
			w.q.Unlock()
			lead = <-req.turn
		}
	}
	if !lead {
		return req.err()
	}
	// The leader's own request is the first of the queue.
	group := w.take()
	err := l.commit(w, group)
	l.settle(err)
	for _, r := range group {
		if err != nil {
			for i := range r.verdicts {
				r.verdicts[i] = err
			}
		}
		if r != req {
			r.turn <- false
		}
	}
	w.q.Lock()
	defer w.q.Unlock()
	if len(w.queue) > 0 {
		w.queue[0].turn <- true
	} else {
		w.leading = false
	}
	return err
}

// err is the error of the disk that the leader left in the verdicts, if any.
func (r *request) err() error {
	var bad *diskError
	if len(r.verdicts) > 0 && errors.As(r.verdicts[0], &bad) {
		return bad
	}
	return nil
}

// diskError is an error of the disk, as against a verdict on a record.
type diskError struct{ err error }

func (e *diskError) Error() string { return e.err.Error() }
func (e *diskError) Unwrap() error { return e.err }

// take removes the requests of the next group from the queue: at least one.
func (w *writer) take() []*request {
	w.q.Lock()
	defer w.q.Unlock()
	size, n := int64(0), 0
	for n < len(w.queue) && (n == 0 || size+w.queue[n].size <= w.groupBytes()) {
		size += w.queue[n].size
		n++
	}
	group := slices.Clone(w.queue[:n])
	w.queue = slices.Delete(w.queue, 0, n)
	return group
}

// commit writes and syncs a group. Its error means that nothing of it was accepted.
func (l *Log) commit(w *writer, group []*request) error {
	w.io.Lock()
	defer w.io.Unlock()
	if w.seg != nil && (w.seg.bytes >= w.segmentBytes || w.quota.MaxAge > 0 && age(l.now(), w.seg.oldest) > w.quota.MaxAge/8) {
		w.leave()
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return &diskError{ErrClosed}
	}
	t := l.track(w.stream)
	accepted, err := l.admit(w, group)
	first := t.next
	l.mu.Unlock()
	if err != nil {
		return &diskError{err}
	}
	if len(accepted) == 0 {
		return nil
	}
	at := l.now()
	data, err := l.encode(t, first, at, accepted)
	if err != nil {
		return &diskError{err}
	}
	if err := l.makeRoom(w, int64(len(data))); err != nil {
		return &diskError{err}
	}
	err = l.keepReserve(w, int64(len(data)))
	if err == nil {
		err = l.begin()
	}
	if err == nil {
		if err = l.write(w, t, first, data); err != nil {
			l.abandon(w, t)
		}
	}
	if err != nil {
		return &diskError{fmt.Errorf("%w (free space below %s, or lower the streams' quotas, if the disk is full)", err, l.dir)}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s := w.seg
	if s.bytes == 0 {
		s.oldest = at
		t.segs = append(t.segs, s)
	}
	t.next = first + uint64(len(accepted))
	s.next, s.newest, s.bytes = t.next, at, s.bytes+int64(len(data))
	l.wake()
	return nil
}

// admit gives the verdicts of policy Refuse and returns the records to write. Callers hold Log.mu.
func (l *Log) admit(w *writer, group []*request) (accepted []Record, err error) {
	var used, added int64
	if w.quota.Policy == Refuse {
		for _, t := range l.tracksOf(w.stream) {
			used += t.diskBytes()
		}
	}
	for _, req := range group {
		for i, r := range req.recs {
			if w.quota.Policy == Refuse {
				if used+cost(r)+blockSize > w.quota.MaxBytes {
					req.verdicts[i] = ErrFull
					l.refused[w.stream]++
					continue
				}
				low, err := l.low(added+cost(r)+blockSize, l.cfg.Reserve)
				if err != nil {
					return nil, err
				}
				if low {
					req.verdicts[i] = ErrDiskLow
					l.refused[w.stream]++
					continue
				}
				used, added = used+cost(r), added+cost(r)
			}
			accepted = append(accepted, r)
		}
	}
	return accepted, nil
}

// encode packs records into batches.
func (l *Log) encode(t *track, first uint64, at int64, recs []Record) ([]byte, error) {
	mono, wall := l.clock.Mono(), l.clock.Wall()
	var out, raw []byte
	var ends []int
	for i, r := range recs {
		raw = frame.AppendRecord(raw, frame.Record{MonoNs: mono, WallNs: wall, Topic: []byte(r.Topic), Payload: r.Payload})
		ends = append(ends, len(raw))
		if len(raw) < frameTarget && len(ends) < frame.MaxCount && i < len(recs)-1 {
			continue
		}
		var err error
		if out, err = l.encodeRun(out, t, first, at, raw, ends); err != nil {
			return nil, err
		}
		first += uint64(len(ends))
		raw, ends = raw[:0], ends[:0]
	}
	return out, nil
}

// encodeRun appends records, which end at ends in raw, as one batch, or as two halves if the frame would not fit a message.
func (l *Log) encodeRun(out []byte, t *track, first uint64, at int64, raw []byte, ends []int) ([]byte, error) {
	f := &frame.Frame{Stream: t.stream, First: first, Count: uint32(len(ends)), BootID: l.clock.Boot(), Records: raw}
	body, err := l.encoder.Encode(f)
	if err != nil {
		return nil, err
	}
	if len(body) <= frameBytes || len(ends) == 1 {
		return appendBatch(out, seed(t.epoch.id, t.stream), first, f.Count, at, body), nil
	}
	half := len(ends) / 2
	cut := ends[half-1]
	if out, err = l.encodeRun(out, t, first, at, raw[:cut], ends[:half]); err != nil {
		return nil, err
	}
	rest := slices.Clone(ends[half:])
	for i := range rest {
		rest[i] -= cut
	}
	return l.encodeRun(out, t, first+uint64(half), at, raw[cut:], rest)
}

// makeRoom drops the oldest segments of the stream until n more bytes fit its quota. Callers hold io.
func (l *Log) makeRoom(w *writer, n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		used := (n + blockSize - 1) / blockSize * blockSize
		if w.seg != nil {
			grown := segment{bytes: w.seg.bytes + n}
			used = grown.onDisk() - w.seg.onDisk()
		}
		var oldest *track
		for _, t := range l.tracksOf(w.stream) {
			used += t.diskBytes()
			if oldest == nil && len(t.segs) > 0 {
				oldest = t
			}
		}
		if used <= w.quota.MaxBytes || w.quota.Policy == Refuse || oldest == nil {
			return nil
		}
		before := len(oldest.segs)
		if err := l.drop(w, oldest, reasonBytes); err != nil {
			return fmt.Errorf("make room in the quota of stream %q: %w", w.stream, err)
		}
		if len(oldest.segs) == before {
			return fmt.Errorf("quota of stream %q can't be kept", w.stream)
		}
	}
}

// write appends data to the segment, or to a new one, and syncs. Callers hold io.
func (l *Log) write(w *writer, t *track, first uint64, data []byte) error {
	dir := l.epochDir(t.epoch)
	if w.file == nil {
		path := filepath.Join(dir, segmentName(w.stream, first))
		f, err := l.disk.Create(path)
		if errors.Is(err, os.ErrExist) { // what an abandoned append left behind
			if err = l.disk.Remove(path); err == nil {
				f, err = l.disk.Create(path)
			}
		}
		if err != nil {
			return err
		}
		w.file, w.seg, w.pending = f, &segment{path: path, first: first, next: first}, true
	}
	if _, err := w.file.Write(data); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	if w.pending {
		if err := l.disk.SyncDir(dir); err != nil {
			return err
		}
		w.pending = false
	}
	return nil
}

// abandon ends a segment after an error; its good batches stay. Callers hold io.
func (l *Log) abandon(w *writer, t *track) {
	if w.file == nil {
		return
	}
	var err error
	if w.seg.bytes == 0 {
		err = l.disk.Remove(w.seg.path)
	} else {
		err = w.file.Truncate(w.seg.bytes) // only to give space back
	}
	if err != nil {
		l.cfg.Logger.Warn("outbox can't tidy up an abandoned segment", "path", w.seg.path, "stream", t.stream, "err", err)
	}
	w.leave()
}
