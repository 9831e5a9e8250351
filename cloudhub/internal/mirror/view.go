package mirror

import (
	"cmp"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// View is what one connection of one edge sees of the cache. It computes the edge's list only when asked after a change.
// Safe for concurrent use; the owner calls Close.
type View struct {
	s         *state
	edge      string
	secretKey [32]byte
	wake      func()

	// Guarded by s.mu.
	dirty bool
	list  *desired.List
}

// View returns a view of an edge whose credential is key. wake is called, with a lock held, whenever Snapshot may say
// something new: it must not block nor call the cache.
func (c *Cache) View(edge string, key []byte, wake func()) *View {
	v := &View{s: c.s, edge: edge, secretKey: desired.SecretKey(key), wake: wake, dirty: true}
	defer c.lock()()
	if c.s.views[edge] == nil {
		c.s.views[edge] = map[*View]struct{}{}
	}
	c.s.views[edge][v] = struct{}{}
	return v
}

// Close ends the view.
func (v *View) Close() {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	delete(v.s.views[v.edge], v)
	if len(v.s.views[v.edge]) == 0 {
		delete(v.s.views, v.edge)
	}
}

// Snapshot is what a view sees at one moment.
type Snapshot struct {
	// Synced: the cache is complete. Nothing else is set before.
	Synced bool
	// Known: the Edge exists.
	Known bool
	Plain bool
	// List is what the edge should hold; nil while a first list waits for objects.
	List *desired.List
	// Fresh: List holds every change up to now. Otherwise it waits for objects that a pod names, until RetryAt at the latest.
	Fresh   bool
	RetryAt time.Time
	// Holder says who holds the edge's connection according to the Edge's status.
	Holder Holder
}

// Holder of an edge's connection.
type Holder struct {
	Online        bool
	Hub, Instance string
	Session       int64
}

func holder(e *v1alpha1.Edge) Holder {
	return Holder{Online: e.Status.Link == "Online", Hub: e.Status.Hub, Instance: e.Status.Instance, Session: e.Status.Session}
}

// Snapshot returns what the view sees; it costs next to nothing if nothing changed.
func (v *View) Snapshot(now time.Time) Snapshot {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	if !v.s.synced {
		return Snapshot{}
	}
	snap := Snapshot{Synced: true, Fresh: true}
	if e := v.s.edges[v.edge]; e != nil {
		snap.Known, snap.Plain, snap.Holder = true, e.Spec.Plain, holder(e)
	}
	if v.dirty {
		list, retryAt := v.build(now)
		if retryAt.IsZero() {
			v.list, v.dirty = list, false
		} else {
			snap.Fresh, snap.RetryAt = false, retryAt
		}
	}
	snap.List = v.list
	return snap
}

// build computes the list; a non-zero time says that it still waits for named objects, and until when.
func (v *View) build(now time.Time) (*desired.List, time.Time) {
	var retryAt time.Time
	pods := v.s.byEdge[v.edge]
	entries := make([]*longshorepb.Entry, 0, len(pods)+4)
	seen := map[Reference]bool{}
	for _, p := range pods {
		if !p.object.Holds() {
			continue
		}
		entries = append(entries, p.object.Entry())
		for _, r := range p.refs {
			if seen[r] {
				continue
			}
			seen[r] = true
			n := v.s.named[r]
			if until := n.since.Add(waitForNamed); !n.present && n.absent == "" && now.Before(until) {
				if retryAt.IsZero() || until.Before(retryAt) {
					retryAt = until
				}
				continue
			}
			entries = append(entries, v.namedEntry(r, n))
		}
	}
	for _, m := range v.s.models {
		if v.s.selects(m, v.edge) {
			entries = append(entries, m.object.Entry())
		}
	}
	if !retryAt.IsZero() {
		return nil, retryAt
	}
	return desired.NewList(entries), time.Time{}
}

func (v *View) namedEntry(r Reference, n *namedEntry) *longshorepb.Entry {
	reason := cmp.Or(n.absent, "the hub has not found it yet")
	if n.present {
		o, err := v.open(n)
		if err == nil {
			return o.Entry()
		}
		reason = "cannot be mirrored: " + err.Error()
	}
	return desired.AbsentEntry(r.Kind, r.Namespace, r.Name, reason)
}

// open returns the object of an entry that is there, a Secret with its digest under this edge's key.
func (v *View) open(n *namedEntry) (desired.Object, error) {
	if n.secret != nil {
		return desired.FromSecret(n.secret, v.secretKey)
	}
	return n.object, nil
}

// Object implements desired.Objects: it finds only what the view's newest list names, so that an edge can read nothing
// else.
func (v *View) Object(d desired.Digest) (desired.Object, bool) {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	if v.list == nil || !v.s.synced {
		return desired.Object{}, false
	}
	i := slices.IndexFunc(v.list.Entries, func(e *longshorepb.Entry) bool { return string(e.Digest) == string(d[:]) })
	if i < 0 {
		return desired.Object{}, false
	}
	e := v.list.Entries[i]
	var o desired.Object
	switch e.Kind {
	case longshorepb.Kind_KIND_POD:
		if p := v.s.pods[types.UID(e.Uid)]; p != nil && p.edge == v.edge && p.object.Holds() {
			o = p.object.Open()
		}
	case longshorepb.Kind_KIND_MODEL:
		if m := v.s.models[e.Namespace+"/"+e.Name]; m != nil {
			o = m.object
		}
	default:
		if n := v.s.named[Reference{e.Kind, e.Namespace, e.Name}]; n != nil && n.present {
			o, _ = v.open(n)
		}
	}
	return o, o.Body != nil && o.Digest == d
}

// HasPod reports whether the pod of that UID is this edge's.
func (v *View) HasPod(uid types.UID) bool {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	p := v.s.pods[uid]
	return p != nil && p.edge == v.edge
}

// Edges returns every Edge, sorted by name.
func (c *Cache) Edges() []*v1alpha1.Edge {
	defer c.lock()()
	edges := make([]*v1alpha1.Edge, 0, len(c.s.edges))
	for _, e := range c.s.edges {
		edges = append(edges, e)
	}
	slices.SortFunc(edges, func(a, b *v1alpha1.Edge) int { return cmp.Compare(a.Name, b.Name) })
	return edges
}

// IsSynced reports whether the source's first state is complete.
func (c *Cache) IsSynced() bool {
	defer c.lock()()
	return c.s.synced
}

// ModelSources returns where the files of all Models come from, each once, sorted by digest and address.
func (c *Cache) ModelSources() []ModelSource {
	defer c.lock()()
	var all []ModelSource
	for _, m := range c.s.models {
		all = append(all, m.sources...)
	}
	slices.SortFunc(all, func(a, b ModelSource) int {
		return cmp.Or(cmp.Compare(a.Digest, b.Digest), cmp.Compare(a.URI, b.URI), cmp.Compare(a.SizeBytes, b.SizeBytes))
	})
	return slices.Compact(all)
}

// ModelsChanged is a 1-slot signal for one reader: ModelSources may say something new.
func (c *Cache) ModelsChanged() <-chan struct{} { return c.s.modelsChanged }

// MayRead reports whether an edge may read the model file of that digest: a Model that selects the edge names it.
func (c *Cache) MayRead(edge, digest string) bool {
	defer c.lock()()
	for _, m := range c.s.models {
		if c.s.selects(m, edge) && slices.ContainsFunc(m.sources, func(s ModelSource) bool { return s.Digest == digest }) {
			return true
		}
	}
	return false
}

// modelMessage is a Model as an edge sees it.
func modelMessage(m *v1alpha1.Model) *longshorepb.Model {
	out := &longshorepb.Model{Namespace: m.Namespace, Name: m.Name, Uid: string(m.UID), Version: m.Spec.Version}
	for _, v := range m.Spec.Variants {
		requires := &longshorepb.ModelRequirements{Arch: v.Requires.Arch, Engine: v.Requires.Engine}
		if v.Requires.Memory != nil {
			requires.MemoryBytes = uint64(max(0, v.Requires.Memory.Value()))
		}
		out.Variants = append(out.Variants, &longshorepb.ModelVariant{
			Name: v.Name, Format: v.Format, Precision: v.Precision, Digest: v.Digest,
			SizeBytes: uint64(max(0, v.SizeBytes)), Source: v.Source.URI, Requires: requires,
		})
	}
	for _, b := range m.Spec.Bindings {
		out.Bindings = append(out.Bindings, &longshorepb.ModelBinding{Input: b.Input, Output: b.Output, Stream: b.Stream})
	}
	return out
}
