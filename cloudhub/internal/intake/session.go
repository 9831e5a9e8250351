package intake

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/seqset"
)

const (
	// maxParts bounds the frames one session reassembles at a time: one for each lane.
	maxParts = 2
	// maxClocks bounds the clock mappings of a message, maxText names and reasons in bytes.
	maxClocks = 16
	maxText   = 64
	// maxAck bounds an acknowledgement in bytes.
	maxAck = frame.MaxMessage - 256
	// unitCost is what a queued message costs apart from its bytes.
	unitCost = 512
)

// Session is one edge's connection. Safe for concurrent use.
type Session struct {
	intake *Intake
	edge   *edge
	wake   func()

	// in guards the fragments.
	in    sync.Mutex
	parts []*part
	ended bool

	// Guarded by Intake.mu.
	closed bool
	// dirty are the accounts to acknowledge.
	dirty map[accountID]bool
}

// part is a frame being reassembled.
type part struct {
	epoch  [16]byte
	stream string
	first  uint64
	total  uint32
	data   []byte
}

// unit is what one message brings, checked.
type unit struct {
	edge       *edge
	cost       int64
	historical bool
	epoch      [16]byte
	frames     []received
	losses     []*longshorepb.Loss
	lows       []*longshorepb.StreamLow
	clocks     []*longshorepb.Clock
	// heads are set for a Hello instead of all the above.
	heads []*longshorepb.OutboxHead
}

// received is a frame as it came, and what it is about.
type received struct {
	stream      string
	first, last uint64
	mono, wall  [2]int64
	raw         []byte
}

// Session starts one. wake is called (never concurrently, from Run's goroutine, must not block) whenever there is something
// new to acknowledge to this edge: it wakes the sender, which then calls Ack. It may be called once while Close runs.
// What the hello says of the edge's outbox is taken into the books; whatever of it the sink holds is acknowledged anew.
func (i *Intake) Session(edgeName string, hello *longshorepb.Hello, wake func()) *Session {
	i.mu.Lock()
	defer i.mu.Unlock()
	e := i.edges[edgeName]
	if e == nil {
		e = &edge{
			name: edgeName, sessions: map[*Session]bool{}, accounts: map[accountID]*account{},
			ordinals: map[[16]byte]uint64{}, clocks: map[string]clockState{},
		}
		i.edges[edgeName] = e
	}
	s := &Session{intake: i, edge: e, wake: wake, dirty: map[accountID]bool{}}
	e.sessions[s] = true
	u := &unit{edge: e, cost: unitCost + int64(proto.Size(hello))}
	for _, h := range hello.GetOutboxes() {
		if len(h.GetEpoch()) == 16 && !slices.ContainsFunc(h.GetStreams(), func(s *longshorepb.StreamHead) bool { return frame.ValidStream(s.GetStream()) != nil }) {
			u.heads = append(u.heads, h)
		}
	}
	if len(u.heads) > 0 {
		i.queue(u)
	}
	return s
}

// queue hands a unit to Run. Callers hold mu.
func (i *Intake) queue(u *unit) {
	if len(u.edge.queue) == 0 {
		i.busy = append(i.busy, u.edge)
	}
	u.edge.queue = append(u.edge.queue, u)
	u.edge.queued += u.cost
	i.pending += u.cost
	select {
	case i.kick <- struct{}{}:
	default:
	}
}

// Receive queues one telemetry message. It never blocks; past the bounds it drops the message and says so with ErrBusy (the
// edge sends it again, since it is not acknowledged). A malformed message is an error for the log and changes nothing.
func (s *Session) Receive(payload []byte) error {
	u, err := s.check(payload)
	if err != nil {
		return fmt.Errorf("telemetry: %w", err)
	}
	i := s.intake
	i.mu.Lock()
	defer i.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if i.pending+u.cost > i.cfg.PendingBytes || s.edge.queued+u.cost > i.cfg.PendingBytes/8 {
		return ErrBusy
	}
	if len(u.frames)+len(u.losses)+len(u.lows)+len(u.clocks) > 0 {
		i.queue(u)
	}
	return nil
}

// check parses a message and proves that it is well-formed, before anything is done with any part of it.
func (s *Session) check(payload []byte) (*unit, error) {
	done, err := s.intake.use() // for the decoder
	if err != nil {
		return nil, err
	}
	defer done()
	if len(payload) > frame.MaxMessage {
		return nil, fmt.Errorf("message of %d bytes is above the limit of %d", len(payload), frame.MaxMessage)
	}
	m := new(longshorepb.Telemetry)
	if err := proto.Unmarshal(payload, m); err != nil {
		return nil, err
	}
	if len(m.GetEpoch()) != 16 {
		return nil, fmt.Errorf("epoch of %d bytes instead of 16", len(m.GetEpoch()))
	}
	u := &unit{
		edge: s.edge, cost: unitCost + int64(len(payload)), historical: m.GetHistorical(), epoch: [16]byte(m.GetEpoch()),
		losses: m.GetLedger(), lows: m.GetLow(), clocks: m.GetClocks(),
	}
	if err := u.checkHeader(); err != nil {
		return nil, err
	}
	for _, raw := range m.GetFrames() {
		f, err := s.intake.checkFrame(raw)
		if err != nil {
			return nil, err
		}
		u.frames = append(u.frames, f)
	}
	if m.GetFragment() == nil {
		return u, nil
	}
	raw, err := s.reassemble(u.epoch, m.GetFragment())
	if err != nil || raw == nil {
		return u, err
	}
	f, err := s.intake.checkFrame(raw)
	if err == nil && (f.stream != m.GetFragment().GetStream() || f.first != m.GetFragment().GetFirst()) {
		err = errors.New("fragments are of another frame than they say")
	}
	u.frames = append(u.frames, f)
	u.cost += int64(len(raw))
	return u, err
}

func (u *unit) checkHeader() error {
	if len(u.clocks) > maxClocks {
		return fmt.Errorf("%d clock mappings are more than %d", len(u.clocks), maxClocks)
	}
	for _, c := range u.clocks {
		if c.GetBootId() == "" || len(c.GetBootId()) > maxText || bytes.IndexByte([]byte(c.GetBootId()), 0) >= 0 {
			return fmt.Errorf("boot id %q is impossible", c.GetBootId())
		}
		if q := c.GetQuality(); q < 0 || q > longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED {
			return fmt.Errorf("clock quality %d is unknown", q)
		}
	}
	for _, l := range u.lows {
		if err := frame.ValidStream(l.GetStream()); err != nil {
			return err
		}
	}
	for _, l := range u.losses {
		if err := frame.ValidStream(l.GetStream()); err != nil {
			return err
		}
		if l.GetFirst() == 0 || l.GetFirst() > l.GetLast() || l.GetLast() > seqset.Max || len(l.GetReason()) > maxText {
			return fmt.Errorf("impossible loss %d to %d of %q", l.GetFirst(), l.GetLast(), l.GetStream())
		}
	}
	return nil
}

func (i *Intake) checkFrame(raw []byte) (received, error) {
	f, err := i.decoder.Decode(raw)
	if err != nil {
		return received{}, err
	}
	return describe(f, raw), nil
}

// describe notes what is needed of a frame that was decoded.
func describe(f *frame.Frame, raw []byte) received {
	r := received{stream: f.Stream, first: f.First, last: f.Last(), raw: raw}
	_ = f.Walk(func(seq uint64, rec frame.Record) bool { // checked by Decode
		if seq == f.First {
			r.mono, r.wall = [2]int64{rec.MonoNs, rec.MonoNs}, [2]int64{rec.WallNs, rec.WallNs}
		}
		r.mono = [2]int64{min(r.mono[0], rec.MonoNs), max(r.mono[1], rec.MonoNs)}
		r.wall = [2]int64{min(r.wall[0], rec.WallNs), max(r.wall[1], rec.WallNs)}
		return true
	})
	return r
}

// reassemble adds a fragment to its frame and returns the frame once it is whole. Fragments come in order; one that does not
// follow is dropped, the edge sends the frame again.
func (s *Session) reassemble(epoch [16]byte, f *longshorepb.Fragment) ([]byte, error) {
	if f.GetTotal() > frame.MaxFrame || len(f.GetData()) == 0 || uint64(f.GetOffset())+uint64(len(f.GetData())) > uint64(f.GetTotal()) {
		return nil, fmt.Errorf("fragment at %d of a frame of %d bytes is impossible", f.GetOffset(), f.GetTotal())
	}
	s.in.Lock()
	defer s.in.Unlock()
	if s.ended {
		return nil, ErrClosed
	}
	n := slices.IndexFunc(s.parts, func(p *part) bool {
		return p.epoch == epoch && p.stream == f.GetStream() && p.first == f.GetFirst()
	})
	if f.GetOffset() == 0 {
		if n >= 0 {
			s.forget(n)
		} else if len(s.parts) == maxParts {
			s.forget(0)
		}
		n = len(s.parts)
		s.parts = append(s.parts, &part{epoch: epoch, stream: f.GetStream(), first: f.GetFirst(), total: f.GetTotal()})
	}
	if n < 0 || len(s.parts[n].data) != int(f.GetOffset()) || s.parts[n].total != f.GetTotal() {
		return nil, fmt.Errorf("fragment at %d of frame %d of %q does not follow the one before", f.GetOffset(), f.GetFirst(), f.GetStream())
	}
	if !s.intake.reserve(int64(len(f.GetData()))) {
		s.forget(n)
		return nil, ErrBusy
	}
	p := s.parts[n]
	p.data = append(p.data, f.GetData()...)
	if len(p.data) < int(p.total) {
		return nil, nil
	}
	s.forget(n)
	return p.data, nil
}

// forget drops a frame being reassembled. Callers hold in.
func (s *Session) forget(n int) {
	s.intake.reserve(-int64(len(s.parts[n].data)))
	s.parts = slices.Delete(s.parts, n, n+1)
}

// reserve counts n bytes as pending if they fit.
func (i *Intake) reserve(n int64) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if n > 0 && i.pending+n > i.cfg.PendingBytes {
		return false
	}
	i.pending += n
	return true
}

// Ack returns the acknowledgement to send now (at most 16 KiB serialized), nil if nothing is new: call it until then. full
// asks for the state of everything the session is about, also if nothing is new.
func (s *Session) Ack(full bool) *longshorepb.Ack {
	s.intake.mu.Lock()
	defer s.intake.mu.Unlock()
	if s.closed {
		return nil
	}
	if full {
		for id := range s.edge.accounts {
			s.dirty[id] = true
		}
	}
	ids := slices.SortedFunc(maps.Keys(s.dirty), func(a, b accountID) int {
		if c := bytes.Compare(a.epoch[:], b.epoch[:]); c != 0 {
			return c
		}
		return bytes.Compare([]byte(a.stream), []byte(b.stream))
	})
	ack, size := &longshorepb.Ack{}, 0
	for _, id := range ids {
		a := s.edge.accounts[id]
		if a == nil {
			delete(s.dirty, id)
			continue
		}
		sa := a.Ack(id.stream)
		if sa.GetWatermark() <= 1 && len(sa.GetAbove()) == 0 {
			delete(s.dirty, id)
			continue
		}
		last := len(ack.Epochs) - 1
		fresh := last < 0 || !bytes.Equal(ack.Epochs[last].GetEpoch(), id.epoch[:])
		if size += proto.Size(sa) + 32; size > maxAck {
			break
		}
		if fresh {
			ack.Epochs = append(ack.Epochs, &longshorepb.EpochAck{Epoch: bytes.Clone(id.epoch[:])})
			last++
		}
		ack.Epochs[last].Streams = append(ack.Epochs[last].Streams, sa)
		delete(s.dirty, id)
	}
	if len(ack.Epochs) == 0 {
		return nil
	}
	return ack
}

// Close ends the session. What it queued is still committed.
func (s *Session) Close() {
	s.in.Lock()
	s.ended = true
	for len(s.parts) > 0 {
		s.forget(0)
	}
	s.in.Unlock()
	i := s.intake
	i.mu.Lock()
	defer i.mu.Unlock()
	s.closed = true
	delete(s.edge.sessions, s)
	i.forgetIdle(s.edge)
}

// forgetIdle drops what is cached of an edge that is not connected and has nothing under way. Callers hold mu.
func (i *Intake) forgetIdle(e *edge) {
	if len(e.sessions) == 0 && e.queued == 0 && i.edges[e.name] == e {
		delete(i.edges, e.name)
	}
}
