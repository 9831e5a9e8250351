package infer

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// runner keeps one unit served: it starts a worker, watches it, and starts another with backoff when it fails.
type runner struct {
	m      *Manager
	u      unit
	count  *counters
	notify func() // state changed; must not block

	cancel context.CancelFunc
	done   chan struct{}

	mu sync.Mutex // guards the fields below
	runnerState
	grace time.Duration // for requests under way when it is stopped
}

// runnerState is what a model decides on.
type runnerState struct {
	worker   *worker // ready; nil otherwise
	failures int     // in a row
	last     *failure
	verified bool // served in good health for the probation once
}

func (m *Manager) startRunner(ctx context.Context, u unit, count *counters, notify func()) *runner {
	ctx, cancel := context.WithCancel(ctx)
	r := &runner{m: m, u: u, count: count, notify: notify, cancel: cancel, done: make(chan struct{}), grace: m.tune.drainShutdown}
	go func() {
		defer close(r.done)
		r.run(ctx)
	}()
	return r
}

// stop ends the worker after the requests under way, for at most grace, and returns when it is gone.
func (r *runner) stop(grace time.Duration) {
	r.mu.Lock()
	r.grace = grace
	r.mu.Unlock()
	r.cancel()
	<-r.done
}

func (r *runner) state() runnerState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.runnerState
}

func (r *runner) update(f func(*runnerState)) {
	r.mu.Lock()
	f(&r.runnerState)
	r.mu.Unlock()
	r.notify()
}

func (r *runner) run(ctx context.Context) {
	for {
		f := r.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		failures := 0
		r.update(func(s *runnerState) {
			s.failures++
			s.last = f
			failures = s.failures
		})
		r.count.restarts.Add(1)
		wait := backoff(r.m.tune.backoffMin, r.m.tune.backoffMax, failures)
		r.m.log.Warn("worker failed", "model", r.u.namespace+"/"+r.u.name, "version", r.u.version,
			"reason", f.reason, "error", f.message, "failures", failures, "retryIn", wait)
		if !pause(ctx, wait) {
			return
		}
	}
}

// verdict of a probe.
type verdict struct{ err error }

// serve runs one worker to its end. It returns why it ended; nil if ctx did.
func (r *runner) serve(ctx context.Context) *failure {
	t := &r.m.tune
	w, err := r.m.startWorker(r.u, r.count)
	if err != nil {
		return &failure{reasonLoadFailed, err.Error()}
	}
	grace := time.Duration(0) // a worker that failed gets none
	defer func() { w.stop(grace) }()
	memory := time.NewTicker(t.memoryEvery)
	defer memory.Stop()
	load := time.NewTimer(t.loadTimeout)
	defer load.Stop()
	probe := time.NewTicker(t.probeEvery)
	defer probe.Stop()
	probation := time.NewTimer(0)
	probation.Stop()
	defer probation.Stop()
	ready := w.ready
	serving := false
	defer r.update(func(s *runnerState) { s.worker = nil })
	// Probes run beside the watch over memory.
	verdicts := make(chan verdict, 1)
	probing, missed := false, 0
	probeCtx, endProbe := context.WithCancel(ctx)
	defer func() {
		endProbe()
		if probing {
			<-verdicts
		}
	}()
	for {
		select {
		case <-ctx.Done():
			r.drain(w)
			grace = t.term
			return nil
		case <-w.exited:
			return w.ended()
		case <-w.hung:
			return &failure{reasonHung, fmt.Sprintf("an inference took longer than %v", t.inferTimeout)}
		case <-memory.C:
			if n := w.measure(); n > r.u.memory {
				return &failure{reasonOutOfMemory, fmt.Sprintf("the worker took %d bytes of memory, its limit is %d", n, r.u.memory)}
			}
		case <-load.C:
			return &failure{reasonHung, fmt.Sprintf("the worker was not ready after %v", t.loadTimeout)}
		case <-ready:
			ready = nil
			probing = true
			go func() { verdicts <- verdict{r.warm(probeCtx, w)} }()
		case <-probe.C:
			if serving && !probing {
				probing = true
				go func() { verdicts <- verdict{r.alive(probeCtx, w)} }()
			}
		case v := <-verdicts:
			probing = false
			switch {
			case v.err == nil && !serving:
				serving = true
				load.Stop()
				probation.Reset(t.probation)
				w.log.Info("worker ready", "pid", w.pid, "engine", w.engine)
				r.update(func(s *runnerState) { s.worker = w })
			case v.err == nil:
				missed = 0
			case !serving:
				return &failure{reasonLoadFailed, v.err.Error()}
			default:
				if missed++; missed >= t.probeFailures {
					return &failure{reasonHung, v.err.Error()}
				}
			}
		case <-probation.C:
			r.update(func(s *runnerState) { s.failures, s.last, s.verified = 0, nil, true })
		}
	}
}

// drain waits for the requests under way.
func (r *runner) drain(w *worker) {
	r.mu.Lock()
	r.worker = nil
	grace := r.grace
	r.mu.Unlock()
	w.retire()
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-w.idle:
	case <-w.exited:
	case <-timer.C:
		w.log.Warn("worker ends with requests under way")
	}
}

// warm checks what a worker claims when it says it is ready, and learns the model's inputs and outputs.
func (r *runner) warm(ctx context.Context, w *worker) error {
	ctx, cancel := context.WithTimeout(ctx, r.m.tune.probeTimeout)
	defer cancel()
	path := "/v2/models/" + w.unit.name
	if _, err := w.get(ctx, path+"/ready"); err != nil {
		return fmt.Errorf("the worker said it is ready, but: %w", err)
	}
	body, err := w.get(ctx, path)
	if err != nil {
		return fmt.Errorf("read the model's metadata: %w", err)
	}
	if err := json.Unmarshal(body, &w.meta); err != nil {
		return fmt.Errorf("read the model's metadata: %w", err)
	}
	return nil
}

func (r *runner) alive(ctx context.Context, w *worker) error {
	ctx, cancel := context.WithTimeout(ctx, r.m.tune.probeTimeout)
	defer cancel()
	if _, err := w.get(ctx, "/v2/health/live"); err != nil {
		return fmt.Errorf("health probe: %w", err)
	}
	return nil
}

// backoff doubles from lo to hi with the number of tries that failed, with a quarter of jitter.
func backoff(lo, hi time.Duration, failures int) time.Duration {
	d := min(lo<<min(max(failures-1, 0), 20), hi)
	return d + time.Duration(rand.Int64N(int64(d)/4+1))
}

// pause waits; it reports false if ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
