package desired

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	corev1 "k8s.io/api/core/v1"
)

// PodSpecHash names what of a pod needs a restart of its containers when it changes. Metadata, deletion, scheduling and
// grace periods are not part of it. The edge computes it itself, from the types it was built with, so that a newer hub,
// whose objects have fields unknown here, restarts nothing.
func PodSpecHash(p *corev1.Pod) (string, error) {
	s := p.Spec
	s.ActiveDeadlineSeconds = nil
	s.TerminationGracePeriodSeconds = nil
	s.NodeSelector = nil
	s.NodeName = ""
	s.SchedulerName = ""
	s.Affinity = nil
	s.Tolerations = nil
	s.TopologySpreadConstraints = nil
	s.SchedulingGates = nil
	s.ReadinessGates = nil
	s.PriorityClassName = ""
	s.Priority = nil
	s.PreemptionPolicy = nil
	s.DeprecatedServiceAccount = ""
	b, err := s.Marshal()
	if err != nil {
		return "", fmt.Errorf("encode the spec of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16]), nil
}
