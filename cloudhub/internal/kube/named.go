package kube

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"

	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const (
	// A namespace that is not opted in is asked about more often than one that is.
	askClosed = 10 * time.Second
	askOpen   = 30 * time.Second
	askFailed = 2 * time.Second

	notOptedIn = "namespace %s is not opted in: bind the ClusterRole longshore-objects there to the hub's account"
)

// named follows the ConfigMaps and Secrets that pods name, each with a watch of its own, and forgets those that none names any
// more. Whether the hub may read them is asked per namespace and kind; while it may not, they are absent.
type named struct {
	core  kubernetes.Interface
	cache *mirror.Cache
	log   *slog.Logger
	// How often a namespace is asked about.
	askClosed, askOpen time.Duration

	mu    sync.Mutex
	wants map[mirror.Reference]int // how many pods name it
	// Watches and gates that run; started and ended by Run alone, read under mu.
	watches map[mirror.Reference]*namedWatch
	gates   map[gateKey]*gate
	changed chan struct{} // 1 slot: look again
	moved   chan struct{} // closed and replaced when watches changed
	// epoch counts resets: watches of an earlier one are begun anew.
	epoch int
	// restored is called when a watch sees that the store's resourceVersion fell back.
	restored func()

	// Proofs of many edges ask for the same objects.
	configMaps flights[snapshot[*corev1.ConfigMap]]
	secrets    flights[snapshot[*corev1.Secret]]
}

// namedWatch follows one object: configMap or secret is set, as its kind is.
type namedWatch struct {
	epoch     int
	configMap *feed[*corev1.ConfigMap]
	secret    *feed[*corev1.Secret]
	gate      *gate
	stop      func()
}

func newNamed(core kubernetes.Interface, cache *mirror.Cache, log *slog.Logger, restored func()) *named {
	n := &named{
		core: core, cache: cache, log: log, askClosed: askClosed, askOpen: askOpen,
		watches: map[mirror.Reference]*namedWatch{}, gates: map[gateKey]*gate{},
		changed: make(chan struct{}, 1), moved: make(chan struct{}), restored: restored,
	}
	n.reset()
	return n
}

func (n *named) reset() {
	n.mu.Lock()
	n.wants = map[mirror.Reference]int{}
	n.epoch++
	n.mu.Unlock()
	signal(n.changed)
}

// name and unname count the pods that name objects.
func (n *named) name(refs []mirror.Reference) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range refs {
		if n.wants[r]++; n.wants[r] == 1 {
			signal(n.changed)
		}
	}
}

func (n *named) unname(refs []mirror.Reference) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range refs {
		if n.wants[r]--; n.wants[r] <= 0 {
			delete(n.wants, r)
			signal(n.changed)
		}
	}
}

// Run starts and ends watches as pods come and go, until ctx ends.
func (n *named) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		select {
		case <-n.changed:
		case <-ctx.Done():
			return nil
		}
		n.adjust(ctx, &running)
	}
}

func (n *named) adjust(ctx context.Context, running *sync.WaitGroup) {
	n.mu.Lock()
	var ended []mirror.Reference
	var stops []func()
	used := map[gateKey]bool{}
	for r := range n.wants {
		used[gateKey{r.Kind, r.Namespace}] = true
	}
	for r, w := range n.watches {
		if n.wants[r] == 0 || w.epoch != n.epoch {
			ended, stops = append(ended, r), append(stops, w.stop)
			delete(n.watches, r)
		}
	}
	for k, g := range n.gates {
		if !used[k] {
			delete(n.gates, k)
			stops = append(stops, g.stop)
		}
	}
	n.mu.Unlock()
	// Each waits until its goroutine has ended, so that nothing is set after it is forgotten.
	for _, stop := range stops {
		stop()
	}
	for _, r := range ended {
		n.cache.Forget(r.Kind, r.Namespace, r.Name)
	}

	n.mu.Lock()
	defer n.mu.Unlock()
	for r := range n.wants {
		k := gateKey{r.Kind, r.Namespace}
		if n.gates[k] == nil {
			n.gates[k] = newGate(ctx, n, k, running)
		}
		if n.watches[r] == nil {
			n.watches[r] = n.watch(ctx, r, n.gates[k], running)
		}
	}
	close(n.moved)
	n.moved = make(chan struct{})
}

// watch follows one object for as long as the gate is open; mu is held.
func (n *named) watch(ctx context.Context, r mirror.Reference, g *gate, running *sync.WaitGroup) *namedWatch {
	w := &namedWatch{epoch: n.epoch, gate: g}
	what := n.selection(r)
	var run func(context.Context)
	switch r.Kind {
	case longshorepb.Kind_KIND_CONFIG_MAP:
		w.configMap = newFeed(what, &namedSink[*corev1.ConfigMap]{cache: n.cache, ref: r, to: n.cache.SetConfigMap}, n.restored)
		run = func(ctx context.Context) { w.configMap.Run(ctx, &corev1.ConfigMap{}) }
	case longshorepb.Kind_KIND_SECRET:
		w.secret = newFeed(what, &namedSink[*corev1.Secret]{cache: n.cache, ref: r, to: n.cache.SetSecret}, n.restored)
		run = func(ctx context.Context) { w.secret.Run(ctx, &corev1.Secret{}) }
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	running.Go(func() {
		defer close(done)
		defer cancel()
		for ctx.Err() == nil {
			open, known, moved := g.read()
			if !open {
				if known {
					n.cache.SetAbsent(r.Kind, r.Namespace, r.Name, fmt.Sprintf(notOptedIn, r.Namespace))
				}
				select {
				case <-moved:
				case <-ctx.Done():
				}
				continue
			}
			// The watch ends when the gate moves, or with ctx.
			limited, end := context.WithCancel(ctx)
			stopped := make(chan struct{})
			go func() {
				defer close(stopped)
				defer end()
				select {
				case <-moved:
				case <-limited.Done():
				}
			}()
			run(limited)
			end()
			<-stopped
		}
	})
	w.stop = func() {
		cancel()
		<-done
	}
	return w
}

func (n *named) selection(r mirror.Reference) selection {
	resource := "configmaps"
	if r.Kind == longshorepb.Kind_KIND_SECRET {
		resource = "secrets"
	}
	return selection{
		client: n.core.CoreV1().RESTClient(), resource: resource, namespace: r.Namespace,
		fields: fields.OneTermEqualSelector(metav1.ObjectNameField, r.Name),
	}
}

// relist makes all watches begin anew with a list.
func (n *named) relist() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.watches {
		if w.secret != nil {
			w.secret.relist()
		} else {
			w.configMap.relist()
		}
	}
}

// find waits until Run follows an object, or no pod names it any more (nil).
func (n *named) find(ctx context.Context, r mirror.Reference) (*namedWatch, error) {
	for {
		n.mu.Lock()
		w, wanted, moved := n.watches[r], n.wants[r] > 0, n.moved
		n.mu.Unlock()
		if w != nil || !wanted {
			return w, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// namedSink hands one object to the mirror. Only its feed's goroutine uses it.
type namedSink[T object] struct {
	cache *mirror.Cache
	ref   mirror.Reference
	to    func(T)
	found bool
}

func (s *namedSink[T]) set(o T) {
	s.found = true
	s.to(o)
}

func (s *namedSink[T]) remove(string, string, types.UID) {
	s.found = false
	s.cache.SetAbsent(s.ref.Kind, s.ref.Namespace, s.ref.Name, "not found")
}

// batch is how a watch begins: with the object, or without.
func (s *namedSink[T]) batch(f func()) {
	s.found = false
	if f(); !s.found {
		s.remove("", "", "")
	}
}

// gateKey names what permission is asked for: one kind in one namespace.
type gateKey struct {
	kind      longshorepb.Kind
	namespace string
}

// gate knows whether the hub may read a kind of objects in a namespace. It asks now and then, as nobody tells.
type gate struct {
	stop func()

	mu    sync.Mutex
	known bool
	open  bool
	moved chan struct{} // closed and replaced on change
}

func newGate(ctx context.Context, n *named, key gateKey, running *sync.WaitGroup) *gate {
	g := &gate{moved: make(chan struct{})}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	g.stop = func() {
		cancel()
		<-done
	}
	running.Go(func() {
		defer close(done)
		for {
			next := n.askOpen
			open, err := n.allowed(ctx, key)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				n.log.Warn("Cannot ask whether a namespace is opted in, trying again", "namespace", key.namespace, "error", err)
				next = askFailed
			default:
				g.set(open)
				if !open {
					next = n.askClosed
				}
			}
			if !pause(ctx, wait.Jitter(next, 0.2)) {
				return
			}
		}
	})
	return g
}

func (g *gate) set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known && g.open == open {
		return
	}
	g.known, g.open = true, open
	close(g.moved)
	g.moved = make(chan struct{})
}

// read returns the state, and a channel that is closed when it is another one.
func (g *gate) read() (open, known bool, moved <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open, g.known, g.moved
}

// allowed asks the API server whether this hub's account may watch a kind in a namespace. An API server that has just started
// denies everything for a moment; edges must not lose their objects over that.
func (n *named) allowed(ctx context.Context, key gateKey) (bool, error) {
	allowed, err := n.review(ctx, key)
	if err != nil || allowed {
		return allowed, err
	}
	if err := n.core.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err != nil {
		return false, fmt.Errorf("the API server is not ready: %w", err)
	}
	return n.review(ctx, key)
}

func (n *named) review(ctx context.Context, key gateKey) (bool, error) {
	resource := "configmaps"
	if key.kind == longshorepb.Kind_KIND_SECRET {
		resource = "secrets"
	}
	review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: key.namespace, Verb: "watch", Resource: resource},
	}}
	answer, err := n.core.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	return answer.Status.Allowed, nil
}

// signal wakes the reader of a 1-slot channel.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
