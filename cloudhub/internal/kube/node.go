package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const (
	// nodeLabel marks the Nodes that hubs made; its value is "true".
	nodeLabel = "longshore.dev/edge"
	// nodeTaint keeps pods off edges that do not tolerate it.
	nodeTaint = "longshore.dev/edge"
	// copiedAnnotation names the labels of a Node that come from its Edge, so that they go when they go there.
	copiedAnnotation = "longshore.dev/copied-labels"

	// offlineAfter is how long an edge must be away before its Node says so: each change of a Node's readiness rewrites all its
	// pods. It is less than the grace period of the node lifecycle controller, whose reason would say less.
	offlineAfter = 30 * time.Second

	// An edge that does not say how much it has takes a little.
	defaultPods   = 110
	defaultMillis = 1000
	defaultMemory = 256 << 20
)

// writeNode makes the Node of an edge and brings it up to date. state may be nil.
func (s *Source) writeNode(ctx context.Context, edge *v1alpha1.Edge, state *mirror.EdgeState, mine bool) (time.Duration, error) {
	api := s.clients.core.CoreV1().Nodes()
	node := s.nodes.get(edge.Name)
	if node == nil {
		fresh := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: edge.Name}}
		dress(fresh, edge, state)
		created, err := api.Create(ctx, fresh, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return time.Second, nil // the watch is behind
		}
		if err != nil {
			return 0, err
		}
		s.log.Info("Made a Node for an edge", "edge", edge.Name)
		node = created
	} else if dressed := node.DeepCopy(); dress(dressed, edge, state) {
		updated, err := api.Update(ctx, dressed, metav1.UpdateOptions{})
		if err != nil {
			return 0, err
		}
		node = updated
	}
	now := time.Now()
	next := node.DeepCopy()
	again := nodeStatus(next, state, mine, now)
	if equality.Semantic.DeepEqual(node.Status, next.Status) {
		return again, nil
	}
	for i := range next.Status.Conditions {
		next.Status.Conditions[i].LastHeartbeatTime = metav1.NewTime(now)
	}
	_, err := api.UpdateStatus(ctx, next, metav1.UpdateOptions{})
	return again, err
}

func (s *Source) deleteNode(ctx context.Context, name string) error {
	node := s.nodes.get(name)
	if node == nil {
		return nil
	}
	s.log.Info("Deleting the Node of an edge that takes no pods (any more)", "edge", name)
	err := s.clients.core.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &node.UID}})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // somebody else was faster
	}
	return err
}

// dress sets a Node's labels, annotations and taint, and returns whether it changed anything. Labels and taints of others stay.
func dress(node *corev1.Node, edge *v1alpha1.Edge, state *mirror.EdgeState) bool {
	labels := map[string]string{
		nodeLabel:                      "true",
		"node-role.kubernetes.io/edge": "",
		corev1.LabelHostname:           labelValue(edge.Name),
		corev1.LabelTopologyZone:       labelValue("edge-" + edge.Name),
		// A hub that has not heard from the edge leaves what one that has wrote.
		corev1.LabelOSStable: labelValue(cmp.Or(nodeReport(state).GetOs(), node.Labels[corev1.LabelOSStable], "linux")),
	}
	arch := cmp.Or(nodeReport(state).GetArchitecture(), node.Labels[corev1.LabelArchStable], edge.Status.Architecture)
	if arch != "" {
		labels[corev1.LabelArchStable] = labelValue(arch)
	}
	var copied []string
	for k, v := range edge.Labels {
		// Kubernetes reserves its own prefixes; what stands there is for Nodes, not for Edges.
		prefix, _, prefixed := strings.Cut(k, "/")
		reserved := prefixed && (prefix == "kubernetes.io" || prefix == "k8s.io" || strings.HasSuffix(prefix, ".kubernetes.io") || strings.HasSuffix(prefix, ".k8s.io"))
		if _, ours := labels[k]; !ours && !reserved {
			labels[k] = v
			copied = append(copied, k)
		}
	}
	slices.Sort(copied)

	have := maps.Clone(node.Labels)
	if node.Labels == nil {
		node.Labels = map[string]string{}
	}
	for k := range strings.SplitSeq(node.Annotations[copiedAnnotation], ",") {
		delete(node.Labels, k)
	}
	maps.Copy(node.Labels, labels)
	changed := !maps.Equal(have, node.Labels)

	if list := strings.Join(copied, ","); node.Annotations[copiedAnnotation] != list {
		if node.Annotations == nil {
			node.Annotations = map[string]string{}
		}
		node.Annotations[copiedAnnotation] = list
		changed = true
	}
	if !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == nodeTaint && t.Effect == corev1.TaintEffectNoSchedule }) {
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: nodeTaint, Effect: corev1.TaintEffectNoSchedule})
		changed = true
	}
	return changed
}

// nodeStatus sets a Node's status from a state, and returns after what time it would be another one.
func nodeStatus(node *corev1.Node, state *mirror.EdgeState, mine bool, now time.Time) (again time.Duration) {
	status := &node.Status
	ready := corev1.NodeCondition{Type: corev1.NodeReady}
	switch {
	case mine && state.Online:
		ready.Status, ready.Reason, ready.Message = corev1.ConditionTrue, "EdgeConnected", "the edge is connected to a hub"
		// An edge that has not said what it is, yet, is still what another hub, or this one before, was told.
		if state.Node != nil || status.Capacity == nil {
			describe(status, node.Name, state)
		}
	case mine:
		if wait := state.LastContact.Add(offlineAfter).Sub(now); wait > 0 {
			return wait
		}
		ready.Status, ready.Reason = corev1.ConditionUnknown, "EdgeOffline"
		ready.Message = "the edge is not connected; it goes on with the pods it holds"
	default:
		ready.Status, ready.Reason, ready.Message = corev1.ConditionUnknown, "NeverConnected", "the edge has not connected yet"
	}
	i := slices.IndexFunc(status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeReady })
	switch {
	case i < 0:
		ready.LastTransitionTime, ready.LastHeartbeatTime = metav1.NewTime(now), metav1.NewTime(now)
		status.Conditions = append(status.Conditions, ready)
	case ready.Reason == "NeverConnected":
		// Only a Node without any condition is new; on others this hub has no say.
	case status.Conditions[i].Status != ready.Status:
		ready.LastTransitionTime = metav1.NewTime(now)
		status.Conditions[i] = ready
	case ready.Status == corev1.ConditionTrue:
		ready.LastTransitionTime, ready.LastHeartbeatTime = status.Conditions[i].LastTransitionTime, status.Conditions[i].LastHeartbeatTime
		status.Conditions[i] = ready
	}
	return 0
}

// describe sets what the edge says of itself.
func describe(status *corev1.NodeStatus, name string, state *mirror.EdgeState) {
	n := nodeReport(state)
	capacity := corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewMilliQuantity(int64(cmp.Or(n.GetCpuMillis(), defaultMillis)), resource.DecimalSI),
		corev1.ResourceMemory: *resource.NewQuantity(int64(cmp.Or(n.GetMemoryBytes(), defaultMemory)), resource.BinarySI),
		corev1.ResourcePods:   *resource.NewQuantity(int64(cmp.Or(n.GetMaxPods(), defaultPods)), resource.DecimalSI),
	}
	if disk := n.GetDiskBytes(); disk > 0 {
		capacity[corev1.ResourceEphemeralStorage] = *resource.NewQuantity(int64(disk), resource.BinarySI)
	}
	status.Capacity, status.Allocatable = capacity, capacity.DeepCopy()
	status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: cmp.Or(n.GetHostname(), name)}}
	status.NodeInfo = corev1.NodeSystemInfo{
		MachineID: n.GetMachineId(), SystemUUID: n.GetMachineId(), BootID: n.GetBootId(), KernelVersion: n.GetKernel(),
		OSImage: n.GetOsImage(), OperatingSystem: cmp.Or(n.GetOs(), "linux"), Architecture: n.GetArchitecture(),
		ContainerRuntimeVersion: cmp.Or(n.GetRuntime(), "none"),
		KubeletVersion:          "longshore-" + cmp.Or(state.AgentVersion, n.GetAgentVersion(), "unknown"),
	}
}

func nodeReport(state *mirror.EdgeState) *longshorepb.NodeReport {
	if state == nil {
		return nil
	}
	return state.Node
}

// labelValue makes a label's value of a text: as it is, or cut with a hash of the whole if it is too long, since
// the names of Edges may be four times as long as a value.
func labelValue(s string) string {
	const longest = 63
	if len(s) <= longest {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return fmt.Sprintf("%s-%s", strings.TrimRight(s[:longest-9], "-."), hex.EncodeToString(sum[:4]))
}
