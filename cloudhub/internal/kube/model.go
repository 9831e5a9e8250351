package kube

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
)

// Values of EdgeModelStatus.State.
const (
	statePending     = "Pending"
	stateDownloading = "Downloading"
	stateStaged      = "Staged"
	stateServing     = "Serving"
	stateFailed      = "Failed"
)

// countEvery is the least time between two rounds of Model statuses.
const countEvery = time.Second

// models is the sink of Models, and keeps their statuses: counts over the statuses of all Edges, whichever hub wrote those.
type models struct {
	source *Source
	dirty  chan struct{} // 1 slot: look again

	mu      sync.Mutex
	byKey   map[string]*model
	changed map[string]bool // keys to count again
}

type model struct {
	object   *v1alpha1.Model
	selector labels.Selector
}

func (m *models) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.byKey, m.changed = map[string]*model{}, map[string]bool{}
}

func (m *models) set(o *v1alpha1.Model) {
	selector, err := metav1.LabelSelectorAsSelector(o.Spec.EdgeSelector)
	if err != nil {
		selector = labels.Nothing() // the mirror tells
	}
	m.mu.Lock()
	key := o.Namespace + "/" + o.Name
	m.byKey[key] = &model{o, selector}
	m.mark(key)
	m.mu.Unlock()
	m.source.cfg.Cache.SetModel(o)
}

func (m *models) remove(namespace, name string, _ types.UID) {
	m.mu.Lock()
	delete(m.byKey, namespace+"/"+name)
	m.mu.Unlock()
	m.source.cfg.Cache.DeleteModel(namespace, name)
}

func (m *models) batch(f func()) { f() }

// mark is called with mu held.
func (m *models) mark(key string) {
	m.changed[key] = true
	signal(m.dirty)
}

func (m *models) markAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key := range m.byKey {
		m.mark(key)
	}
}

// edgeChanged marks the Models that an Edge counts for, before or now; either may be nil.
func (m *models) edgeChanged(before, now *v1alpha1.Edge) {
	if before != nil && now != nil && maps.Equal(before.Labels, now.Labels) && before.Status.Link == now.Status.Link &&
		slices.Equal(before.Status.Models, now.Status.Models) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, one := range m.byKey {
		for _, e := range []*v1alpha1.Edge{before, now} {
			if e != nil && one.selector.Matches(labels.Set(e.Labels)) {
				m.mark(key)
			}
		}
	}
}

// Run writes the statuses of Models, at most one round a second, until ctx ends.
func (m *models) Run(ctx context.Context) error {
	for {
		select {
		case <-m.dirty:
		case <-ctx.Done():
			return nil
		}
		if _, err := m.source.current(); err == nil {
			m.round(ctx)
		}
		if !pause(ctx, countEvery) {
			return nil
		}
	}
}

func (m *models) round(ctx context.Context) {
	m.mu.Lock()
	var todo []*model
	for key := range m.changed {
		if one := m.byKey[key]; one != nil {
			todo = append(todo, one)
		}
	}
	m.changed = map[string]bool{}
	m.mu.Unlock()
	if len(todo) == 0 {
		return
	}
	edges := m.source.edges.all()
	slices.SortFunc(edges, func(a, b *v1alpha1.Edge) int { return strings.Compare(a.Name, b.Name) })
	for _, one := range todo {
		status := count(one.object, one.selector, edges)
		if equality.Semantic.DeepEqual(&one.object.Status, status) {
			continue
		}
		changed := one.object.DeepCopy()
		changed.Status = *status
		err := m.source.clients.edge.Put().Namespace(changed.Namespace).Resource("models").Name(changed.Name).
			SubResource("status").Body(changed).Do(ctx).Error()
		switch {
		case err == nil, ctx.Err() != nil, apierrors.IsNotFound(err):
			continue
		case !apierrors.IsConflict(err):
			m.source.log.Warn("Cannot write a Model's status, trying again", "namespace", changed.Namespace, "model", changed.Name, "error", err)
		}
		m.mu.Lock()
		m.mark(changed.Namespace + "/" + changed.Name)
		m.mu.Unlock()
	}
}

// count makes a Model's status from all Edges, which are sorted by name.
func count(m *v1alpha1.Model, selector labels.Selector, edges []*v1alpha1.Edge) *v1alpha1.ModelStatus {
	s := &v1alpha1.ModelStatus{ObservedVersion: m.Spec.Version, Conditions: slices.Clone(m.Status.Conditions)}
	serving := map[string]int32{}
	var failures []string
	for _, e := range edges {
		if !selector.Matches(labels.Set(e.Labels)) {
			continue
		}
		s.Desired++
		if e.Status.Link != linkOnline {
			s.Offline++
		}
		i := slices.IndexFunc(e.Status.Models, func(one v1alpha1.EdgeModelStatus) bool { return one.Namespace == m.Namespace && one.Name == m.Name })
		if i < 0 {
			continue
		}
		one := e.Status.Models[i]
		if one.ServingVersion != "" {
			serving[one.ServingVersion]++
		}
		if one.ServingVersion == m.Spec.Version {
			s.Serving++
			continue
		}
		if one.DesiredVersion != m.Spec.Version {
			continue // the edge has not heard of this version yet
		}
		switch one.State {
		case stateStaged:
			s.Staged++
		case stateFailed:
			s.Failed++
			failures = append(failures, fmt.Sprintf("%s: %s", e.Name, cmp.Or(one.Reason, "unknown")))
		}
	}
	for _, version := range slices.Sorted(maps.Keys(serving)) {
		s.Versions = append(s.Versions, v1alpha1.ModelVersionCount{Version: version, Serving: serving[version]})
	}
	available := metav1.Condition{
		Type: "Available", Status: metav1.ConditionTrue, Reason: "Serving", ObservedGeneration: m.Generation,
		Message: fmt.Sprintf("%d of %d edges serve version %s.", s.Serving, s.Desired, m.Spec.Version),
	}
	if s.Desired == 0 {
		available.Status, available.Reason = metav1.ConditionFalse, "NoEdges"
		available.Message = "spec.edgeSelector selects no edge."
	} else if s.Serving < s.Desired {
		available.Status, available.Reason = metav1.ConditionFalse, "Progressing"
	}
	meta.SetStatusCondition(&s.Conditions, available)
	failed := metav1.Condition{
		Type: "Failed", Status: metav1.ConditionFalse, Reason: "NoFailures", ObservedGeneration: m.Generation,
		Message: "No edge failed to serve this version.",
	}
	if len(failures) > 0 {
		const shown = 3
		failed.Status, failed.Reason = metav1.ConditionTrue, "EdgesFailed"
		failed.Message = strings.Join(failures[:min(shown, len(failures))], "; ")
		if more := len(failures) - shown; more > 0 {
			failed.Message += fmt.Sprintf("; and %d more", more)
		}
	}
	meta.SetStatusCondition(&s.Conditions, failed)
	return s
}
