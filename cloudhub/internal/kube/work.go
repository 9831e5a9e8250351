package kube

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// work holds the newest report of each edge. The queue holds the names.
type work struct {
	mu     sync.Mutex
	byEdge map[string]*edgeWork
}

// edgeWork is what is to be written about one edge, and what was.
type edgeWork struct {
	// state and mine are guarded by work.mu.
	state *mirror.EdgeState // nil: this hub has not heard from the edge
	// mine: the Edge's status names this hub and the state's session.
	mine bool

	// The rest is the reconciler's alone: the queue never gives out one name twice.

	// edge is what this hub wrote last; the watch may be behind it.
	edge    *v1alpha1.Edge
	wroteAt time.Time
	// pods are the resourceVersions this hub wrote; the watch may be behind them.
	pods map[types.UID]string
}

func newWork() *work { return &work{byEdge: map[string]*edgeWork{}} }

func (w *work) of(edge string) *edgeWork {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.entry(edge)
}

func (w *work) entry(edge string) *edgeWork {
	e := w.byEdge[edge]
	if e == nil {
		e = &edgeWork{pods: map[types.UID]string{}}
		w.byEdge[edge] = e
	}
	return e
}

func (w *work) report(s mirror.EdgeState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.entry(s.Edge).state = &s
}

// forget drops an edge that is gone. A report of one that is connected stays: the watch may be behind the enrolment.
func (w *work) forget(edge string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e := w.byEdge[edge]; e != nil && (e.state == nil || !e.state.Online) {
		delete(w.byEdge, edge)
	}
}

func (w *work) state(e *edgeWork) *mirror.EdgeState {
	w.mu.Lock()
	defer w.mu.Unlock()
	return e.state
}

func (w *work) setMine(e *edgeWork, mine bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e.mine = mine
}

// held returns the edges whose link this hub holds (true), or held until a moment ago (false).
func (w *work) held(now time.Time) map[string]bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	links := map[string]bool{}
	for name, e := range w.byEdge {
		if e.mine && e.state != nil && (e.state.Online || now.Sub(e.state.LastContact) < flapAfter) {
			links[name] = e.state.Online
		}
	}
	return links
}

// reconcile writes what differs between what an edge reported and what Kubernetes holds. It returns after what time to look
// again even if nothing happens; 0 for never.
func (s *Source) reconcile(ctx context.Context, name string) (time.Duration, error) {
	if _, err := s.current(); err != nil {
		return time.Second, nil
	}
	edge := s.edges.get(name)
	if edge == nil {
		return 0, s.abandon(ctx, name)
	}
	if err := s.judge(ctx, name); err != nil {
		return 0, err
	}
	host, _ := s.pods.host(name)
	w := s.work.of(name)
	state := s.work.state(w)
	mine, again, err := s.writeEdge(ctx, edge, w, state, edge.Spec.Pods && !host)
	s.work.setMine(w, mine)
	if err != nil {
		return 0, fmt.Errorf("write the Edge's status: %w", err)
	}
	if !edge.Spec.Pods {
		return again, s.deleteNode(ctx, name)
	}
	if !host {
		return again, nil
	}
	onlineHere := mine && state != nil && state.Online
	soon, err := s.writeNode(ctx, edge, state, mine)
	if err != nil {
		return 0, fmt.Errorf("write the Node: %w", err)
	}
	if onlineHere {
		s.leases.due(name)
		if state.Complete {
			if err := s.writePods(ctx, w, state); err != nil {
				return 0, err
			}
		}
	}
	return sooner(again, soon), nil
}

func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// abandon removes the Node of an Edge that is gone. The cache may be behind, so the store is asked.
func (s *Source) abandon(ctx context.Context, name string) error {
	if s.nodes.get(name) == nil {
		s.work.forget(name)
		return s.pods.judged(ctx, name, false, nil)
	}
	err := s.clients.edge.Get().Resource("edges").Name(name).Do(ctx).Error()
	if err == nil {
		return nil // the watch brings it
	}
	if !apierrors.IsNotFound(err) {
		return err
	}
	s.work.forget(name)
	if err := s.pods.judged(ctx, name, false, nil); err != nil {
		return err
	}
	return s.deleteNode(ctx, name)
}

// judge finds out whether the Node of an Edge's name is the Edge's: there is none yet, or it is one that a hub made. A Node
// that somebody else made is left alone, and its pods are none of the edge's business.
func (s *Source) judge(ctx context.Context, name string) error {
	edge := s.edges.get(name)
	is, known := s.pods.host(name)
	wanted := edge != nil && edge.Spec.Pods
	if wanted && (!known || !is) && s.nodes.get(name) == nil {
		node, err := s.clients.core.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("look for a Node of the edge's name: %w", err)
		}
		wanted = apierrors.IsNotFound(err) || node.Labels[nodeLabel] == "true"
	}
	return s.pods.judged(ctx, name, wanted, func(ctx context.Context) ([]*corev1.Pod, error) {
		snap, err := list[*corev1.Pod](ctx, selection{
			client: s.clients.core.CoreV1().RESTClient(), resource: "pods", fields: fields.OneTermEqualSelector("spec.nodeName", name),
		})
		return snap.objects, err
	})
}

// writeEdge brings an Edge's status up to date. mine says that the status names this hub and this session.
func (s *Source) writeEdge(ctx context.Context, edge *v1alpha1.Edge, w *edgeWork, state *mirror.EdgeState, conflict bool) (mine bool, again time.Duration, err error) {
	if w.edge != nil && w.edge.UID == edge.UID && older(edge.ResourceVersion, w.edge.ResourceVersion) {
		edge = w.edge
	}
	now := time.Now()
	mine = owns(&edge.Status, state, s.cfg.HubName, now)
	next := edgeStatus(edge, state, s.cfg.HubName, mine, conflict, now)
	wait := writeAfter(&edge.Status, next, now)
	if wait < 0 {
		return mine, 0, nil
	}
	if wait = max(wait, w.wroteAt.Add(minStatusPause).Sub(now)); wait > 0 {
		// Until its first write of a session, this hub does not own the status.
		return mine && edge.Status.Hub == s.cfg.HubName, wait, nil
	}
	changed := edge.DeepCopy()
	changed.Status = *next
	var written v1alpha1.Edge
	err = s.clients.edge.Put().Resource("edges").Name(edge.Name).SubResource("status").Body(changed).Do(ctx).Into(&written)
	if err != nil {
		return false, 0, err
	}
	trim(&written)
	w.edge, w.wroteAt = &written, now
	return mine, max(0, writeAfter(&written.Status, edgeStatus(&written, state, s.cfg.HubName, mine, conflict, now), now)), nil
}

// writePods writes the statuses of an edge's pods where they differ, and deletes those that have finished. The edge is online.
func (s *Source) writePods(ctx context.Context, w *edgeWork, state *mirror.EdgeState) error {
	var errs []error
	here := map[types.UID]bool{}
	for _, p := range s.pods.on(state.Edge) {
		here[p.uid] = true
		report := state.Pods[p.uid]
		if report == nil || older(p.version, w.pods[p.uid]) {
			continue // nothing is known, or the watch is behind what was written
		}
		version, err := s.writePodStatus(ctx, p, report)
		if err != nil {
			errs = append(errs, fmt.Errorf("write the status of pod %s/%s: %w", p.namespace, p.name, err))
			continue
		}
		if version != "" {
			w.pods[p.uid] = version
		}
		if !report.Finished || !p.deleting {
			continue
		}
		s.log.Info("Deleting a pod that has finished on its edge", "edge", state.Edge, "namespace", p.namespace, "pod", p.name)
		now := int64(0)
		err = s.clients.core.CoreV1().Pods(p.namespace).Delete(ctx, p.name, metav1.DeleteOptions{
			GracePeriodSeconds: &now,
			// Another pod of that name may have come meanwhile.
			Preconditions: &metav1.Preconditions{UID: &p.uid},
		})
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			errs = append(errs, fmt.Errorf("delete pod %s/%s: %w", p.namespace, p.name, err))
		}
	}
	for uid := range w.pods {
		if !here[uid] {
			delete(w.pods, uid)
		}
	}
	return errors.Join(errs...)
}
