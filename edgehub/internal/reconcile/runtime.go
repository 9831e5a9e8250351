package reconcile

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pod is a pod an edge should run, with the objects it names.
type Pod struct {
	*corev1.Pod
	// ConfigMaps and Secrets of the pod's namespace by name, those that the list has.
	ConfigMaps map[string]*corev1.ConfigMap
	Secrets    map[string]*corev1.Secret
	// Missing says which named objects the list does not have, and why, for people.
	Missing []string
}

// Result is what Sync found or brought about.
type Result struct {
	Status corev1.PodStatus
	// Finished: every container has ended, or none was ever started, and the pod is to be deleted.
	Finished bool
}

// Runtime runs pods. Calls about one pod never overlap; calls about different pods do.
type Runtime interface {
	// Version is the runtime's name and version, for people; empty if there is none.
	Version() string
	// Known returns the UIDs of the pods the runtime holds anything of, also from before a restart of the agent.
	Known(ctx context.Context) ([]types.UID, error)
	// Sync brings one pod a step closer to its spec, or to its end if it has a deletionTimestamp, and returns its status.
	// An error means: again, after a pause. The result counts all the same if its phase is set.
	Sync(ctx context.Context, p Pod) (Result, error)
	// Remove ends and forgets a pod that is no longer in the list.
	Remove(ctx context.Context, uid types.UID) error
	// Changed delivers UIDs of pods to sync again; nil if the runtime never tells.
	Changed() <-chan types.UID
}

// None is an edge without a container runtime: its pods are kept and shown as waiting for one.
type None struct{}

// NoRuntime is the reason containers wait for on an edge without a container runtime.
const NoRuntime = "NoRuntime"

const noRuntimeMessage = "this edge has no container runtime; the pod is kept here and starts when there is one"

// Version implements Runtime.
func (None) Version() string { return "" }

// Known implements Runtime.
func (None) Known(context.Context) ([]types.UID, error) { return nil, nil }

// Remove implements Runtime.
func (None) Remove(context.Context, types.UID) error { return nil }

// Changed implements Runtime.
func (None) Changed() <-chan types.UID { return nil }

// Sync implements Runtime: nothing ever runs, so a pod to be deleted is finished at once.
func (None) Sync(_ context.Context, p Pod) (Result, error) {
	waiting := func(containers []corev1.Container) []corev1.ContainerStatus {
		var out []corev1.ContainerStatus
		for _, c := range containers {
			out = append(out, corev1.ContainerStatus{
				Name: c.Name, Image: c.Image,
				State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: NoRuntime, Message: noRuntimeMessage}},
			})
		}
		return out
	}
	condition := func(t corev1.PodConditionType, s corev1.ConditionStatus, reason, message string) corev1.PodCondition {
		return corev1.PodCondition{Type: t, Status: s, Reason: reason, Message: message, LastTransitionTime: p.CreationTimestamp}
	}
	status := corev1.PodStatus{
		Phase: corev1.PodPending,
		Conditions: []corev1.PodCondition{
			condition(corev1.PodScheduled, corev1.ConditionTrue, "", ""),
			condition(corev1.PodInitialized, corev1.ConditionFalse, NoRuntime, noRuntimeMessage),
			condition(corev1.ContainersReady, corev1.ConditionFalse, NoRuntime, noRuntimeMessage),
			condition(corev1.PodReady, corev1.ConditionFalse, NoRuntime, noRuntimeMessage),
		},
		InitContainerStatuses: waiting(p.Spec.InitContainers),
		ContainerStatuses:     waiting(p.Spec.Containers),
	}
	if len(p.Spec.InitContainers) == 0 {
		status.Conditions = slices.Delete(status.Conditions, 1, 2)
	}
	return Result{Status: status, Finished: p.DeletionTimestamp != nil}, nil
}
