package intake

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/inbox"
	"github.com/longshore-edge/longshore/sync/seqset"
)

const (
	// maxCompare bounds the stored frames one received frame is compared with, maxConflicts the conflicting frames kept of an
	// account.
	maxCompare   = 64
	maxConflicts = 16
	// maxAccounts bounds the accounts one edge uses while it is connected.
	maxAccounts = 8192
)

// stage gathers the writes of one transaction. The edges' accounts are copied before they change, so a stage that is not
// committed leaves no trace.
type stage struct {
	*Intake
	txn *badger.Txn
	now int64
	// accounts that changed, or that are to be acknowledged again.
	accounts map[*edge]map[accountID]*account
	ordinals map[*edge]map[[16]byte]uint64
	clocks   map[*edge]map[string]clockState
	// timed are the keys of frames and conflicts, which retention is to find, size their values' bytes.
	timed [][]byte
	size  int64
}

// commit makes a group durable and then tells the sessions. A group too large for one transaction is committed in halves.
// Only Run calls it.
func (i *Intake) commit(group []*unit) error {
	if err := i.room(); err != nil {
		return err
	}
	err := i.commitOnce(group)
	if errors.Is(err, badger.ErrTxnTooBig) && len(group) > 1 {
		half := len(group) / 2
		if err := i.commit(group[:half]); err != nil {
			return err
		}
		return i.commit(group[half:])
	}
	if errors.Is(err, badger.ErrTxnTooBig) {
		i.cfg.Logger.Warn("telemetry refused", "edge", group[0].edge.name, "err", err)
		return nil
	}
	return err
}

func (i *Intake) commitOnce(group []*unit) error {
	s := &stage{
		Intake: i, txn: i.db.NewTransaction(true), now: time.Now().UnixNano(), accounts: map[*edge]map[accountID]*account{},
		ordinals: map[*edge]map[[16]byte]uint64{}, clocks: map[*edge]map[string]clockState{},
	}
	defer s.txn.Discard()
	for _, u := range group {
		if err := s.take(u); err != nil {
			return err
		}
	}
	if err := s.finish(); err != nil {
		return err
	}
	if err := s.txn.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	i.stored += s.size
	s.install(group)
	return nil
}

// take books one unit. An error is one of the store; what is wrong with the unit itself is logged and left out.
func (s *stage) take(u *unit) error {
	for _, h := range u.heads {
		for _, sh := range h.GetStreams() {
			if err := s.state(u.edge, [16]byte(h.GetEpoch()), sh.GetStream(), sh.GetLow(), sh.GetNext()); err != nil {
				return err
			}
		}
	}
	for _, c := range u.clocks {
		if err := s.clock(u.edge, c); err != nil {
			return err
		}
	}
	for _, f := range u.frames {
		if err := s.frame(u, f); err != nil {
			return err
		}
	}
	for _, l := range u.losses {
		if err := s.loss(u, l); err != nil {
			return err
		}
	}
	for _, l := range u.lows {
		if err := s.state(u.edge, u.epoch, l.GetStream(), l.GetLow(), 0); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) state(e *edge, epoch [16]byte, stream string, low, next uint64) error {
	a, err := s.account(e, epoch, stream)
	if err == nil && a != nil {
		a.State(low, next)
	}
	return err
}

// account returns a copy of an account that may be changed; nil if the edge uses too many.
func (s *stage) account(e *edge, epoch [16]byte, stream string) (*account, error) {
	id := accountID{epoch, stream}
	if a := s.accounts[e][id]; a != nil {
		return a, nil
	}
	s.mu.Lock()
	a, n := e.accounts[id], len(e.accounts)
	s.mu.Unlock()
	if s.accounts[e] == nil {
		s.accounts[e] = map[accountID]*account{}
	}
	if a == nil && n+len(s.accounts[e]) >= maxAccounts {
		s.cfg.Logger.Warn("telemetry refused", "edge", e.name, "stream", stream, "err", "too many streams and epochs in one connection")
		return nil, nil
	}
	if a == nil {
		var err error
		if a, err = s.load(e, epoch, stream); err != nil {
			return nil, err
		}
	}
	a = a.clone()
	s.accounts[e][id] = a
	return a, nil
}

func (s *stage) load(e *edge, epoch [16]byte, stream string) (*account, error) {
	ordinal, err := s.ordinal(e, epoch)
	if err != nil {
		return nil, err
	}
	a := &account{place: place{e.name, stream, ordinal}, epoch: epoch, Account: new(inbox.Account)}
	err = s.get(a.prefix(keyAccount), func(v []byte) (err error) {
		a.Account, err = decodeAccount(v)
		return err
	})
	return a, err
}

// get reads a key; a key that is not there is no error.
func (s *stage) get(key []byte, f func(v []byte) error) error {
	item, err := s.txn.Get(key)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read store: %w", err)
	}
	return item.Value(f)
}

// ordinal returns when an epoch was first heard of, as a number that orders the edge's epochs.
func (s *stage) ordinal(e *edge, epoch [16]byte) (n uint64, err error) {
	if n = max(e.ordinals[epoch], s.ordinals[e][epoch]); n > 0 {
		return n, nil
	}
	key := append(edgePrefix(keyEpoch, e.name), epoch[:]...)
	err = s.get(key, func(v []byte) error {
		if len(v) != 8 {
			return errDamaged
		}
		n = binary.BigEndian.Uint64(v)
		return nil
	})
	if err != nil {
		return 0, err
	}
	if n == 0 {
		n = uint64(s.now)
		for s.taken(e, n) {
			n++
		}
		if err := s.txn.Set(key, binary.BigEndian.AppendUint64(nil, n)); err != nil {
			return 0, err
		}
	}
	if s.ordinals[e] == nil {
		s.ordinals[e] = map[[16]byte]uint64{}
	}
	s.ordinals[e][epoch] = n
	return n, nil
}

// taken says whether another epoch of the edge, first heard of now, has this ordinal.
func (s *stage) taken(e *edge, n uint64) bool {
	for _, known := range []map[[16]byte]uint64{e.ordinals, s.ordinals[e]} {
		for _, o := range known {
			if o == n {
				return true
			}
		}
	}
	return false
}

// clock keeps a mapping unless a better one is known.
func (s *stage) clock(e *edge, c *longshorepb.Clock) error {
	fresh := clockState{c.GetOffsetNs(), c.GetQuality()}
	key := append(edgePrefix(keyClock, e.name), c.GetBootId()...)
	old, ok := s.clocks[e][c.GetBootId()]
	if !ok {
		old, ok = e.clocks[c.GetBootId()]
	}
	if !ok {
		err := s.get(key, func(v []byte) (err error) {
			old, err = decodeClock(v)
			ok = err == nil
			return err
		})
		if err != nil {
			return err
		}
	}
	if ok && (old == fresh || old.quality > fresh.quality) {
		return nil
	}
	if s.clocks[e] == nil {
		s.clocks[e] = map[string]clockState{}
	}
	s.clocks[e][c.GetBootId()] = fresh
	return s.txn.Set(key, fresh.encode())
}

// frame books a frame and stores the part of it that was not held.
func (s *stage) frame(u *unit, f received) error {
	a, err := s.account(u.edge, u.epoch, f.stream)
	if err != nil || a == nil {
		return err
	}
	fresh, err := a.Book(f.first, f.last)
	if err != nil {
		s.cfg.Logger.Warn("telemetry refused", "edge", u.edge.name, "stream", f.stream, "first", f.first, "err", err)
		return nil
	}
	if len(fresh) == 1 && fresh[0] == (seqset.Range{First: f.first, Last: f.last}) {
		return s.put(a.key(keyData, f.first), data{epoch: u.epoch, historical: u.historical, mono: f.mono, wall: f.wall, frame: f.raw})
	}
	if err := s.compare(u, a, f); err != nil {
		return err
	}
	for _, r := range fresh {
		if err := s.putPart(u, a, f, r); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) put(key []byte, d data) error {
	v := d.encode()
	s.timed = append(s.timed, key)
	s.size += int64(len(v))
	return s.txn.Set(key, v)
}

// putPart stores the records r of a frame as a frame of their own.
func (s *stage) putPart(u *unit, a *account, f received, r seqset.Range) error {
	whole, err := s.decoder.Decode(f.raw)
	if err != nil {
		return err
	}
	cut := &frame.Frame{Stream: f.stream, First: r.First, Count: uint32(r.Len()), BootID: whole.BootID}
	err = whole.Walk(func(seq uint64, rec frame.Record) bool {
		if r.First <= seq && seq <= r.Last {
			cut.Records = frame.AppendRecord(cut.Records, rec)
		}
		return seq < r.Last
	})
	if err != nil {
		return err
	}
	raw, err := s.encoder.Encode(cut)
	if err != nil {
		return err
	}
	d := describe(cut, raw)
	return s.put(a.key(keyData, r.First), data{epoch: u.epoch, historical: u.historical, mono: d.mono, wall: d.wall, frame: raw})
}

// compare looks whether what the sink holds of a frame's records has other content. What retention has deleted, or the ledger
// says is lost, compares equal to anything.
func (s *stage) compare(u *unit, a *account, f received) error {
	equal := false
	err := s.get(a.key(keyData, f.first), func(v []byte) error {
		d, err := decodeData(v)
		equal = err == nil && bytes.Equal(d.frame, f.raw)
		return err
	})
	if err != nil || equal {
		return err
	}
	differing, err := s.differing(a, f)
	if err != nil || differing == 0 {
		return err
	}
	sum := sha256.Sum256(f.raw)
	key := append(a.key(keyConflict, f.first), sum[:8]...)
	known := false
	if err := s.get(key, func([]byte) error { known = true; return nil }); err != nil || known {
		return err
	}
	a.Conflict(differing)
	s.cfg.Logger.Error("records came again with other content under the same identity: is the edge's state directory a copy of another's?",
		"edge", u.edge.name, "stream", f.stream, "epoch", fmt.Sprintf("%x", u.epoch), "first", f.first, "last", f.last, "records", differing)
	if a.conflicts++; a.conflicts > maxConflicts {
		return nil
	}
	return s.put(key, data{epoch: u.epoch, historical: u.historical, mono: f.mono, wall: f.wall, frame: f.raw})
}

// differing counts the records of f that are stored with other content.
func (s *stage) differing(a *account, f received) (n uint64, err error) {
	got, err := s.decoder.Decode(f.raw)
	if err != nil {
		return 0, err
	}
	var mine [][]byte
	err = got.Walk(func(_ uint64, r frame.Record) bool {
		mine = append(mine, frame.AppendRecord(nil, r))
		return true
	})
	if err != nil {
		return 0, err
	}
	prefix := a.prefix(keyData)
	start := f.first
	// The frame before may reach into this one.
	back := s.txn.NewIterator(badger.IteratorOptions{Reverse: true, Prefix: prefix})
	if back.Seek(a.key(keyData, f.first)); back.Valid() {
		if _, first, err := parseKey(back.Item().Key()); err == nil {
			start = first
		}
	}
	back.Close()
	it := s.txn.NewIterator(badger.IteratorOptions{Prefix: prefix})
	defer it.Close()
	steps := 0
	for it.Seek(a.key(keyData, start)); it.Valid() && steps < maxCompare; it.Next() {
		_, first, err := parseKey(it.Item().Key())
		if err != nil || first > f.last {
			return n, err
		}
		steps++
		err = it.Item().Value(func(v []byte) error {
			d, err := decodeData(v)
			if err != nil {
				return err
			}
			have, err := s.decoder.Decode(d.frame)
			if err != nil {
				return err
			}
			return have.Walk(func(seq uint64, r frame.Record) bool {
				if f.first <= seq && seq <= f.last && !bytes.Equal(mine[seq-f.first], frame.AppendRecord(nil, r)) {
					n++
				}
				return true
			})
		})
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// loss books a ledger entry for the part that is neither delivered nor ledgered.
func (s *stage) loss(u *unit, l *longshorepb.Loss) error {
	a, err := s.account(u.edge, u.epoch, l.GetStream())
	if err != nil || a == nil {
		return err
	}
	fresh, err := a.Lose(l.GetFirst(), l.GetLast())
	if err != nil {
		s.cfg.Logger.Warn("telemetry refused", "edge", u.edge.name, "stream", l.GetStream(), "first", l.GetFirst(), "err", err)
		return nil
	}
	for _, r := range fresh {
		v := binary.BigEndian.AppendUint64(nil, r.Last)
		v = binary.BigEndian.AppendUint64(v, uint64(l.GetWallNs()))
		v = append(append(v, u.epoch[:]...), l.GetReason()...)
		if err := s.txn.Set(a.key(keyLoss, r.First), v); err != nil {
			return err
		}
	}
	return nil
}

// finish writes the accounts and what retention needs.
func (s *stage) finish() error {
	for _, accounts := range s.accounts {
		for _, a := range accounts {
			v, err := a.encode()
			if err != nil {
				return err
			}
			if err := s.txn.Set(a.prefix(keyAccount), v); err != nil {
				return err
			}
		}
	}
	if len(s.timed) == 0 {
		return nil
	}
	var v []byte
	for _, k := range s.timed {
		v = append(binary.AppendUvarint(v, uint64(len(k))), k...)
	}
	s.counter++
	return s.txn.Set(timeKey(s.now, s.counter, s.size), v)
}

// install makes what was committed the state of the edges and wakes their sessions.
func (s *stage) install(group []*unit) {
	var wakes []func()
	s.mu.Lock()
	for e, accounts := range s.accounts {
		for id, a := range accounts {
			e.accounts[id] = a
			for session := range e.sessions {
				session.dirty[id] = true
			}
		}
		for session := range e.sessions {
			wakes = append(wakes, session.wake)
		}
	}
	for _, u := range group {
		s.forgetIdle(u.edge)
	}
	s.mu.Unlock()
	for e, ordinals := range s.ordinals {
		for epoch, n := range ordinals {
			e.ordinals[epoch] = n
		}
	}
	for e, clocks := range s.clocks {
		for boot, c := range clocks {
			e.clocks[boot] = c
		}
	}
	for _, wake := range wakes {
		wake()
	}
}

// keys reads the list that finish wrote.
func keys(v []byte) (out [][]byte, err error) {
	for len(v) > 0 {
		n, size := binary.Uvarint(v)
		if size <= 0 || n > uint64(len(v)-size) {
			return nil, errDamaged
		}
		out = append(out, slices.Clone(v[size:size+int(n)]))
		v = v[size+int(n):]
	}
	return out, nil
}
