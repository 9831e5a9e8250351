package reconcile

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

const (
	// parallel bounds the pods that are being synced at the same time.
	parallel = 4
	// backoffMin and backoffMax bound the doubling, jittered pause after a failure.
	backoffMin = time.Second
	backoffMax = 5 * time.Minute
)

// Store gives the committed list; *desired.Store is one.
type Store interface {
	Current() (*desired.List, []desired.Object, error)
}

// Models serves models; *infer.Manager is one.
type Models interface {
	SetDesired(models []*longshorepb.Model)
	Reports() []*longshorepb.ModelReport
	Changed() <-chan struct{}
}

// Config of a Reconciler.
type Config struct {
	Logger  *slog.Logger
	Store   Store
	Models  Models
	Runtime Runtime
}

// Reconciler works on pods and models. Create it with New, then call Run once. Safe for concurrent use.
type Reconciler struct {
	cfg     Config
	wake    chan struct{} // 1 slot: the committed list may have changed
	changed chan struct{} // 1 slot: reports changed

	mu   sync.Mutex
	pods map[types.UID]*entry // guarded by mu; entries are changed by Run only
}

// entry is what Run knows of one pod.
type entry struct {
	digest []byte // of the pod
	key    string // of everything that goes into Sync
	pod    Pod
	// invalid says why the pod is not run at all, for people.
	invalid string
	// gone: no longer in the list.
	gone bool

	running  bool // a Sync or Remove is under way
	due      bool
	failures int
	retryAt  time.Time // zero: no retry planned

	report *longshorepb.PodReport // nil: nothing known yet
}

// outcome is what a worker brings back.
type outcome struct {
	uid     types.UID
	key     string
	removed bool
	result  Result
	err     error
}

// New returns a Reconciler. It starts nothing.
func New(cfg Config) *Reconciler {
	return &Reconciler{
		cfg: cfg, wake: make(chan struct{}, 1), changed: make(chan struct{}, 1), pods: map[types.UID]*entry{},
	}
}

// Wake tells that the committed list may have changed. It does not block.
func (r *Reconciler) Wake() { signal(r.wake) }

// Changed is a 1-slot signal: Pods or the models' reports changed, look again.
func (r *Reconciler) Changed() <-chan struct{} { return r.changed }

// Pods returns the reports of all pods about which something is known, sorted by namespace, name and UID.
func (r *Reconciler) Pods() []*longshorepb.PodReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*longshorepb.PodReport
	for _, e := range r.pods {
		if e.report != nil {
			out = append(out, e.report)
		}
	}
	slices.SortFunc(out, func(a, b *longshorepb.PodReport) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Uid, b.Uid))
	})
	return out
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run reconciles until ctx ends.
func (r *Reconciler) Run(ctx context.Context) error {
	var workers errgroup.Group
	defer func() { _ = workers.Wait() }() // workers return no errors
	done := make(chan outcome, parallel)
	var known desired.Digest
	var readFailures int
	timer := time.NewTimer(0)
	defer timer.Stop()
	look, running := true, 0
	for {
		var next time.Time
		if look {
			if err := r.read(ctx, &known); err != nil {
				readFailures++
				next = time.Now().Add(backoff(readFailures))
				r.cfg.Logger.Error("cannot read what this edge should hold; what runs goes on", "error", err)
			} else {
				look, readFailures = false, 0
			}
		}
		running += r.start(ctx, &workers, done, parallel-running)
		if n := r.nextRetry(); !n.IsZero() && (next.IsZero() || n.Before(next)) {
			next = n
		}
		timer.Stop()
		if !next.IsZero() {
			timer.Reset(time.Until(next))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
			look = true
		case <-r.cfg.Models.Changed():
			signal(r.changed)
		case uid := <-r.cfg.Runtime.Changed():
			r.mark(uid)
		case o := <-done:
			running--
			r.finish(o)
		case <-timer.C:
		}
	}
}

// read compares the committed list with what is known. A pod in neither the list nor the runtime costs nothing.
func (r *Reconciler) read(ctx context.Context, known *desired.Digest) error {
	list, objects, err := r.cfg.Store.Current()
	if err != nil {
		return fmt.Errorf("read the committed list: %w", err)
	}
	if list == nil || list.Digest == *known {
		return nil
	}
	held, err := r.cfg.Runtime.Known(ctx)
	if err != nil {
		return fmt.Errorf("ask the container runtime for its pods: %w", err)
	}
	d := decode(list, objects, r.cfg.Logger)
	r.mu.Lock()
	for uid, e := range d.pods {
		old := r.pods[uid]
		switch {
		case old == nil:
			e.due = true
			r.pods[uid] = e
		case old.key != e.key || old.gone:
			old.digest, old.key, old.pod, old.invalid, old.gone = e.digest, e.key, e.pod, e.invalid, false
			old.due, old.failures = true, 0
		}
	}
	for _, uid := range held {
		if r.pods[uid] == nil {
			r.pods[uid] = &entry{}
		}
	}
	for uid, e := range r.pods {
		if d.pods[uid] == nil && !e.gone {
			e.gone, e.due, e.failures = true, true, 0
		}
	}
	r.mu.Unlock()
	r.cfg.Models.SetDesired(d.models)
	*known = list.Digest
	signal(r.changed)
	return nil
}

// mark makes one pod due, if it is known.
func (r *Reconciler) mark(uid types.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.pods[uid]; e != nil {
		e.due = true
	}
}

// start starts work on pods that are due, room at most, and returns on how many.
func (r *Reconciler) start(ctx context.Context, workers *errgroup.Group, done chan<- outcome, room int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	now := time.Now()
	for uid, e := range r.pods {
		if e.running || !e.due && (e.retryAt.IsZero() || now.Before(e.retryAt)) {
			continue
		}
		if n == room {
			break
		}
		n++
		e.running, e.due, e.retryAt = true, false, time.Time{}
		pod, key, gone, invalid := e.pod, e.key, e.gone, e.invalid
		workers.Go(func() error {
			o := outcome{uid: uid, key: key}
			switch {
			case gone:
				o.err = r.cfg.Runtime.Remove(ctx, uid)
				o.removed = o.err == nil
			case invalid != "":
				o.result = rejected(pod, invalid)
			default:
				o.result, o.err = r.cfg.Runtime.Sync(ctx, pod)
			}
			done <- o
			return nil
		})
	}
	return n
}

func (r *Reconciler) nextRetry() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	var next time.Time
	for _, e := range r.pods {
		if !e.running && !e.retryAt.IsZero() && (next.IsZero() || e.retryAt.Before(next)) {
			next = e.retryAt
		}
	}
	return next
}

// finish notes what a worker brought back.
func (r *Reconciler) finish(o outcome) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.pods[o.uid]
	e.running = false
	if o.removed && e.gone {
		delete(r.pods, o.uid)
		signal(r.changed)
		return
	}
	if o.err != nil {
		e.failures++
		e.retryAt = time.Now().Add(backoff(e.failures))
		r.cfg.Logger.Warn("pod not reconciled; will try again", "pod", e.pod.name(), "uid", o.uid, "error", o.err, "failures", e.failures)
	} else {
		e.failures = 0
	}
	if o.result.Status.Phase == "" || e.key != o.key {
		return
	}
	report, err := newReport(e, o.result)
	if err != nil {
		r.cfg.Logger.Error("cannot encode a pod's status", "pod", e.pod.name(), "error", err)
		return
	}
	if !proto.Equal(e.report, report) {
		e.report = report
		signal(r.changed)
	}
}

func newReport(e *entry, res Result) (*longshorepb.PodReport, error) {
	if m := e.pod.Missing; len(m) > 0 {
		res.Status.Conditions = append(res.Status.Conditions, missingCondition(e.pod))
	}
	status, err := res.Status.Marshal()
	if err != nil {
		return nil, err
	}
	return &longshorepb.PodReport{
		Namespace: e.pod.Namespace, Name: e.pod.Name, Uid: string(e.pod.UID), Digest: bytes.Clone(e.digest),
		Status: status, Finished: res.Finished,
	}, nil
}

// rejected is the status of a pod that no runtime is asked to run.
func rejected(p Pod, why string) Result {
	return Result{
		Status:   corev1.PodStatus{Phase: corev1.PodFailed, Reason: "InvalidPod", Message: why},
		Finished: p.DeletionTimestamp != nil,
	}
}

// backoff is the pause after the nth failure in a row, jittered by a quarter.
func backoff(n int) time.Duration {
	d := min(backoffMin<<min(n-1, 20), backoffMax)
	return d - rand.N(d/4)
}
