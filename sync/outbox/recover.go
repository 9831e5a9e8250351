package outbox

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// recover reads the state file and finds the segments. Segments but the last of a stream are not read: what is damaged in
// them shows when they are sent.
func (l *Log) recover() error {
	st, err := l.loadState()
	damaged := errors.Is(err, errDamaged)
	switch {
	case errors.Is(err, errNoState), damaged:
		st = &state{}
	case err != nil:
		return err
	}
	for _, es := range st.Epochs {
		e, err := es.restore()
		if err != nil {
			st, damaged, l.epochs = &state{}, true, nil
			break
		}
		l.epochs = append(l.epochs, e)
	}
	if st.Totals != nil {
		l.totals = st.Totals
	}
	names, err := l.disk.List(filepath.Join(l.dir, "epochs"))
	if err != nil {
		return fmt.Errorf("list epochs: %w", err)
	}
	for _, name := range names {
		id, err := parseEpoch(name)
		if err != nil || l.epochAt(id[:]) != nil {
			continue
		}
		e := &epoch{id: id, tracks: map[string]*track{}}
		if damaged {
			l.epochs = append(l.epochs, e)
			continue
		}
		// The state is written before an epoch's directory is made and before it is removed: this one is done with.
		if err := l.removeEpoch(e); err != nil {
			return err
		}
	}
	latest := st.Clock
	for _, e := range l.epochs {
		if err := l.recoverEpoch(e); err != nil {
			return err
		}
		for _, t := range e.tracks {
			for _, s := range t.segs {
				latest = max(latest, s.oldest, s.newest)
			}
		}
	}
	if damaged {
		// Every sequence below what is here may have been acknowledged or lost, nobody knows. Claiming it as lost is
		// exact where it counts: the cloud books only what it does not hold.
		l.cfg.Logger.Error("outbox state file is damaged: starting from the segments alone", "dir", l.dir)
		slices.SortStableFunc(l.epochs, func(a, b *epoch) int { return int(min(max(a.oldest()-b.oldest(), -1), 1)) })
	}
	l.base = st.Base
	if st.Boot != l.clock.Boot() {
		// Time went on from the last reading known when this boot began.
		l.base = latest
	} else if l.base+l.clock.Mono() < latest {
		l.base = latest - l.clock.Mono()
	}
	return nil
}

// oldest is the log time of the oldest segment.
func (e *epoch) oldest() int64 {
	at := int64(1<<63 - 1)
	for _, t := range e.tracks {
		for _, s := range t.segs {
			at = min(at, s.oldest)
		}
	}
	return at
}

func (l *Log) removeEpoch(e *epoch) error {
	dir := l.epochDir(e)
	names, err := l.disk.List(dir)
	if err != nil {
		return fmt.Errorf("list epoch: %w", err)
	}
	for _, name := range names {
		if err := l.disk.Remove(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("remove old segment: %w", err)
		}
	}
	if err := l.disk.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old epoch: %w", err)
	}
	return nil
}

func (l *Log) recoverEpoch(e *epoch) error {
	names, err := l.disk.List(l.epochDir(e))
	if err != nil {
		return fmt.Errorf("list epoch: %w", err)
	}
	firsts := map[string][]uint64{}
	for _, name := range names {
		stream, first, ok := parseSegmentName(name)
		if !ok {
			l.cfg.Logger.Warn("outbox ignores a file that is not its own", "dir", l.epochDir(e), "name", name)
			continue
		}
		firsts[stream] = append(firsts[stream], first)
	}
	for _, stream := range slices.Sorted(maps.Keys(firsts)) {
		t := e.tracks[stream]
		if t == nil {
			t = &track{epoch: e, stream: stream, next: 1}
			e.tracks[stream] = t
		}
		slices.Sort(firsts[stream])
		if err := l.recoverTrack(t, firsts[stream]); err != nil {
			return err
		}
	}
	return nil
}

func (l *Log) recoverTrack(t *track, firsts []uint64) error {
	for i, first := range firsts {
		s := &segment{path: filepath.Join(l.epochDir(t.epoch), segmentName(t.stream, first)), first: first}
		last := i == len(firsts)-1
		if !last {
			s.next = firsts[i+1]
		}
		if err := l.recoverSegment(t, s, last); err != nil {
			return fmt.Errorf("read segment %s: %w", s.path, err)
		}
		if s.next == s.first { // made, but nothing in it was ever acknowledged to a producer
			if err := l.disk.Remove(s.path); err != nil {
				return fmt.Errorf("remove empty segment: %w", err)
			}
			continue
		}
		t.segs = append(t.segs, s)
		t.next = max(t.next, s.next)
	}
	return nil
}

// recoverSegment fills in what the file's name does not say. Only the last segment of a track is read to its end.
func (l *Log) recoverSegment(t *track, s *segment, last bool) (err error) {
	f, err := l.disk.Open(s.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if s.bytes, err = f.Size(); err != nil {
		return err
	}
	w := &window{r: f, end: s.bytes, seed: seed(t.epoch.id, t.stream)}
	if b, _, found, err := nextBatch(w, 0, s.first); err != nil || !found && !last {
		return err
	} else if found {
		s.oldest = b.at
	}
	if !last {
		return nil
	}
	end, torn, err := s.scan(w)
	if torn.count > 0 && torn.first >= end {
		end = torn.last() + 1
	}
	s.next = end
	return err
}

// scan reads a segment to its end. It sets newest and returns the sequence after its last batch, and the header of a
// damaged batch at the end.
func (s *segment) scan(w *window) (end uint64, torn header, err error) {
	end = s.first
	for off := int64(0); ; {
		b, damaged, found, err := nextBatch(w, off, end)
		if err != nil || !found {
			return end, damaged, err
		}
		s.newest = max(s.newest, b.at)
		off, end = b.end(), b.last()+1
	}
}

// date finds out the log time of the newest record of a segment of an earlier start, which costs reading it.
func (l *Log) date(t *track, s *segment) (err error) {
	f, err := l.disk.Open(s.path)
	if err != nil {
		return fmt.Errorf("read segment %s: %w", s.path, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	s.newest = s.oldest
	_, _, err = s.scan(&window{r: f, end: s.bytes, seed: seed(t.epoch.id, t.stream)})
	return err
}
