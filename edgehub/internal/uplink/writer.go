package uplink

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/outbox"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// maxMessage bounds an MQTT message's payload, in bytes.
	maxMessage = 16 << 10
	// clockRoom is what a telemetry message's clock mapping may take of that.
	clockRoom = 128
	// maxSubscribes bounds SUBSCRIBE packets that wait for their SUBACK.
	maxSubscribes = 64
	// lookAgain is how often the writer looks for what nothing tells it about: node figures, lost batches.
	lookAgain = 5 * time.Second
)

// writer is one connection's outgoing side. One goroutine (run) sends; before each message it looks for the most urgent.
type writer struct {
	up       *Uplink
	conn     *mqttconn.Session
	reporter *reporter

	mu      sync.Mutex
	actions []desired.EdgeAction // guarded by mu: what one Poll of the replica gave, at most
	trusted bool                 // guarded by mu: a head of this session was believed
	wake    chan struct{}        // 1 slot: look again
	idle    chan struct{}        // 1 slot: actions are all taken

	flow *flow // guarded by up.mu

	earlier       reported // what was reported in earlier sessions
	asked         bool     // for acknowledgements
	reports       [][]byte // serialized, not sent yet
	live, backlog lane
	next          *longshorepb.Telemetry // of the backlog lane, read and not sent yet
	readAgain     time.Time              // no reading before
	limit         *rate.Limiter          // of the backlog lane; bytes
	subscribes    *semaphore.Weighted
}

// lane is one of the two ways telemetry goes up.
type lane struct {
	*outbox.Reader
	// more: the lane is in the midst of a frame's fragments. Such a frame may be larger than the window, and is
	// acknowledged only when it is complete.
	more bool
}

func newWriter(up *Uplink, conn *mqttconn.Session, session uint64) *writer {
	w := &writer{
		up: up, conn: conn, reporter: newReporter(session), flow: newFlow(), earlier: up.reported,
		wake: make(chan struct{}, 1), idle: make(chan struct{}, 1),
		limit: rate.NewLimiter(rate.Inf, 0), subscribes: semaphore.NewWeighted(maxSubscribes),
	}
	if r := up.cfg.BacklogRate; r > 0 {
		w.limit = rate.NewLimiter(rate.Limit(r), max(int(r), maxMessage))
	}
	w.rewind()
	return w
}

// rewind starts both lanes at what is not acknowledged.
func (w *writer) rewind() {
	live, backlog := w.up.cfg.Outbox.NewReaders()
	w.live, w.backlog, w.next = lane{Reader: live}, lane{Reader: backlog}, nil
}

// wantsActions reports whether all actions handed over with do are taken.
func (w *writer) wantsActions() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.actions) == 0
}

// do hands over a Publish or Subscribe of the replica.
func (w *writer) do(a desired.EdgeAction) {
	w.mu.Lock()
	w.actions = append(w.actions, a)
	w.mu.Unlock()
	w.poke()
}

// committed makes the next report name the list, without waiting for the reports' pause.
func (w *writer) committed(list desired.Digest) {
	w.reporter.setList(list)
	w.poke()
}

// trust says that the hub proved itself in this session: reports and telemetry may go to it, and its acknowledgements count.
// accountHeld: it holds what was reported in earlier sessions.
func (w *writer) trust(accountHeld bool) {
	if accountHeld {
		w.reporter.resume(w.earlier)
	}
	w.mu.Lock()
	w.trusted = true
	w.mu.Unlock()
	w.poke()
}

// told returns what the hub was told in this session and earlier ones, once run has ended. What is left of a full account does
// not count: until it is complete, a hub goes by the one before.
func (w *writer) told() reported {
	if w.reporter.pods == nil || len(w.reports) > 0 {
		return w.earlier
	}
	return w.reporter.reported
}

func (w *writer) isTrusted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.trusted
}

func (w *writer) poke() { signal(w.wake) }

// signal fills a 1-slot channel: look again.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run sends until ctx ends.
func (w *writer) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := w.hello(ctx, g); err != nil {
			return err
		}
		for {
			wait, err := w.step(ctx, g)
			if err != nil {
				return err
			}
			if wait > 0 {
				if err := w.sleep(ctx, wait); err != nil {
					return err
				}
			}
		}
	})
	return g.Wait()
}

// hello sends what the replica begins a session with, so that the hub knows the session before anything else comes.
func (w *writer) hello(ctx context.Context, g *errgroup.Group) error {
	sent := false
	for !sent {
		a := w.action()
		if a == nil {
			if err := w.sleep(ctx, lookAgain); err != nil {
				return err
			}
			continue
		}
		if p, ok := a.(desired.Publish); ok {
			t, err := topic.Parse(p.Topic)
			sent = err == nil && t.Kind == topic.Hello
		}
		if err := w.execute(ctx, g, a); err != nil {
			return err
		}
	}
	return nil
}

// sleep waits for something new to look at, wait at most.
func (w *writer) sleep(ctx context.Context, wait time.Duration) error {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.wake:
	case <-w.up.cfg.AccountChanged:
		w.reporter.changed()
	case <-w.up.cfg.Outbox.Appended():
	case <-t.C:
	}
	return nil
}

// step sends the most urgent message there is; reports and telemetry only to a hub that proved itself. If there is none it
// returns how long to wait for one at most.
func (w *writer) step(ctx context.Context, g *errgroup.Group) (wait time.Duration, err error) {
	if a := w.action(); a != nil {
		return 0, w.execute(ctx, g, a)
	}
	if !w.isTrusted() {
		return lookAgain, nil
	}
	select {
	case <-w.up.cfg.AccountChanged:
		w.reporter.changed()
	default:
	}
	now := time.Now()
	wait = lookAgain
	if len(w.reports) == 0 {
		var pause time.Duration
		if w.reports, pause, err = w.reporter.next(w.up.cfg.Account, now); err != nil {
			return 0, err
		}
		wait = min(wait, pause)
	}
	if len(w.reports) > 0 {
		err := w.publish(ctx, topic.Reported, w.reports[0])
		if err == nil {
			w.reports = w.reports[1:]
		}
		return 0, err
	}
	if !w.asked {
		w.asked = true
		return 0, w.subscribe(ctx, g, []string{topic.Topic{Kind: topic.Ack, Edge: w.up.cfg.Edge}.String()})
	}
	sent, pause, err := w.telemetry(ctx, now)
	if sent || err != nil {
		return 0, err
	}
	return min(wait, pause), nil
}

func (w *writer) action() desired.EdgeAction {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.actions) == 0 {
		return nil
	}
	a := w.actions[0]
	w.actions = w.actions[1:]
	if len(w.actions) == 0 {
		w.actions = nil
		signal(w.idle)
	}
	return a
}

// execute sends what the replica wants sent. A message goes out after every subscription asked for before it stands.
func (w *writer) execute(ctx context.Context, g *errgroup.Group, a desired.EdgeAction) error {
	switch a := a.(type) {
	case desired.Publish:
		if err := w.subscribes.Acquire(ctx, maxSubscribes); err != nil {
			return err
		}
		w.subscribes.Release(maxSubscribes)
		return w.conn.Publish(ctx, a.Topic, a.Payload)
	case desired.Subscribe:
		return w.subscribe(ctx, g, a.Topics)
	}
	return nil
}

// subscribe does not wait for the SUBACK, so that requests follow each other without a round trip between them.
func (w *writer) subscribe(ctx context.Context, g *errgroup.Group, topics []string) error {
	if err := w.subscribes.Acquire(ctx, 1); err != nil {
		return err
	}
	g.Go(func() error {
		defer w.subscribes.Release(1)
		if err := w.conn.Subscribe(ctx, topics...); err != nil {
			return fmt.Errorf("subscribe: %w", err)
		}
		return nil
	})
	return nil
}

func (w *writer) publish(ctx context.Context, kind topic.Kind, payload []byte) error {
	return w.conn.Publish(ctx, topic.Topic{Kind: kind, Edge: w.up.cfg.Edge}.String(), payload)
}

// telemetry sends one batch, live ones first, if the window of bytes not acknowledged and the backlog's rate allow it.
func (w *writer) telemetry(ctx context.Context, now time.Time) (sent bool, wait time.Duration, err error) {
	w.up.mu.Lock()
	if w.flow.lost(now) {
		w.flow.rewind()
		w.rewind()
	}
	size, live, backlog := w.flow.allows()
	w.up.mu.Unlock()
	live, backlog = live || w.live.more, backlog || w.backlog.more

	if live {
		if t := w.read(&w.live, size, now); t != nil {
			return true, 0, w.send(ctx, t)
		}
	}
	if backlog && w.next == nil {
		w.next = w.read(&w.backlog, size, now)
	}
	if !backlog || w.next == nil {
		return false, lookAgain, nil
	}
	r := w.limit.ReserveN(now, proto.Size(w.next))
	if d := r.DelayFrom(now); d > 0 {
		r.CancelAt(now)
		return false, d, nil
	}
	t := w.next
	w.next = nil
	return true, 0, w.send(ctx, t)
}

// read returns a lane's next message, nil if there is none. An outbox that cannot be read is left alone for a while; it
// keeps neither specs nor reports from flowing.
func (w *writer) read(l *lane, size int, now time.Time) *longshorepb.Telemetry {
	if now.Before(w.readAgain) {
		return nil
	}
	t, err := l.Next(size - clockRoom)
	if err != nil {
		w.readAgain = now.Add(lookAgain)
		w.up.cfg.Logger.Error("cannot read telemetry that waits; will try again", "error", err)
		return nil
	}
	if f := t.GetFragment(); f != nil {
		l.more = int(f.GetOffset())+len(f.GetData()) < int(f.GetTotal())
	} else if len(t.GetLedger()) == 0 { // entries of the ledger come between fragments, too
		l.more = false
	}
	return t
}

func (w *writer) send(ctx context.Context, t *longshorepb.Telemetry) error {
	b := describe(t)
	t.Clocks = w.up.clocks.of(b.boots)
	payload, err := proto.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode telemetry: %w", err)
	}
	b.bytes = len(payload)
	w.up.mu.Lock()
	w.flow.sent(b, time.Now())
	w.up.mu.Unlock()
	return w.publish(ctx, topic.Telemetry, payload)
}
