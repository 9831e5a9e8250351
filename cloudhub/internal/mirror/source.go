package mirror

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// Cache is the hub's view of the cluster, fed by a source (kube informers or a folder). It marks the edges that a change
// concerns dirty and wakes their senders. Safe for concurrent use. Objects handed in are not changed and must not be changed later.
type Cache struct{}

// NewCache returns an empty cache.
func NewCache() *Cache { panic("TODO") }

// The Set methods add or replace one object; an object equal but for status costs nothing. The Delete methods forget one.
func (c *Cache) SetEdge(e *v1alpha1.Edge)                        { panic("TODO") }
func (c *Cache) DeleteEdge(name string)                          { panic("TODO") }
func (c *Cache) SetModel(m *v1alpha1.Model)                      { panic("TODO") }
func (c *Cache) DeleteModel(namespace, name string)              { panic("TODO") }
func (c *Cache) SetPod(p *corev1.Pod)                            { panic("TODO") }
func (c *Cache) DeletePod(namespace, name string, uid types.UID) { panic("TODO") }
func (c *Cache) SetConfigMap(m *corev1.ConfigMap)                { panic("TODO") }
func (c *Cache) SetSecret(s *corev1.Secret)                      { panic("TODO") }

// SetAbsent says that a named ConfigMap or Secret is not to be had, and why ("not found", "namespace not opted in").
func (c *Cache) SetAbsent(kind longshorepb.Kind, namespace, name, reason string) { panic("TODO") }

// Forget drops a ConfigMap or Secret that no pod names any more.
func (c *Cache) Forget(kind longshorepb.Kind, namespace, name string) { panic("TODO") }

// Batch runs f with all its changes becoming visible at once.
func (c *Cache) Batch(f func(*Cache)) { panic("TODO") }

// Synced says that the source's first state is complete: before it, no session is answered.
func (c *Cache) Synced() { panic("TODO") }

// Reset empties the cache and un-syncs it: the source lists again (after a restored store).
func (c *Cache) Reset() { panic("TODO") }

// Upstream is where what edges report goes; implemented by cloudhub/internal/kube and cloudhub/internal/manifest.
type Upstream interface {
	// Prove returns when Cache holds at least what the source held for this edge when Prove was called.
	Prove(ctx context.Context, edge string) error
	// Report hands on the merged state of one edge after a change. It must not block: the newest state per edge wins.
	Report(s EdgeState)
	// Problem tells of an object that cannot be mirrored (pod over the size limit): an Event in Kubernetes.
	Problem(ref ObjectRef, reason, message string)
}

// ObjectRef names an API object.
type ObjectRef struct {
	Kind            string // "Pod", "Model", "Edge"
	Namespace, Name string
	UID             types.UID
}

// EdgeState is everything a hub knows of one edge. It is a value; maps and messages in it are not changed after it was handed out.
type EdgeState struct {
	Edge string
	// Online: this hub holds the connection.
	Online bool
	// Superseded: another instance with the same identity took over from this connection.
	Superseded  bool
	Session     uint64
	Sequence    uint64
	Instance    string // hex
	LastContact time.Time
	// Synced: the edge reported the newest list as committed.
	Synced       bool
	AgentVersion string
	Node         *longshorepb.NodeReport
	// Complete: Pods and Models are a full account (since the session's first reports arrived).
	Complete bool
	Pods     map[types.UID]*longshorepb.PodReport
	// Models by "namespace/name".
	Models map[string]*longshorepb.ModelReport
}
