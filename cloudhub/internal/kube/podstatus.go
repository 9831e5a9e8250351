package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// writePodStatus writes a reported status if it differs from the pod's, and returns the new resourceVersion then. The pod
// must still be as the cache has it.
func (s *Source) writePodStatus(ctx context.Context, p *pod, report *longshorepb.PodReport) (version string, err error) {
	if len(report.Status) == 0 {
		return "", nil
	}
	var have, next corev1.PodStatus
	if err := have.Unmarshal(p.status); err != nil {
		return "", fmt.Errorf("decode the pod's status: %w", err)
	}
	if err := next.Unmarshal(report.Status); err != nil {
		// The edge is at fault; trying again does not help.
		s.log.Warn("An edge reported a pod status that is none", "edge", p.node, "namespace", p.namespace, "pod", p.name, "error", err)
		return "", nil
	}
	if !mergeStatus(&have, &next) {
		return "", nil
	}
	patch, err := json.Marshal([]patchOperation{
		{"replace", "/metadata/resourceVersion", p.version},
		{"add", "/status", next},
	})
	if err != nil {
		return "", err
	}
	written, err := s.clients.core.CoreV1().Pods(p.namespace).Patch(ctx, p.name, types.JSONPatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return "", err
	}
	return written.ResourceVersion, nil
}

// patchOperation is one of RFC 6902.
type patchOperation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// mergeStatus completes a reported status with what is not the edge's to say, and returns whether it is another one then.
func mergeStatus(have, next *corev1.PodStatus) bool {
	terminal := func(p corev1.PodPhase) bool { return p == corev1.PodSucceeded || p == corev1.PodFailed }
	if terminal(have.Phase) && !terminal(next.Phase) {
		return false
	}
	// Conditions that the edge does not name are those of other controllers.
	for _, c := range have.Conditions {
		if !slices.ContainsFunc(next.Conditions, func(n corev1.PodCondition) bool { return n.Type == c.Type }) {
			next.Conditions = append(next.Conditions, c)
		}
	}
	// A condition keeps its times while it says the same: the edge's clock may be wrong.
	for i, c := range next.Conditions {
		was := slices.IndexFunc(have.Conditions, func(h corev1.PodCondition) bool { return h.Type == c.Type })
		switch {
		case was >= 0 && have.Conditions[was].Status == c.Status:
			next.Conditions[i].LastTransitionTime = have.Conditions[was].LastTransitionTime
			next.Conditions[i].LastProbeTime = have.Conditions[was].LastProbeTime
		case c.LastTransitionTime.IsZero():
			next.Conditions[i].LastTransitionTime = metav1.Now()
		}
	}
	byType := func(a, b corev1.PodCondition) int { return strings.Compare(string(a.Type), string(b.Type)) }
	slices.SortStableFunc(next.Conditions, byType)
	was := slices.Clone(have.Conditions)
	slices.SortStableFunc(was, byType)

	next.QOSClass, next.NominatedNodeName = have.QOSClass, have.NominatedNodeName
	next.ObservedGeneration = have.ObservedGeneration
	next.ResourceClaimStatuses, next.ExtendedResourceClaimStatus = have.ResourceClaimStatuses, have.ExtendedResourceClaimStatus
	if next.StartTime == nil {
		next.StartTime = have.StartTime
	}
	same := have.DeepCopy()
	same.Conditions = was
	return !equality.Semantic.DeepEqual(same, next)
}
