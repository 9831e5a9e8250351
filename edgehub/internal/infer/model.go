package infer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// model reconciles one model. Its run goroutine decides; the others only tell it to look again.
type model struct {
	m               *Manager
	key             string
	namespace, name string
	running         bool // Manager.mu guards it
	count           counters
	queue           chan job
	wake            chan struct{}
	linkUp          chan struct{}

	mu      sync.Mutex // guards the fields below
	want    *want      // nil: nobody wants it any more
	serving *runner    // what answers requests, if its worker is ready
	live    *longshorepb.Model
	served  chan struct{} // closed and replaced when the serving worker changes
	report  *longshorepb.ModelReport
	needs   []string // digests
	known   bool     // needs is what this model needs

	// Only the run goroutine uses the fields below.
	candidate *runner // the desired version, beside the serving one
	fetching  *fetching
	without   map[string]string        // engines that workers found unusable, see Manager.choose
	gaveUp    *failed                  // the spec given up since the agent's start, if it is still wanted
	storeErr  error                    // of the last try to keep the record
	next      *longshorepb.ModelReport // what tell publishes
	ending    sync.WaitGroup           // runners on their way out
}

// counters of one model.
type counters struct {
	inferences, errors, restarts, drops atomic.Uint64
}

// answered counts an inference by the status of its answer.
func (c *counters) answered(status int) {
	if status/100 == 2 {
		c.inferences.Add(1)
	} else {
		c.errors.Add(1)
	}
}

func newModel(m *Manager, key string, spec *longshorepb.Model) *model {
	return &model{
		m: m, key: key, namespace: spec.GetNamespace(), name: spec.GetName(),
		queue: make(chan job, m.tune.queue), wake: make(chan struct{}, 1), linkUp: make(chan struct{}, 1),
		served: make(chan struct{}), without: map[string]string{},
	}
}

// setWant tells the spec to serve; nil ends the model.
func (s *model) setWant(w *want) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w != nil && s.want != nil && w.hash == s.want.hash {
		return
	}
	s.want = w
	if w != nil && (s.report == nil || s.report.DesiredVersion != w.spec.GetVersion()) {
		r := &longshorepb.ModelReport{
			Namespace: s.namespace, Name: s.name, DesiredVersion: w.spec.GetVersion(), State: longshorepb.ModelState_MODEL_STATE_PENDING,
		}
		if s.report != nil {
			r.ServingVersion, r.Engine = s.report.ServingVersion, s.report.Engine
		}
		s.report = r
	}
	signal(s.wake)
}

func (s *model) wanted() *want {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.want
}

func (s *model) currentReport() *longshorepb.ModelReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.want == nil {
		return nil
	}
	return proto.Clone(s.report).(*longshorepb.ModelReport)
}

func (s *model) currentNeeds() (digests []string, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.needs, s.known
}

func (s *model) metrics() ModelMetrics {
	s.mu.Lock()
	defer s.mu.Unlock()
	mm := ModelMetrics{
		Namespace: s.namespace, Name: s.name, Inferences: s.count.inferences.Load(), Errors: s.count.errors.Load(),
		Restarts: s.count.restarts.Load(), QueueDrops: s.count.drops.Load(), Queued: len(s.queue),
	}
	if s.serving != nil {
		if w := s.serving.state().worker; w != nil {
			mm.Ready, mm.WorkerMemory = true, w.resident.Load()
		}
	}
	return mm
}

// run reconciles until ctx ends or nobody wants the model any more, and waits for all it started.
func (s *model) run(ctx context.Context) {
	queueCtx, endQueue := context.WithCancel(ctx)
	var consumer sync.WaitGroup
	consumer.Go(func() { s.consume(queueCtx) })
	defer func() {
		endQueue()
		consumer.Wait()
		s.ending.Wait()
	}()
	resync := time.NewTicker(s.m.tune.resync)
	defer resync.Stop()
	for {
		want := s.wanted()
		if want == nil {
			s.clear()
			if s.m.forget(s) {
				return
			}
			continue
		}
		s.reconcile(ctx, want)
		s.tell()
		select {
		case <-ctx.Done():
			s.endAll(s.m.tune.drainShutdown)
			return
		case <-s.wake:
		case <-resync.C:
		}
	}
}

// clear ends everything of a model nobody wants.
func (s *model) clear() {
	s.endAll(s.m.tune.drain)
	s.ending.Wait()
	s.gaveUp, s.without, s.next = nil, map[string]string{}, nil
	s.m.durable.retain(func(key string) bool { return key != s.key })
	s.m.collect(func() {
		s.mu.Lock()
		s.live, s.needs, s.known = nil, nil, true
		s.mu.Unlock()
	})
	s.m.updateRoutes()
}

// endAll stops the download and the workers, all at once, and waits for the former.
func (s *model) endAll(grace time.Duration) {
	s.endFetch()
	s.endCandidate()
	s.mu.Lock()
	r := s.serving
	s.mu.Unlock()
	s.setServing(nil, nil)
	s.end(r, grace)
}

// end stops a runner in the background; run waits for it.
func (s *model) end(r *runner, grace time.Duration) {
	if r != nil {
		s.ending.Go(func() { r.stop(grace) })
	}
}

func (s *model) endCandidate() {
	s.end(s.candidate, 0)
	s.candidate = nil
}

func (s *model) endFetch() {
	if s.fetching != nil {
		s.fetching.stop()
		s.fetching = nil
	}
}

// setServing changes what answers requests, atomically.
func (s *model) setServing(r *runner, spec *longshorepb.Model) {
	s.mu.Lock()
	s.serving = r
	if spec != nil {
		s.live = spec
	}
	close(s.served)
	s.served = make(chan struct{})
	s.mu.Unlock()
	s.m.updateRoutes()
}

// look is called by runners when their state changed.
func (s *model) look() {
	s.mu.Lock()
	close(s.served)
	s.served = make(chan struct{})
	s.mu.Unlock()
	signal(s.wake)
}

// reconcile brings what is nearer to what should be. It ends when only time or an event can bring it further.
func (s *model) reconcile(ctx context.Context, want *want) {
	rec := s.m.durable.get(s.key)
	if s.gaveUp != nil && s.gaveUp.Hash != want.hash {
		s.gaveUp = nil // the spec changed since
	}
	if rec.Failed != nil && rec.Failed.Hash != want.hash {
		rec.Failed = nil
		s.keep(rec)
	}
	good, goodSpec, hasGood := rec.good(s.m.cfg.MemoryLimit)
	chosen, obstacle := s.m.choose(want.spec, s.without)
	s.setNeeds(chosen, obstacle, good, hasGood)

	// After a cold start the last good version comes first: it is here, and needs no link.
	if s.serving == nil && hasGood {
		if err := s.m.files.verify(ctx, good.digest, good.size); err == nil {
			s.setServing(s.m.startRunner(ctx, good, &s.count, s.look), goodSpec)
		} else if ctx.Err() == nil {
			s.m.log.Warn("file of the last good version is not usable", "model", s.key, "version", good.version, "error", err)
		}
	}
	if s.serving != nil {
		s.keepGood(want, chosen, obstacle, good, hasGood)
		rec = s.m.durable.get(s.key)
	}
	blocked := s.blocked(want, rec)
	switch {
	case obstacle != nil:
		s.endCandidate()
		s.endFetch()
		s.setReport(want, unit{}, obstacle, nil)
	case s.serving != nil && s.serving.u.id() == chosen.id():
		s.endCandidate()
		s.endFetch()
		s.attend(ctx, want, chosen, good, goodSpec, hasGood)
	case blocked != nil:
		s.endCandidate()
		s.endFetch()
		s.setReport(want, chosen, &failure{blocked.Reason, blocked.Message}, nil)
	default:
		s.advance(ctx, want, chosen)
	}
}

// setNeeds tells which files must stay.
func (s *model) setNeeds(chosen unit, obstacle *failure, good unit, hasGood bool) {
	var needs []string
	if obstacle == nil {
		needs = append(needs, chosen.digest)
	}
	if hasGood {
		needs = append(needs, good.digest)
	}
	if s.serving != nil {
		needs = append(needs, s.serving.u.digest)
	}
	s.m.collect(func() {
		s.mu.Lock()
		s.needs, s.known = needs, true
		s.mu.Unlock()
	})
}

// keepGood records what has served in good health as the last good version.
func (s *model) keepGood(want *want, chosen unit, obstacle *failure, good unit, hasGood bool) {
	if !s.serving.state().verified {
		return
	}
	spec := s.live
	if obstacle == nil && s.serving.u.id() == chosen.id() {
		spec = want.spec
	}
	rec := s.m.durable.get(s.key)
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec)
	if err != nil {
		s.m.log.Error("encode the last good version", "model", s.key, "error", err)
		return
	}
	if hasGood && good.id() == s.serving.u.id() && string(b) == string(rec.LastGood) {
		return
	}
	rec.LastGood, rec.Variant = b, s.serving.u.variant
	s.keep(rec)
}

// keep writes the record; when that fails it is tried again at the next resync.
func (s *model) keep(rec record) {
	if s.storeErr = s.m.durable.put(s.key, rec); s.storeErr != nil {
		s.m.log.Error("keep the state of a model", "model", s.key, "error", s.storeErr)
		return
	}
	signal(s.wake)
}

// blocked says why the wanted spec is left alone, nil if it is not: it was given up since the agent's start, or before, and
// then for a while only.
func (s *model) blocked(want *want, rec record) *failed {
	switch {
	case s.serving == nil: // any try is better than nothing
		return nil
	case s.gaveUp != nil:
		return s.gaveUp
	case rec.Failed != nil && rec.Failed.Hash == want.hash && time.Since(s.m.started) < s.m.tune.retryAfterRestart:
		return rec.Failed
	}
	return nil
}

// giveUp leaves the wanted spec alone from now on.
func (s *model) giveUp(want *want, u unit, f *failure, reason string) {
	message := fmt.Sprintf("version %s failed %d times in a row (%s); version %s serves", u.version, s.m.tune.failures, f, s.serving.u.version)
	s.m.log.Error("new version given up", "model", s.key, "version", u.version, "reason", reason, "error", message)
	rec := s.m.durable.get(s.key)
	s.gaveUp = &failed{Hash: want.hash, At: time.Now(), Reason: reason, Message: message}
	rec.Failed = s.gaveUp
	s.keep(rec)
}

// attend looks after the desired version once requests go to it.
func (s *model) attend(ctx context.Context, want *want, u unit, good unit, goodSpec *longshorepb.Model, hasGood bool) {
	s.mu.Lock()
	fresh := s.live != want.spec
	s.live = want.spec
	s.mu.Unlock()
	if fresh {
		s.m.updateRoutes()
	}
	st := s.serving.state()
	if st.failures >= s.m.tune.failures && !st.verified && hasGood && good.id() != u.id() {
		if err := s.m.files.verify(ctx, good.digest, good.size); err != nil {
			s.m.log.Error("no way back to the last good version", "model", s.key, "version", good.version, "error", err)
		} else {
			old := s.serving
			s.setServing(s.m.startRunner(ctx, good, &s.count, s.look), goodSpec)
			s.end(old, 0)
			s.giveUp(want, u, st.last, reasonRolledBack)
			return
		}
	}
	s.setReport(want, u, nil, s.serving)
}

// advance brings the desired version nearer to serving: download, load beside what serves, switch.
func (s *model) advance(ctx context.Context, want *want, u unit) {
	if s.candidate != nil && s.candidate.u.id() != u.id() {
		s.endCandidate()
	}
	if s.fetching != nil && s.fetching.u.digest != u.digest {
		s.endFetch()
	}
	if s.candidate == nil {
		if !s.obtain(ctx, want, u) {
			return
		}
		s.candidate = s.m.startRunner(ctx, u, &s.count, s.look)
		s.m.log.Info("loading model", "model", s.key, "version", u.version, "variant", u.variant)
	}
	st := s.candidate.state()
	switch {
	case st.worker != nil:
		s.takeOver(want)
		return
	case st.last != nil && st.last.reason == reasonNoEngine:
		s.without[u.digest+"|"+engineOf(want.spec, u)] = st.last.message
		s.endCandidate()
		signal(s.wake) // another variant may do
		return
	case st.failures >= s.m.tune.failures && s.serving != nil:
		s.endCandidate()
		s.giveUp(want, u, st.last, st.last.reason)
		return
	}
	s.setReport(want, u, nil, s.candidate)
}

// takeOver sends requests to the candidate; the old worker ends after those it has.
func (s *model) takeOver(want *want) {
	s.mu.Lock()
	old := s.serving
	s.mu.Unlock()
	next := s.candidate
	s.candidate = nil
	s.setServing(next, want.spec)
	s.end(old, s.m.tune.drain)
	s.m.log.Info("model serves", "model", s.key, "version", next.u.version, "variant", next.u.variant)
	signal(s.wake)
}

// engineOf is the engine a unit's variant requires, as the spec writes it.
func engineOf(spec *longshorepb.Model, u unit) string {
	for _, v := range spec.GetVariants() {
		if v.GetName() == u.variant {
			return v.GetRequires().GetEngine()
		}
	}
	return ""
}

// obtain reports whether the file is here; otherwise it sees to the download, and sets the report.
func (s *model) obtain(ctx context.Context, want *want, u unit) bool {
	err := s.m.files.verify(ctx, u.digest, u.size)
	if err == nil {
		s.endFetch()
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	if !errors.Is(err, errMissing) {
		var f *failure
		if !errors.As(diskFailure(err), &f) {
			f = &failure{reasonDisk, err.Error()}
		}
		s.setReport(want, u, f, nil)
		return false
	}
	if s.fetching == nil {
		s.fetching = s.startFetch(ctx, u)
	}
	s.setReport(want, u, s.fetching.failure(), nil)
	return false
}
