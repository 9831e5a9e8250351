package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// Config of a Source.
type Config struct {
	// Kubeconfig is the path of a kubeconfig; empty for the account of the pod that the hub runs in.
	Kubeconfig string
	// HubName tells this hub from others in an Edge's status. It must differ between hubs that run at the same time.
	HubName string
	Logger  *slog.Logger
	// Cache is fed with what the cluster holds.
	Cache *mirror.Cache
}

const (
	// writers bounds how many edges are written about at the same time.
	writers = 8
	// probeEvery is how often the API server is asked whether it is there; probeLimit is how long it may take to answer.
	probeEvery = 5 * time.Second
	probeLimit = 5 * time.Second
)

// errRestored ends a generation of feeds: what they hold may be younger than the store.
var errRestored = errors.New("the store was restored to an earlier state")

// Source connects the mirror with one Kubernetes cluster. Its methods are safe for concurrent use.
type Source struct {
	cfg     Config
	log     *slog.Logger
	clients *clients

	edges    *edges
	models   *models
	nodes    *nodes
	pods     *pods
	named    *named
	work     *work
	leases   *leases
	problems *problems
	lists    flights[snapshot[*v1alpha1.Model]]

	// queue holds names of edges to reconcile.
	queue workqueue.TypedRateLimitingInterface[string]
	// generation is the set of feeds that run now; nil before the first.
	generation atomic.Pointer[generation]

	mu       sync.Mutex
	answered error // of the last probe; guarded by mu
}

// generation is one run of the feeds, from an empty cache on.
type generation struct {
	edges  *feed[*v1alpha1.Edge]
	models *feed[*v1alpha1.Model]
	nodes  *feed[*corev1.Node]
	pods   *feed[*corev1.Pod]
	// synced is closed when all of them hold the cluster's state.
	synced chan struct{}
	// restored ends the generation because the store went back in time.
	restored func()
}

// New reads the kubeconfig and returns a Source that does nothing before Run.
func New(cfg Config) (*Source, error) {
	if cfg.HubName == "" {
		return nil, errors.New("the hub has no name: give each hub one of its own")
	}
	c, err := connect(cfg.Kubeconfig)
	if err != nil {
		return nil, err
	}
	s := &Source{
		cfg: cfg, log: cfg.Logger, clients: c,
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](200*time.Millisecond, 30*time.Second),
			workqueue.TypedRateLimitingQueueConfig[string]{Name: "edges"}),
		answered: errors.New("the API server was not asked yet"),
	}
	s.named = newNamed(c.core, cfg.Cache, cfg.Logger, func() {
		if gen := s.generation.Load(); gen != nil {
			gen.restored()
		}
	})
	s.edges = &edges{source: s}
	s.models = &models{source: s, dirty: make(chan struct{}, 1)}
	s.nodes = &nodes{source: s}
	s.pods = &pods{source: s}
	s.work = newWork()
	s.leases = &leases{source: s}
	s.problems = newProblems(c.core, cfg.HubName, cfg.Logger)
	s.forget()
	return s, nil
}

func (s *Source) forget() {
	s.edges.reset()
	s.models.reset()
	s.nodes.reset()
	s.pods.reset()
	s.named.reset()
}

// Run feeds the cache and writes reports until ctx ends; it returns nil then. Without an API server it goes on trying. A
// Source runs once.
func (s *Source) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(clientLog{s.log.Handler(), ctx.Done()}))
	g.Go(func() error { return s.feed(ctx) })
	g.Go(func() error { return s.named.Run(ctx) })
	g.Go(func() error { return s.probe(ctx) })
	g.Go(func() error { return s.leases.Run(ctx) })
	g.Go(func() error { return s.models.Run(ctx) })
	g.Go(func() error { return s.problems.Run(ctx) })
	g.Go(func() error { return s.sweep(ctx) })
	for range writers {
		g.Go(func() error { return s.write(ctx) })
	}
	g.Go(func() error {
		<-ctx.Done()
		s.queue.ShutDown()
		return nil
	})
	return g.Wait()
}

// feed runs one generation of feeds after the other; there is a second one only if the store was restored.
func (s *Source) feed(ctx context.Context) error {
	for {
		err := s.feedOnce(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, errRestored) {
			return err
		}
		s.log.Warn("The cluster's store went back in time: dropping the cache and listing again")
		s.generation.Store(nil)
		s.cfg.Cache.Reset()
		s.forget()
	}
}

func (s *Source) feedOnce(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	restored := func() { cancel(errRestored) }
	core := s.clients.core.CoreV1().RESTClient()
	gen := &generation{
		edges:  newFeed(selection{client: s.clients.edge, resource: "edges"}, s.edges, restored),
		models: newFeed(selection{client: s.clients.edge, resource: "models"}, s.models, restored),
		nodes:  newFeed(selection{client: core, resource: "nodes", labels: labels.SelectorFromSet(labels.Set{nodeLabel: "true"})}, s.nodes, restored),
		pods:   newFeed(selection{client: core, resource: "pods", fields: fields.OneTermNotEqualSelector("spec.nodeName", "")}, s.pods, restored),
		synced: make(chan struct{}), restored: restored,
	}
	s.generation.Store(gen)
	var running sync.WaitGroup
	running.Go(func() { gen.edges.Run(ctx, &v1alpha1.Edge{}) })
	running.Go(func() { gen.models.Run(ctx, &v1alpha1.Model{}) })
	running.Go(func() { gen.nodes.Run(ctx, &corev1.Node{}) })
	err := s.sync(ctx, gen, &running)
	if err == nil {
		<-ctx.Done()
	}
	cancel(nil)
	running.Wait()
	return cmp.Or(context.Cause(ctx), err)
}

// sync brings the generation up in order: pods can only be judged when it is known which Nodes are edges.
func (s *Source) sync(ctx context.Context, gen *generation, running *sync.WaitGroup) error {
	if err := gen.edges.waitSynced(ctx); err != nil {
		return err
	}
	if err := gen.nodes.waitSynced(ctx); err != nil {
		return err
	}
	for _, name := range s.edges.names() {
		for err := s.judge(ctx, name); err != nil; err = s.judge(ctx, name) {
			s.log.Warn("Cannot tell whether a Node is an edge's, trying again", "edge", name, "error", err)
			if !pause(ctx, time.Second) {
				return ctx.Err()
			}
		}
	}
	running.Go(func() { gen.pods.Run(ctx, &corev1.Pod{}) })
	if err := gen.models.waitSynced(ctx); err != nil {
		return err
	}
	if err := gen.pods.waitSynced(ctx); err != nil {
		return err
	}
	s.cfg.Cache.Synced()
	close(gen.synced)
	s.log.Info("The cluster's state is mirrored", "edges", len(s.edges.all()))
	// Edges may have changed since they were judged, and Nodes may lack an Edge.
	for _, name := range s.edges.names() {
		s.queue.Add(name)
	}
	for _, name := range s.nodes.names() {
		s.queue.Add(name)
	}
	s.models.markAll()
	return nil
}

// current returns the generation of feeds if it is complete.
func (s *Source) current() (*generation, error) {
	gen := s.generation.Load()
	if gen == nil {
		return nil, errors.New("the cluster's state is not read yet")
	}
	select {
	case <-gen.synced:
		return gen, nil
	default:
		return nil, errors.New("the cluster's state is not read yet")
	}
}

// Ready says why the source is not ready: nil only while the cluster's state is mirrored and the API server answers.
func (s *Source) Ready() error {
	s.mu.Lock()
	answered := s.answered
	s.mu.Unlock()
	if answered != nil {
		return fmt.Errorf("kubernetes: %w", answered)
	}
	if _, err := s.current(); err != nil {
		return fmt.Errorf("kubernetes: %w", err)
	}
	return nil
}

// ClusterUID returns the UID of the kube-system namespace, which stands for the cluster's identity.
func (s *Source) ClusterUID(ctx context.Context) (string, error) {
	ns, err := s.clients.core.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("read the cluster's identity (the UID of namespace kube-system): %w", err)
	}
	return string(ns.UID), nil
}

// probe asks the store now and then where it is: a quiet watch does not tell that the API server is away, and one from a
// resourceVersion that a restored store has not reached yet stays quiet for ever. When the API server was away, everything is
// listed again, since the store may have been restored and have caught up meanwhile.
func (s *Source) probe(ctx context.Context) error {
	away := false
	for {
		gen := s.generation.Load()
		var before string
		if gen != nil {
			before = gen.edges.at()
		}
		limited, cancel := context.WithTimeout(ctx, probeLimit)
		at, err := s.position(limited)
		cancel()
		if err != nil {
			err = fmt.Errorf("the API server does not answer: %s", firstLine(err))
		}
		s.mu.Lock()
		s.answered = err
		s.mu.Unlock()
		switch {
		case err != nil:
			away = true
		case gen != nil && older(at, before):
			gen.restored()
		case gen != nil && away:
			gen.edges.relist()
			gen.models.relist()
			gen.nodes.relist()
			gen.pods.relist()
			s.named.relist()
		}
		if err == nil {
			away = false
		}
		if !pause(ctx, probeEvery) {
			return nil
		}
	}
}

// position returns the store's newest resourceVersion.
func (s *Source) position(ctx context.Context) (string, error) {
	var edges v1alpha1.EdgeList
	err := s.clients.edge.Get().Resource("edges").Param("limit", "1").Do(ctx).Into(&edges)
	return edges.ResourceVersion, err
}

// write takes edges from the queue and reconciles them.
func (s *Source) write(ctx context.Context) error {
	for {
		name, down := s.queue.Get()
		if down {
			return nil
		}
		again, err := s.reconcile(ctx, name)
		switch {
		case ctx.Err() != nil:
		case apierrors.IsConflict(err):
			// Somebody else wrote first: the watch brings it, and this edge back into the queue.
			s.log.Debug("Conflict, trying again", "edge", name, "error", err)
			s.queue.AddRateLimited(name)
		case err != nil:
			s.log.Warn("Cannot write what an edge reported, trying again", "edge", name, "error", err)
			s.queue.AddRateLimited(name)
		default:
			s.queue.Forget(name)
			if again > 0 {
				s.queue.AddAfter(name, again)
			}
		}
		s.queue.Done(name)
	}
}

// sweep looks at every Edge once a minute, for what time alone changes: a hub that is gone leaves its edges Online.
func (s *Source) sweep(ctx context.Context) error {
	for pause(ctx, time.Minute) {
		if s.Ready() != nil {
			continue
		}
		for _, e := range s.edges.all() {
			if e.Status.Link == linkOnline {
				s.queue.Add(e.Name)
			}
		}
	}
	return nil
}

// Report implements mirror.Upstream.
func (s *Source) Report(state mirror.EdgeState) {
	s.work.report(state)
	s.queue.Add(state.Edge)
}

// Problem implements mirror.Upstream: it makes an Event.
func (s *Source) Problem(ref mirror.ObjectRef, reason, message string) {
	s.problems.add(ref, reason, message)
}

// pause waits, and returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// clientLog is where client-go logs: what it calls an error is a warning here, since it tries again, and while the hub ends
// every request of its fails.
type clientLog struct {
	slog.Handler
	ended <-chan struct{}
}

func (l clientLog) Handle(ctx context.Context, r slog.Record) error {
	select {
	case <-l.ended:
		return nil
	default:
	}
	r.Level = min(r.Level, slog.LevelWarn)
	return l.Handler.Handle(ctx, r)
}

func (l clientLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return clientLog{l.Handler.WithAttrs(attrs), l.ended}
}

func (l clientLog) WithGroup(name string) slog.Handler {
	return clientLog{l.Handler.WithGroup(name), l.ended}
}
