package mirror

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

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
