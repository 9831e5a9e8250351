package kube

import (
	"context"
	"maps"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// edges is the sink of Edges. It keeps them: their labels and statuses are what Nodes and Model statuses come from.
type edges struct {
	source *Source
	mu     sync.Mutex
	byName map[string]*v1alpha1.Edge
}

func (e *edges) reset() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.byName = map[string]*v1alpha1.Edge{}
}

func (e *edges) get(name string) *v1alpha1.Edge {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.byName[name]
}

func (e *edges) all() []*v1alpha1.Edge {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Values(e.byName))
}

func (e *edges) names() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.byName))
}

func (e *edges) set(edge *v1alpha1.Edge) {
	e.mu.Lock()
	before := e.byName[edge.Name]
	e.byName[edge.Name] = edge
	e.mu.Unlock()
	e.source.cfg.Cache.SetEdge(edge)
	e.source.models.edgeChanged(before, edge)
	e.source.queue.Add(edge.Name)
}

func (e *edges) remove(_, name string, _ types.UID) {
	e.mu.Lock()
	before := e.byName[name]
	delete(e.byName, name)
	e.mu.Unlock()
	e.source.cfg.Cache.DeleteEdge(name)
	e.source.models.edgeChanged(before, nil)
	e.source.queue.Add(name)
}

func (e *edges) batch(f func()) { f() }

// nodes is the sink of the Nodes that hubs made.
type nodes struct {
	source *Source
	mu     sync.Mutex
	byName map[string]*corev1.Node
}

func (n *nodes) reset() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.byName = map[string]*corev1.Node{}
}

func (n *nodes) get(name string) *corev1.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.byName[name]
}

func (n *nodes) names() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Keys(n.byName))
}

func (n *nodes) set(node *corev1.Node) {
	node.Status.Images = nil
	n.mu.Lock()
	n.byName[node.Name] = node
	n.mu.Unlock()
	n.source.queue.Add(node.Name)
}

func (n *nodes) remove(_, name string, _ types.UID) {
	n.mu.Lock()
	delete(n.byName, name)
	n.mu.Unlock()
	n.source.queue.Add(name)
}

func (n *nodes) batch(f func()) { f() }

// pods is the sink of all pods that are bound to a Node. Those of edges go to the mirror; of the others only the identity is
// kept, for the day on which their Node becomes an edge's.
type pods struct {
	source *Source
	mu     sync.Mutex
	byUID  map[types.UID]*pod
	byNode map[string]map[types.UID]*pod
	// hosts says whether a Node is that of an edge with pods: true or false once judged.
	hosts map[string]bool
	// cache is the mirror's, or the view of it that a batch has; guarded by mu, which is always taken before the mirror's lock.
	cache *mirror.Cache
	// batching: set and remove are called from within batch. Only the feed's goroutine uses it.
	batching bool
}

// pod is what is kept of a pod. It is replaced, not changed.
type pod struct {
	namespace, name string
	uid             types.UID
	node            string
	// held: the mirror has it. What follows is set only then.
	held     bool
	version  string
	deleting bool
	status   []byte // PodStatus in protobuf
	refs     []mirror.Reference
}

func (p *pods) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.byUID = map[types.UID]*pod{}
	p.byNode = map[string]map[types.UID]*pod{}
	p.hosts = map[string]bool{}
	p.cache = p.source.cfg.Cache
}

// on returns the pods that the mirror holds for a Node.
func (p *pods) on(node string) []*pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*pod
	for _, one := range p.byNode[node] {
		if one.held {
			all = append(all, one)
		}
	}
	return all
}

// host returns whether a Node is that of an edge with pods, and whether that is known.
func (p *pods) host(node string) (is, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	is, known = p.hosts[node]
	return is, known
}

func (p *pods) set(o *corev1.Pod) {
	if !p.batching {
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	p.put(o)
}

// put is called with mu held.
func (p *pods) put(o *corev1.Pod) {
	before := p.byUID[o.UID]
	if before != nil && before.held && older(o.ResourceVersion, before.version) {
		return
	}
	next := &pod{namespace: o.Namespace, name: o.Name, uid: o.UID, node: o.Spec.NodeName, held: p.hosts[o.Spec.NodeName]}
	if next.held {
		next.version, next.deleting = o.ResourceVersion, o.DeletionTimestamp != nil
		next.refs = mirror.References(o)
		// Statuses from the API server always encode.
		next.status, _ = o.Status.Marshal()
	}
	p.byUID[o.UID] = next
	if p.byNode[next.node] == nil {
		p.byNode[next.node] = map[types.UID]*pod{}
	}
	p.byNode[next.node][o.UID] = next
	if next.held {
		p.source.named.name(next.refs)
		p.cache.SetPod(o)
		p.source.queue.Add(next.node)
	}
	if before != nil && before.held {
		p.source.named.unname(before.refs)
	}
}

func (p *pods) remove(_, _ string, uid types.UID) {
	if !p.batching {
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	before := p.byUID[uid]
	if before == nil {
		return
	}
	p.release(before)
	delete(p.byUID, uid)
	delete(p.byNode[before.node], uid)
	if len(p.byNode[before.node]) == 0 {
		delete(p.byNode, before.node)
	}
}

// release takes a pod from the mirror; mu is held.
func (p *pods) release(one *pod) {
	if one.held {
		p.cache.DeletePod(one.namespace, one.name, one.uid)
		p.source.named.unname(one.refs)
	}
}

func (p *pods) batch(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	whole := p.cache
	whole.Batch(func(inner *mirror.Cache) {
		p.cache, p.batching = inner, true
		f()
		p.cache, p.batching = whole, false
	})
}

// boundTo tells which pods are bound to a Node.
func (p *pods) boundTo(node string) func(identity) bool {
	return func(id identity) bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		one := p.byUID[id.uid]
		return one != nil && one.node == node
	}
}

// judged notes whether a Node is that of an edge with pods. If it becomes one, pods of it that were passed over are read; fetch
// lists them.
func (p *pods) judged(ctx context.Context, node string, is bool, fetch func(context.Context) ([]*corev1.Pod, error)) error {
	p.mu.Lock()
	p.hosts[node] = is
	missing := false
	for uid, one := range p.byNode[node] {
		switch {
		case is && !one.held:
			missing = true
		case !is && one.held:
			p.release(one)
			passedOver := &pod{namespace: one.namespace, name: one.name, uid: uid, node: node}
			p.byUID[uid], p.byNode[node][uid] = passedOver, passedOver
		}
	}
	p.mu.Unlock()
	if !missing {
		return nil
	}
	found, err := fetch(ctx)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range found {
		// A pod that the watch has removed meanwhile stays removed; one that it has brought since is newer.
		if one := p.byUID[o.UID]; one != nil && !one.held && p.hosts[node] {
			trim(o)
			p.put(o)
		}
	}
	return nil
}
