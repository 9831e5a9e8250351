package kube

import (
	"context"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
)

const (
	leaseDuration = 40 * time.Second
	// renewEvery is jittered by a fifth up. Two that fail leave the Node alive.
	renewEvery = 15 * time.Second
	// renewers bounds how many Leases are renewed at the same time.
	renewers = 8
)

// leases renews the Leases of the edges with pods whose link this hub holds: that is what keeps their Nodes alive.
type leases struct {
	source *Source

	mu    sync.Mutex
	next  map[string]time.Time             // when an edge's Lease is due; no entry: at once
	known map[string]*coordinationv1.Lease // as last written
}

// due makes the first renewal of an edge that has just come online immediate.
func (l *leases) due(edge string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next == nil {
		l.next, l.known = map[string]time.Time{}, map[string]*coordinationv1.Lease{}
	}
	if _, ok := l.next[edge]; !ok {
		l.next[edge] = time.Now()
	}
}

// Run renews Leases until ctx ends.
func (l *leases) Run(ctx context.Context) error {
	edges := make(chan string)
	var running sync.WaitGroup
	defer running.Wait()
	defer close(edges)
	for range renewers {
		running.Go(func() {
			for edge := range edges {
				l.renew(ctx, edge)
			}
		})
	}
	for pause(ctx, time.Second) {
		for _, edge := range l.take(time.Now()) {
			select {
			case edges <- edge:
			case <-ctx.Done():
				return nil
			}
		}
	}
	return nil
}

// take returns the edges whose Leases are due and sets the next time. Those not online here are forgotten, except for a moment, so
// that one whose link flaps goes on as before.
func (l *leases) take(now time.Time) []string {
	links := l.source.work.held(now)
	l.mu.Lock()
	defer l.mu.Unlock()
	var due []string
	for edge, at := range l.next {
		online, held := links[edge]
		switch {
		case !held:
			delete(l.next, edge)
			delete(l.known, edge)
		case online && !at.After(now):
			due = append(due, edge)
			l.next[edge] = now.Add(wait.Jitter(renewEvery, 0.2))
		}
	}
	return due
}

func (l *leases) renew(ctx context.Context, edge string) {
	node := l.source.nodes.get(edge)
	if node == nil {
		return
	}
	l.mu.Lock()
	lease := l.known[edge]
	l.mu.Unlock()
	written, err := l.write(ctx, node, lease)
	switch {
	case ctx.Err() != nil:
		return
	case apierrors.IsConflict(err):
		written = nil // read it anew the next time
	case err != nil:
		l.source.log.Warn("Cannot renew the Lease of an edge, trying again", "edge", edge, "error", err)
		written = nil
	}
	if written != nil {
		trim(written)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, online := l.next[edge]; !online {
		return
	}
	if l.known[edge] = written; written == nil {
		l.next[edge] = time.Now().Add(time.Second)
	}
}

func (l *leases) write(ctx context.Context, node *corev1.Node, lease *coordinationv1.Lease) (*coordinationv1.Lease, error) {
	api := l.source.clients.leases.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	now := metav1.NowMicro()
	if lease == nil {
		found, err := api.Get(ctx, node.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			seconds := int32(leaseDuration / time.Second)
			return api.Create(ctx, &coordinationv1.Lease{
				ObjectMeta: metav1.ObjectMeta{Name: node.Name, OwnerReferences: []metav1.OwnerReference{{
					APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID,
				}}},
				Spec: coordinationv1.LeaseSpec{HolderIdentity: &node.Name, LeaseDurationSeconds: &seconds, RenewTime: &now},
			}, metav1.CreateOptions{})
		}
		if err != nil {
			return nil, err
		}
		lease = found
	}
	renewed := lease.DeepCopy()
	renewed.Spec.RenewTime = &now
	return api.Update(ctx, renewed, metav1.UpdateOptions{})
}
