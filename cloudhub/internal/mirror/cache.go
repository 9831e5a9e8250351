package mirror

import (
	"errors"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// waitForNamed is how long an edge's list waits for a ConfigMap or Secret that a pod names and the source has said
// nothing about yet; then the list calls it absent.
const waitForNamed = 2 * time.Second

// maxProblems bounds the problems that wait to be told; more are dropped, since they stand in the list as well.
const maxProblems = 1024

// Cache is the hub's view of the cluster, fed by a source (kube informers or a folder). It marks the edges that a change
// concerns dirty and wakes their senders. Safe for concurrent use. Objects handed in are not changed and must not be
// changed later.
//
// Pods stay in an edge's list until they are deleted, also those that succeeded or failed: an edge remembers what it has
// finished, and a phase is status, which is not mirrored.
type Cache struct {
	s *state
	// locked is set inside Batch.
	locked bool
}

// state is what a Cache and its views share; mu guards all of it.
type state struct {
	mu     sync.Mutex
	synced bool

	edges  map[string]*v1alpha1.Edge
	pods   map[types.UID]*podEntry
	byEdge map[string]map[types.UID]*podEntry
	named  map[Reference]*namedEntry
	models map[string]*modelEntry // by namespace/name
	views  map[string]map[*View]struct{}

	problems      []problem
	hasProblems   chan struct{} // 1 slot: look again
	modelsChanged chan struct{} // 1 slot: look again
}

type podEntry struct {
	object desired.Packed // none if the pod cannot be mirrored
	edge   string
	refs   []Reference
}

// namedEntry is a ConfigMap or Secret that is there, or that some pod names, or both.
type namedEntry struct {
	pods map[types.UID]*podEntry
	// since is when the entry became unknown: neither there nor absent.
	since time.Time
	// absent says why it is not to be had; empty if unknown or there.
	absent string
	// object is a ConfigMap; of a Secret only the identity, under a key of this process alone.
	object  desired.Object
	present bool
	secret  *corev1.Secret
}

type modelEntry struct {
	object   desired.Object
	selector labels.Selector
	sources  []ModelSource
}

// ModelSource says where a model file comes from.
type ModelSource struct {
	Digest    string // "sha256:<hex>"
	SizeBytes int64
	URI       string
}

type problem struct {
	ref             ObjectRef
	reason, message string
}

// NewCache returns an empty cache.
func NewCache() *Cache {
	s := &state{
		views:         map[string]map[*View]struct{}{},
		hasProblems:   make(chan struct{}, 1),
		modelsChanged: make(chan struct{}, 1),
	}
	s.clear()
	return &Cache{s: s}
}

func (s *state) clear() {
	s.edges = map[string]*v1alpha1.Edge{}
	s.pods = map[types.UID]*podEntry{}
	s.byEdge = map[string]map[types.UID]*podEntry{}
	s.named = map[Reference]*namedEntry{}
	s.models = map[string]*modelEntry{}
}

func (c *Cache) lock() func() {
	if c.locked {
		return func() {}
	}
	c.s.mu.Lock()
	return c.s.mu.Unlock
}

// Batch runs f with all its changes becoming visible at once. f must use the Cache it is given, and nothing else of it
// may be called from there.
func (c *Cache) Batch(f func(*Cache)) {
	defer c.lock()()
	f(&Cache{s: c.s, locked: true})
}

// Synced says that the source's first state is complete: before it, no session is answered.
func (c *Cache) Synced() {
	defer c.lock()()
	if c.s.synced {
		return
	}
	now := time.Now()
	for _, n := range c.s.named {
		n.since = now
	}
	c.s.synced = true
	c.s.dirtyAll()
	wake(c.s.modelsChanged)
}

// Reset empties the cache and un-syncs it: the source lists again (after a restored store).
func (c *Cache) Reset() {
	defer c.lock()()
	c.s.clear()
	c.s.synced = false
	c.s.dirtyAll()
}

// SetEdge adds or replaces an Edge. A change of its labels, of its spec or of who holds its connection wakes its senders.
func (c *Cache) SetEdge(e *v1alpha1.Edge) {
	defer c.lock()()
	old := c.s.edges[e.Name]
	c.s.edges[e.Name] = e
	if old == nil || !labels.Equals(old.Labels, e.Labels) {
		c.s.dirty(e.Name)
	}
	if old != nil && (old.Spec != e.Spec || holder(old) != holder(e)) {
		c.s.wake(e.Name)
	}
}

// DeleteEdge forgets an Edge: its connections are closed.
func (c *Cache) DeleteEdge(name string) {
	defer c.lock()()
	delete(c.s.edges, name)
	c.s.dirty(name)
}

// SetModel adds or replaces a Model; one equal but for status costs nothing.
func (c *Cache) SetModel(m *v1alpha1.Model) {
	ref := ObjectRef{Kind: "Model", Namespace: m.Namespace, Name: m.Name, UID: m.UID}
	entry := &modelEntry{}
	var err error
	if entry.selector, err = metav1.LabelSelectorAsSelector(m.Spec.EdgeSelector); err != nil {
		c.problem(ref, "InvalidSelector", "spec.edgeSelector: "+err.Error())
		entry.selector = labels.Nothing()
	}
	if entry.object, err = desired.FromModel(modelMessage(m)); err != nil {
		c.problem(ref, problemReason(err), err.Error())
		c.DeleteModel(m.Namespace, m.Name)
		return
	}
	for _, v := range m.Spec.Variants {
		entry.sources = append(entry.sources, ModelSource{Digest: v.Digest, SizeBytes: v.SizeBytes, URI: v.Source.URI})
	}
	defer c.lock()()
	key := m.Namespace + "/" + m.Name
	old := c.s.models[key]
	if old != nil && old.object.Digest == entry.object.Digest && old.selector.String() == entry.selector.String() {
		return
	}
	c.s.models[key] = entry
	c.s.modelChanged(old, entry)
}

// DeleteModel forgets a Model.
func (c *Cache) DeleteModel(namespace, name string) {
	defer c.lock()()
	key := namespace + "/" + name
	if old := c.s.models[key]; old != nil {
		delete(c.s.models, key)
		c.s.modelChanged(old, nil)
	}
}

// modelChanged marks the connected edges dirty that the model was or is for.
func (s *state) modelChanged(old, entry *modelEntry) {
	for edge := range s.views {
		if s.selects(old, edge) || s.selects(entry, edge) {
			s.dirty(edge)
		}
	}
	wake(s.modelsChanged)
}

func (s *state) selects(m *modelEntry, edge string) bool {
	e := s.edges[edge]
	return m != nil && e != nil && m.selector.Matches(labels.Set(e.Labels))
}

// SetPod adds or replaces a pod; one equal but for status costs nothing. A pod without spec.nodeName is for no edge.
func (c *Cache) SetPod(p *corev1.Pod) {
	if p.Spec.NodeName == "" {
		c.DeletePod(p.Namespace, p.Name, p.UID)
		return
	}
	entry := &podEntry{edge: p.Spec.NodeName, refs: References(p)}
	object, err := desired.FromPod(p)
	defer c.lock()()
	if old := c.s.pods[p.UID]; old != nil {
		if err == nil && old.edge == entry.edge && old.object.Digest == object.Digest {
			return
		}
		c.s.dropPod(p.UID, old)
	}
	if err == nil {
		entry.object = object.Pack()
	} else {
		entry.refs = nil
		inner := &Cache{s: c.s, locked: true}
		inner.problem(ObjectRef{Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID}, problemReason(err), err.Error())
	}
	c.s.pods[p.UID] = entry
	if c.s.byEdge[entry.edge] == nil {
		c.s.byEdge[entry.edge] = map[types.UID]*podEntry{}
	}
	c.s.byEdge[entry.edge][p.UID] = entry
	for _, r := range entry.refs {
		c.s.namedEntry(r).pods[p.UID] = entry
	}
	c.s.dirty(entry.edge)
}

// DeletePod forgets the pod of that UID.
func (c *Cache) DeletePod(_, _ string, uid types.UID) {
	defer c.lock()()
	if old := c.s.pods[uid]; old != nil {
		c.s.dropPod(uid, old)
	}
}

func (s *state) dropPod(uid types.UID, p *podEntry) {
	delete(s.pods, uid)
	delete(s.byEdge[p.edge], uid)
	if len(s.byEdge[p.edge]) == 0 {
		delete(s.byEdge, p.edge)
	}
	for _, r := range p.refs {
		n := s.named[r]
		delete(n.pods, uid)
		s.collect(r, n)
	}
	s.dirty(p.edge)
}

// namedEntry returns the entry of r, a new one if need be.
func (s *state) namedEntry(r Reference) *namedEntry {
	n := s.named[r]
	if n == nil {
		n = &namedEntry{pods: map[types.UID]*podEntry{}, since: time.Now()}
		s.named[r] = n
	}
	return n
}

// collect drops an entry that holds nothing and that no pod names.
func (s *state) collect(r Reference, n *namedEntry) {
	if len(n.pods) == 0 && !n.present {
		delete(s.named, r)
	}
}

// SetConfigMap adds or replaces a ConfigMap.
func (c *Cache) SetConfigMap(m *corev1.ConfigMap) {
	object, err := desired.FromConfigMap(m)
	c.setNamed(Reference{longshorepb.Kind_KIND_CONFIG_MAP, m.Namespace, m.Name}, object, nil,
		ObjectRef{Kind: "ConfigMap", Namespace: m.Namespace, Name: m.Name, UID: m.UID}, err)
}

// SetSecret adds or replaces a Secret.
func (c *Cache) SetSecret(s *corev1.Secret) {
	// The identity under a constant key only tells whether it changed; it never leaves this process.
	object, err := desired.FromSecret(s, [32]byte{})
	c.setNamed(Reference{longshorepb.Kind_KIND_SECRET, s.Namespace, s.Name}, object, s,
		ObjectRef{Kind: "Secret", Namespace: s.Namespace, Name: s.Name, UID: s.UID}, err)
}

func (c *Cache) setNamed(r Reference, object desired.Object, secret *corev1.Secret, ref ObjectRef, err error) {
	if err != nil {
		c.SetAbsent(r.Kind, r.Namespace, r.Name, "cannot be mirrored: "+err.Error())
		c.problem(ref, problemReason(err), err.Error())
		return
	}
	if secret != nil {
		object.Body = nil
	}
	defer c.lock()()
	n := c.s.namedEntry(r)
	if n.present && n.object.Digest == object.Digest {
		return
	}
	n.present, n.absent, n.object, n.secret = true, "", object, secret
	c.s.namedChanged(n)
}

// SetAbsent says that a named ConfigMap or Secret is not to be had, and why ("not found", "namespace not opted in").
func (c *Cache) SetAbsent(kind longshorepb.Kind, namespace, name, reason string) {
	defer c.lock()()
	r := Reference{kind, namespace, name}
	n := c.s.namedEntry(r)
	if !n.present && n.absent == reason {
		return
	}
	n.present, n.absent, n.object, n.secret = false, reason, desired.Object{}, nil
	c.s.namedChanged(n)
	c.s.collect(r, n)
}

// Forget drops a ConfigMap or Secret that no pod names any more.
func (c *Cache) Forget(kind longshorepb.Kind, namespace, name string) {
	defer c.lock()()
	r := Reference{kind, namespace, name}
	n := c.s.named[r]
	if n == nil {
		return
	}
	n.present, n.absent, n.object, n.secret, n.since = false, "", desired.Object{}, nil, time.Now()
	c.s.namedChanged(n)
	c.s.collect(r, n)
}

func (s *state) namedChanged(n *namedEntry) {
	for _, p := range n.pods {
		s.dirty(p.edge)
	}
}

// dirty makes every view of an edge compute its list anew.
func (s *state) dirty(edge string) {
	for v := range s.views[edge] {
		v.dirty = true
		v.wake()
	}
}

func (s *state) wake(edge string) {
	for v := range s.views[edge] {
		v.wake()
	}
}

func (s *state) dirtyAll() {
	for edge := range s.views {
		s.dirty(edge)
	}
}

// problem queues a problem for the mirror to hand on.
func (c *Cache) problem(ref ObjectRef, reason, message string) {
	defer c.lock()()
	if len(c.s.problems) < maxProblems {
		c.s.problems = append(c.s.problems, problem{ref, reason, message})
	}
	wake(c.s.hasProblems)
}

func problemReason(err error) string {
	if errors.Is(err, desired.ErrTooLarge) {
		return "TooLarge"
	}
	return "NotMirrored"
}

func (c *Cache) takeProblems() []problem {
	defer c.lock()()
	p := c.s.problems
	c.s.problems = nil
	return p
}

// wake fills a 1-slot channel: look again.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
