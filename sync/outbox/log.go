package outbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
)

// ErrFull is the verdict on a record of a stream with Policy Refuse whose quota is full.
var ErrFull = errors.New("stream quota is full")

// ErrClosed is the answer of a closed Log.
var ErrClosed = errors.New("outbox is closed")

// Policy says what happens when a stream's quota is full.
type Policy string

// The policies.
const (
	DropOldest Policy = "drop-oldest" // and ledger it
	Refuse     Policy = "refuse"
)

// Quota of one stream. Zero values mean the default in parentheses.
type Quota struct {
	// MaxBytes on disk (256 MiB), at least 64 KiB. Space is given back by segments of at most an eighth of it.
	MaxBytes int64
	// MaxAge of records, by the time the box was on; 0 = unlimited. Records go in groups of up to an eighth of it. It holds
	// for both policies and needs Run.
	MaxAge time.Duration
	// Policy (drop-oldest)
	Policy Policy
}

// Config of a Log.
type Config struct {
	Logger *slog.Logger
	// Quotas by stream; Default for streams not named.
	Quotas  map[string]Quota
	Default Quota
	// MaxRecord bounds one record's payload in bytes (128 KiB, which is also the most).
	MaxRecord int
	// SegmentBytes (4 MiB).
	SegmentBytes int64
	// Reserve is the bytes that records leave free on the file system, for what else needs room there (0); a quarter of a small
	// disk, but never less than a quarter of this. Less free space than that is like a full quota: DropOldest drops the oldest
	// segments of the stream, Refuse refuses with ErrDiskLow. What is too little to be worth dropping may use a quarter of it.
	Reserve int64
}

const (
	minQuota = 64 << 10
	// maxStreams bounds the streams one process appends to, and so its open files.
	maxStreams = 256
	// maxHeads bounds the bytes of Heads: a Hello has to fit a message.
	maxHeads = 10 << 10
	// idleSegment is the size from which a segment still written to is given back once everything in it is acknowledged.
	idleSegment = 64 << 10
)

// Record is what a producer hands in.
type Record struct {
	Stream  string
	Topic   string
	Payload []byte
}

// Log is a set of segmented files below one directory. Safe for concurrent use. Each Open starts a new epoch; earlier
// epochs are kept until acknowledged or dropped.
type Log struct {
	cfg      Config
	dir      string
	disk     disk
	clock    clock
	lock     io.Closer
	encoder  *frame.Encoder
	appended chan struct{}

	// mu guards what follows; it is taken after a writer's io.
	mu      sync.Mutex
	closed  bool
	base    int64 // log time minus CLOCK_BOOTTIME
	epochs  []*epoch
	totals  map[string]total
	writers map[string]*writer
	refused map[string]uint64
	// ledgerings counts additions to the ledger, so that readers know when to look.
	ledgerings uint64
	// begun says that the current epoch is on disk, so that it may be appended to.
	begun bool
	// failing is why the newest append failed because of the disk.
	failing error
	// dirty says that memory knows more than the state file, nothing of which must survive.
	dirty bool
}

// Open recovers dir (a torn tail is the end; a damaged batch costs itself and is ledgered when its turn to be sent comes)
// and starts a new epoch. It starts no goroutine.
func Open(dir string, cfg Config) (*Log, error) {
	return open(dir, cfg, osDisk{}, newSystemClock())
}

func open(dir string, cfg Config, d disk, c clock) (_ *Log, err error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("open outbox: %w", err)
	}
	l := &Log{
		cfg: cfg, dir: dir, disk: d, clock: c, appended: make(chan struct{}, 1), totals: map[string]total{},
		writers: map[string]*writer{}, refused: map[string]uint64{},
	}
	if l.encoder, err = frame.NewEncoder(); err != nil {
		return nil, fmt.Errorf("open outbox: %w", err)
	}
	if err := d.MkdirAll(filepath.Join(dir, "epochs")); err != nil {
		return nil, fmt.Errorf("open outbox: make directory %s: %w", dir, err)
	}
	if l.lock, err = d.Lock(filepath.Join(dir, "lock")); errors.Is(err, errLocked) {
		return nil, fmt.Errorf("open outbox: %s is in use by another agent: stop it, or give this one a state directory of its own", dir)
	} else if err != nil {
		return nil, fmt.Errorf("open outbox: lock %s: %w", dir, err)
	}
	if err := l.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("open outbox: %w", err), l.lock.Close())
	}
	return l, nil
}

// start recovers what is on disk and begins the epoch.
func (l *Log) start() error {
	if err := l.recover(); err != nil {
		return err
	}
	e := &epoch{tracks: map[string]*track{}}
	if _, err := rand.Read(e.id[:]); err != nil {
		return fmt.Errorf("make epoch: %w", err)
	}
	l.epochs = append(l.epochs, e)
	if err := l.scale(); err != nil {
		return err
	}
	if err := l.begin(); full(err) {
		// What is held can be sent, which makes room. Appends try again.
		l.cfg.Logger.Error("the disk is full: the outbox takes no records until there is space", "dir", l.dir, "err", err)
		l.failing = err
	} else if err != nil {
		return err
	}
	if err := l.release(nil); err != nil { // costs space, nothing else
		l.cfg.Logger.Error("outbox can't give back disk space", "err", err)
	}
	return nil
}

// begin makes the current epoch durable, unless it is.
func (l *Log) begin() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.begun {
		return nil
	}
	if err := l.save(); err != nil {
		return err
	}
	// The directory must outlive a power cut before anything in it is acknowledged.
	if err := l.disk.MkdirAll(l.epochDir(l.current())); err != nil {
		return fmt.Errorf("make epoch: %w", err)
	}
	for _, dir := range []string{filepath.Join(l.dir, "epochs"), l.dir, filepath.Dir(l.dir)} {
		if err := l.disk.SyncDir(dir); err != nil {
			return fmt.Errorf("sync %s: %w", dir, err)
		}
	}
	l.begun = true
	return nil
}

func (c *Config) complete() error {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.MaxRecord == 0 {
		c.MaxRecord = frame.MaxPayload
	}
	if c.MaxRecord < 0 || c.MaxRecord > frame.MaxPayload {
		return fmt.Errorf("the largest record may have 1 to %d bytes, not %d", frame.MaxPayload, c.MaxRecord)
	}
	if c.SegmentBytes == 0 {
		c.SegmentBytes = 4 << 20
	}
	quotas := map[string]Quota{}
	for name, q := range c.Quotas {
		if err := frame.ValidStream(name); err != nil {
			return err
		}
		if err := q.complete(); err != nil {
			return fmt.Errorf("stream %q: %w", name, err)
		}
		quotas[name] = q
	}
	c.Quotas = quotas
	return c.Default.complete()
}

func (q *Quota) complete() error {
	if q.MaxBytes == 0 {
		q.MaxBytes = 256 << 20
	}
	if q.Policy == "" {
		q.Policy = DropOldest
	}
	if q.Policy != DropOldest && q.Policy != Refuse {
		return fmt.Errorf("policy %q is neither %q nor %q", q.Policy, DropOldest, Refuse)
	}
	if q.MaxBytes < minQuota || q.MaxAge < 0 {
		return fmt.Errorf("a quota has at least %d bytes and no negative age", minQuota)
	}
	return nil
}

func (c *Config) quota(stream string) Quota {
	if q, ok := c.Quotas[stream]; ok {
		return q
	}
	return c.Default
}

func (l *Log) epochDir(e *epoch) string {
	return filepath.Join(l.dir, "epochs", fmt.Sprintf("%x", e.id))
}

// now is the log time in nanoseconds.
func (l *Log) now() int64 { return l.base + l.clock.Mono() }

func (l *Log) current() *epoch { return l.epochs[len(l.epochs)-1] }

// Run does the background work (quotas by age, the state file) until ctx ends. Appends work without it.
func (l *Log) Run(ctx context.Context) error {
	every := 10 * time.Second
	for _, q := range append(slices.Collect(maps.Values(l.cfg.Quotas)), l.cfg.Default) {
		if q.MaxAge > 0 {
			every = min(every, max(q.MaxAge/8, 10*time.Millisecond))
		}
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.tend(); err != nil {
			l.cfg.Logger.Error("outbox upkeep", "err", err)
		}
	}
}

// tend drops what is too old and writes the state file if it lags.
func (l *Log) tend() error {
	l.mu.Lock()
	names := map[string]bool{}
	for _, e := range l.epochs {
		for name := range e.tracks {
			names[name] = true
		}
	}
	l.mu.Unlock()
	var errs []error
	for name := range names {
		if q := l.cfg.quota(name); q.MaxAge > 0 {
			errs = append(errs, l.expire(name, q.MaxAge))
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	if l.dirty {
		errs = append(errs, l.save())
	}
	l.recovered()
	return errors.Join(append(errs, l.release(nil))...)
}

// expire drops the segments of a stream whose newest record is older than limit.
func (l *Log) expire(stream string, limit time.Duration) error {
	w, err := l.writer(stream)
	if err != nil {
		return err
	}
	w.io.Lock()
	defer w.io.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	for _, t := range l.tracksOf(stream) {
		for len(t.segs) > 0 && age(l.now(), t.segs[0].oldest) > limit {
			if t.segs[0].newest == 0 {
				if err := l.date(t, t.segs[0]); err != nil {
					return err
				}
			}
			if age(l.now(), t.segs[0].newest) <= limit {
				break
			}
			if err := l.drop(w, t, reasonAge); err != nil {
				return err
			}
		}
	}
	return nil
}

// drop moves the oldest segment of a track to the ledger, durably, and then gives its space back. Callers hold the
// writer's io and Log.mu.
func (l *Log) drop(w *writer, t *track, reason string) error {
	s := t.segs[0]
	err := l.lose(t, t.low(), s.next-1, reason)
	if full(err) && len(t.segs) > 1 && s != w.seg {
		// There is no room to ledger it, so that its own room has to serve. Should the power go just then, the next start misses it,
		// as later segments tell that it was there, and ledgers it.
		if rerr := l.disk.Remove(s.path); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			return errors.Join(err, rerr)
		}
		err = l.lose(t, t.low(), s.next-1, reason)
	}
	if err != nil {
		return err
	}
	return l.release(w)
}

// lose moves what is still held of a track's [first, last] to the ledger, durably. Callers hold Log.mu.
func (l *Log) lose(t *track, first, last uint64, reason string) error {
	fresh, err := l.ledger(t, first, last, reason)
	if fresh {
		l.cfg.Logger.Warn("outbox lost records", "stream", t.stream, "reason", reason, "first", first, "last", last)
	}
	return err
}

// ledger is lose without a word in the log. It says whether there was anything to ledger. Callers hold Log.mu.
func (l *Log) ledger(t *track, first, last uint64, reason string) (fresh bool, err error) {
	before := t.mark()
	if !t.lose(first, last, reason, l.clock.Wall()) {
		return false, nil
	}
	if err := l.save(); err != nil {
		t.restore(before)
		return false, err
	}
	l.ledgerings++
	l.wake()
	return true, nil
}

// release gives back the space of what is acknowledged or (durably) ledgered. Callers hold Log.mu, and the io of w if
// that is not nil.
func (l *Log) release(w *writer) error {
	var gone []string
	var over []*epoch
	for _, e := range l.epochs {
		for _, t := range e.tracks {
			t.segs = slices.DeleteFunc(t.segs, func(s *segment) bool {
				if s.next == s.first || !t.done.Contains(s.first, s.next-1) || !l.retire(t, s, w) {
					return false
				}
				gone = append(gone, s.path)
				return true
			})
		}
	}
	last := l.current()
	l.epochs = slices.DeleteFunc(l.epochs, func(e *epoch) bool {
		if e == last || !e.finished() {
			return false
		}
		for name, t := range e.tracks {
			sum := l.totals[name]
			l.totals[name] = total{sum.Accepted + t.next - 1, sum.Acked + t.acked, sum.Dropped + t.dropped}
		}
		over = append(over, e)
		return true
	})
	if len(gone)+len(over) == 0 {
		return nil
	}
	// On a full disk the state can't be written before space is given back. Should the power go just then, the next start
	// takes what was acknowledged for lost and ledgers it, which the cloud, holding it, does not book.
	early := l.save()
	var errs []error
	for _, path := range gone {
		if err := l.disk.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, e := range over {
		errs = append(errs, l.removeEpoch(e))
	}
	if early != nil {
		errs = append(errs, l.save())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("give back disk space: %w", err)
	}
	return nil
}

// retire says whether a segment that holds nothing any more may be removed, closing it if it is still written to. own is
// the writer whose io the caller holds, or nil.
func (l *Log) retire(t *track, s *segment, own *writer) bool {
	w := l.writers[t.stream]
	if w == nil || t.epoch != l.current() {
		return true
	}
	if w != own {
		if !w.io.TryLock() {
			return s != t.segs[len(t.segs)-1]
		}
		defer w.io.Unlock()
	}
	if w.seg != s {
		return true
	}
	if w != own && s.bytes < idleSegment {
		return false
	}
	w.leave()
	return true
}

// Close syncs and closes the files. Appends under way end first.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	writers := slices.Collect(maps.Values(l.writers))
	l.mu.Unlock()
	for _, w := range writers {
		w.io.Lock()
		w.leave()
		w.io.Unlock()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.save()
	if full(err) { // what the file lacks is told again, or read from the segments
		l.cfg.Logger.Warn("the disk is full: the outbox leaves its state as it was", "dir", l.dir, "err", err)
		err = nil
	}
	return errors.Join(err, l.lock.Close())
}

// Appended is a 1-slot signal: look again, there is something to send.
func (l *Log) Appended() <-chan struct{} { return l.appended }

func (l *Log) wake() {
	select {
	case l.appended <- struct{}{}:
	default:
	}
}

// Heads for the Hello: the current epoch, and earlier ones that hold something not acknowledged, oldest first. Should they not
// fit a Hello, the newest of the earlier ones are left out.
func (l *Log) Heads() []*longshorepb.OutboxHead {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*longshorepb.OutboxHead
	size := 0
	for i, e := range l.epochs {
		h := &longshorepb.OutboxHead{Epoch: slices.Clone(e.id[:])}
		cost := 24
		for _, name := range slices.Sorted(maps.Keys(e.tracks)) {
			t := e.tracks[name]
			h.Streams = append(h.Streams, &longshorepb.StreamHead{Stream: name, Low: t.low(), Next: t.next})
			cost += 28 + len(name)
		}
		last := i == len(l.epochs)-1
		for last && size+cost > maxHeads && len(h.Streams) > 0 {
			n := len(h.Streams) - 1
			cost -= 28 + len(h.Streams[n].GetStream())
			h.Streams = h.Streams[:n]
		}
		if last || size+cost <= maxHeads/2 {
			size += cost
			out = append(out, h)
		}
	}
	return out
}

// Ack notes what the sink holds and gives the disk back. An acknowledgement of anything never appended is refused as a
// whole; epochs and streams not known any more are ignored.
func (l *Log) Ack(a *longshorepb.Ack) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return ErrClosed
	}
	type change struct {
		t *track
		a *longshorepb.StreamAck
	}
	var changes []change
	for _, ea := range a.GetEpochs() {
		e := l.epochAt(ea.GetEpoch())
		if e == nil {
			continue
		}
		for _, sa := range ea.GetStreams() {
			t := e.tracks[sa.GetStream()]
			if t == nil && sa.GetWatermark() <= 1 && len(sa.GetAbove()) == 0 {
				continue
			}
			if err := t.plausible(sa); err != nil {
				return fmt.Errorf("acknowledgement of epoch %x, stream %q refused: %w", e.id, sa.GetStream(), err)
			}
			changes = append(changes, change{t, sa})
		}
	}
	for _, c := range changes {
		if c.t.confirm(c.a) {
			l.dirty = true
		}
	}
	return l.release(nil)
}

func (t *track) plausible(a *longshorepb.StreamAck) error {
	if t == nil {
		return errors.New("nothing was appended to it")
	}
	if a.GetWatermark() > t.next {
		return fmt.Errorf("watermark %d is above the next sequence %d", a.GetWatermark(), t.next)
	}
	for _, r := range a.GetAbove() {
		if r.GetFirst() == 0 || r.GetFirst() > r.GetLast() || r.GetLast() >= t.next {
			return fmt.Errorf("range %d to %d is not below the next sequence %d", r.GetFirst(), r.GetLast(), t.next)
		}
	}
	return nil
}

// StreamStats of one stream over all epochs held.
type StreamStats struct {
	Stream                            string
	Accepted, Acked, Dropped, Refused uint64 // records, since the state directory was made (Refused: since start)
	Held                              uint64 // records held and not acknowledged
	HeldBytes                         int64  // on disk
	OldestAge                         time.Duration
}

// Stats for status and metrics, sorted by stream; disk bytes in all.
func (l *Log) Stats() (streams []StreamStats, diskBytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	sums := map[string]*StreamStats{}
	sum := func(name string) *StreamStats {
		if sums[name] == nil {
			sums[name] = &StreamStats{Stream: name}
		}
		return sums[name]
	}
	for name, t := range l.totals {
		s := sum(name)
		s.Accepted, s.Acked, s.Dropped = t.Accepted, t.Acked, t.Dropped
	}
	for name, n := range l.refused {
		sum(name).Refused = n
	}
	for _, e := range l.epochs {
		for name, t := range e.tracks {
			s := sum(name)
			s.Accepted += t.next - 1
			s.Acked += t.acked
			s.Dropped += t.dropped
			s.Held += t.held()
			s.HeldBytes += t.diskBytes()
			diskBytes += t.diskBytes()
			if g := t.segmentAt(t.low()); g != nil && t.held() > 0 {
				s.OldestAge = max(s.OldestAge, age(l.now(), g.oldest))
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		streams = append(streams, *sums[name])
	}
	return streams, diskBytes
}
