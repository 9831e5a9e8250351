package intake

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/inbox"
)

// Query selects records.
type Query struct {
	Edge, Stream string // empty = all
	// From and To bound the corrected time of records, the time of ledger entries: From <= time < To; zero = unbounded.
	From, To time.Time
	// Limit of records or ledger entries; 0 = none.
	Limit int
	// After goes on behind a record that Records gave before; zero = from the start. The ledger knows none.
	After inbox.ID
}

// ErrNoPosition says that Query.After is no record of what the query selects.
var ErrNoPosition = errors.New("after names no record of this selection")

// prefix of the keys of a kind that q may select.
func (q Query) prefix(kind byte) []byte {
	switch {
	case q.Edge == "":
		return []byte{kind}
	case q.Stream == "":
		return edgePrefix(kind, q.Edge)
	}
	return streamPrefix(kind, q.Edge, q.Stream)
}

func (q Query) covers(ns int64) bool {
	return (q.From.IsZero() || ns >= q.From.UnixNano()) && (q.To.IsZero() || ns < q.To.UnixNano())
}

var errEnough = errors.New("limit reached")

// Records streams records in order of (edge, stream, epoch start, sequence) to f until f returns an error, which Records
// returns. It sees the store as it was at the call. Payload is valid until f returns. The error is ErrNoPosition, and f is not
// called, if q.After is of another edge or stream, or of an epoch never heard of; a record that retention has deleted since is
// as good as any.
func (i *Intake) Records(ctx context.Context, q Query, f func(inbox.Record) error) error {
	done, err := i.use()
	if err != nil {
		return err
	}
	defer done()
	n := 0
	err = i.scan(ctx, q, keyData, func(txn *badger.Txn) func(place, uint64, []byte) error {
		clocks := clockReader{txn, map[string]clockState{}}
		return func(p place, _ uint64, v []byte) error {
			return i.recordsOf(p, v, q, clocks, func(r inbox.Record) error {
				if err := f(r); err != nil {
					return err
				}
				if n++; n == q.Limit {
					return errEnough
				}
				return nil
			})
		}
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// Tail gives f the newest n records of each edge and stream that q selects, the newest by sequence, in the order of Records.
// It reads no more than it gives, as far as From and To allow. Limit and After do not apply.
func (i *Intake) Tail(ctx context.Context, q Query, n int, f func(inbox.Record) error) error {
	done, err := i.use()
	if err != nil {
		return err
	}
	defer done()
	return i.scan(ctx, q, keyAccount, func(txn *badger.Txn) func(place, uint64, []byte) error {
		clocks := clockReader{txn, map[string]clockState{}}
		var last place
		return func(p place, _ uint64, _ []byte) error {
			if p.edge == last.edge && p.stream == last.stream {
				return nil // another epoch of a stream that is done
			}
			last = p
			return i.tail(ctx, txn, Query{Edge: p.edge, Stream: p.stream, From: q.From, To: q.To}, n, clocks, f)
		}
	})
}

// tail is Tail of one stream: it goes back until it has seen n records, then forth.
func (i *Intake) tail(ctx context.Context, txn *badger.Txn, q Query, n int, clocks clockReader, f func(inbox.Record) error) error {
	prefix := q.prefix(keyData)
	seen := 0
	count := func(inbox.Record) error { seen++; return nil }
	var start []byte
	back := txn.NewIterator(badger.IteratorOptions{Reverse: true, Prefix: prefix})
	defer back.Close()
	for back.Seek(bytes.Join([][]byte{prefix, bytes.Repeat([]byte{0xff}, 17)}, nil)); back.Valid() && seen < n; back.Next() {
		if err := i.visit(ctx, back.Item(), q, clocks, count); err != nil {
			return err
		}
		start = back.Item().KeyCopy(start)
	}
	give := func(r inbox.Record) error {
		if seen--; seen >= n {
			return nil
		}
		return f(r)
	}
	it := txn.NewIterator(badger.IteratorOptions{Prefix: prefix, PrefetchValues: true, PrefetchSize: 16})
	defer it.Close()
	for it.Seek(start); seen > 0 && it.Valid(); it.Next() {
		if err := i.visit(ctx, it.Item(), q, clocks, give); err != nil {
			return err
		}
	}
	return nil
}

// visit gives f the records of the frame under a key that q selects.
func (i *Intake) visit(ctx context.Context, item *badger.Item, q Query, clocks clockReader, f func(inbox.Record) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p, _, err := parseKey(item.Key())
	if err != nil {
		return err
	}
	return item.Value(func(v []byte) error { return i.recordsOf(p, v, q, clocks, f) })
}

// scan calls visit, made by begin, with every key and value of a kind that q selects by edge and stream.
func (i *Intake) scan(ctx context.Context, q Query, kind byte, begin func(*badger.Txn) func(p place, first uint64, v []byte) error) error {
	return i.db.View(func(txn *badger.Txn) error {
		visit := begin(txn)
		start := q.prefix(kind)
		if kind == keyData && q.After != (inbox.ID{}) {
			var err error
			if start, err = q.start(txn); err != nil {
				return err
			}
		}
		it := txn.NewIterator(badger.IteratorOptions{Prefix: q.prefix(kind), PrefetchValues: true, PrefetchSize: 16})
		defer it.Close()
		for it.Seek(start); it.Valid(); it.Next() {
			if err := ctx.Err(); err != nil {
				return err
			}
			p, first, err := parseKey(it.Item().Key())
			if err != nil {
				return err
			}
			if q.Stream != "" && q.Stream != p.stream {
				continue
			}
			if err := it.Item().Value(func(v []byte) error { return visit(p, first, v) }); err != nil {
				return err
			}
		}
		return nil
	})
}

// start returns the key of the stored frame that q.After is in, or of where it was.
func (q Query) start(txn *badger.Txn) ([]byte, error) {
	a := q.After
	if q.Edge != "" && q.Edge != a.Edge || q.Stream != "" && q.Stream != a.Stream {
		return nil, ErrNoPosition
	}
	item, err := txn.Get(append(edgePrefix(keyEpoch, a.Edge), a.Epoch[:]...))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, ErrNoPosition
	}
	if err != nil {
		return nil, fmt.Errorf("read store: %w", err)
	}
	p := place{edge: a.Edge, stream: a.Stream}
	err = item.Value(func(v []byte) error {
		if len(v) != 8 {
			return errDamaged
		}
		p.ordinal = binary.BigEndian.Uint64(v)
		return nil
	})
	if err != nil {
		return nil, err
	}
	start := p.key(keyData, a.Seq)
	back := txn.NewIterator(badger.IteratorOptions{Reverse: true, Prefix: p.prefix(keyData)})
	defer back.Close()
	if back.Seek(start); back.Valid() {
		start = back.Item().KeyCopy(nil)
	}
	return start, nil
}

// passed reports whether a record is q.After or stands before it in the same stream and epoch.
func (q Query) passed(id inbox.ID) bool {
	a := q.After
	return id.Edge == a.Edge && id.Stream == a.Stream && id.Epoch == a.Epoch && id.Seq <= a.Seq
}

// recordsOf gives f the records of one stored frame that q selects.
func (i *Intake) recordsOf(p place, v []byte, q Query, clocks clockReader, f func(inbox.Record) error) error {
	d, err := decodeData(v)
	if err != nil {
		return err
	}
	boot, err := frame.BootID(d.frame)
	if err != nil {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	c, known, err := clocks.of(p.edge, boot)
	if err != nil {
		return err
	}
	from, to := d.wall[0], d.wall[1]
	if known {
		from, to = d.mono[0]+c.offset, d.mono[1]+c.offset
	}
	if !q.From.IsZero() && to < q.From.UnixNano() || !q.To.IsZero() && from >= q.To.UnixNano() {
		return nil
	}
	got, err := i.decoder.Decode(d.frame)
	if err != nil {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	var failed error
	err = got.Walk(func(seq uint64, r frame.Record) bool {
		rec := inbox.Record{
			ID:     inbox.ID{Edge: p.edge, Epoch: d.epoch, Stream: p.stream, Seq: seq},
			WallNs: r.WallNs, MonoNs: r.MonoNs, BootID: boot, Topic: string(r.Topic), Payload: r.Payload, Historical: d.historical,
		}
		if known {
			rec.WallNs, rec.Quality = r.MonoNs+c.offset, c.quality
		}
		if q.covers(rec.WallNs) && !q.passed(rec.ID) {
			failed = f(rec)
		}
		return failed == nil
	})
	return errors.Join(err, failed)
}

// clockReader looks up clock mappings once for a query.
type clockReader struct {
	txn   *badger.Txn
	known map[string]clockState
}

// of returns the mapping of an edge's boot; ok is false if its records keep the time the edge believed in.
func (r clockReader) of(edge, boot string) (c clockState, ok bool, err error) {
	key := append(edgePrefix(keyClock, edge), boot...)
	c, cached := r.known[string(key)]
	if !cached {
		item, err := r.txn.Get(key)
		switch {
		case errors.Is(err, badger.ErrKeyNotFound):
		case err != nil:
			return c, false, fmt.Errorf("read store: %w", err)
		default:
			if err := item.Value(func(v []byte) (err error) { c, err = decodeClock(v); return err }); err != nil {
				return c, false, err
			}
		}
		r.known[string(key)] = c
	}
	return c, c.quality != longshorepb.ClockQuality_CLOCK_QUALITY_UNSET, nil
}

// Sum is the account of one (edge, stream) over all epochs: Accepted is what the edge says it accepted (next sequence - 1 summed),
// Delivered what the sink holds or held, Ledgered what was lost and booked; Duplicates counts records booked twice (always 0),
// Resent those received again and not booked; Conflicts same identity with other bytes.
type Sum struct {
	Edge, Stream                                                 string
	Accepted, Delivered, Ledgered, Duplicates, Resent, Conflicts uint64
}

// LedgerEntry is one booked loss.
type LedgerEntry struct {
	Edge, Stream, Reason string
	Epoch                [16]byte
	First, Last          uint64
	// At is when the edge dropped the records, by its own clock.
	At time.Time
}

// Ledger returns the sums and the entries, in order of edge, stream, epoch start and sequence. From, To and Limit select
// entries only.
func (i *Intake) Ledger(ctx context.Context, q Query) ([]Sum, []LedgerEntry, error) {
	done, err := i.use()
	if err != nil {
		return nil, nil, err
	}
	defer done()
	var sums []Sum
	err = i.scan(ctx, q, keyAccount, func(*badger.Txn) func(place, uint64, []byte) error {
		return func(p place, _ uint64, v []byte) error {
			a, err := decodeAccount(v)
			if err != nil {
				return err
			}
			last := len(sums) - 1
			if last < 0 || sums[last].Edge != p.edge || sums[last].Stream != p.stream {
				sums = append(sums, Sum{Edge: p.edge, Stream: p.stream})
				last++
			}
			s := &sums[last]
			s.Accepted += a.Accepted()
			s.Delivered += a.Delivered()
			s.Ledgered += a.Ledgered()
			s.Duplicates += a.Duplicates()
			s.Resent += a.Resent()
			s.Conflicts += a.Conflicts()
			return nil
		}
	})
	if err != nil {
		return nil, nil, err
	}
	var entries []LedgerEntry
	err = i.scan(ctx, q, keyLoss, func(*badger.Txn) func(place, uint64, []byte) error {
		return func(p place, first uint64, v []byte) error {
			if len(v) < 32 {
				return errDamaged
			}
			at := int64(binary.BigEndian.Uint64(v[8:]))
			if !q.covers(at) {
				return nil
			}
			entries = append(entries, LedgerEntry{
				Edge: p.edge, Stream: p.stream, Reason: string(v[32:]), Epoch: [16]byte(v[16:]),
				First: first, Last: binary.BigEndian.Uint64(v), At: time.Unix(0, at),
			})
			if len(entries) == q.Limit {
				return errEnough
			}
			return nil
		}
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, nil, err
	}
	return sums, entries, nil
}
