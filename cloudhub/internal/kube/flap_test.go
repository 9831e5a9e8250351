package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// G7: a link that breaks and is back within seconds costs Kubernetes no request: a thousand of them behind one access point would be
// thousands at once. One that stays away is shown.
func TestG7FlapCostsNoRequest(t *testing.T) {
	ctx := context.Background()
	namespace(t, "flap")
	createEdge(t, edgeWithPods("flap-1", nil))
	p := podOn(t, "flap", "pod", "flap-1", nil)
	server := newSlowServer(t)
	h := startHub(t, "flap", server.kubeconfig)
	status := running()
	state := online("flap-1", 1, report(t, p, false, status))
	h.Report(state)
	core := control.admin.core.CoreV1()
	eventually(t, "the pod runs, the Node is ready and has its Lease", func() error {
		now, err := core.Pods("flap").Get(ctx, "pod", metav1.GetOptions{})
		must(t, err)
		if now.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("phase %s", now.Status.Phase)
		}
		node, err := core.Nodes().Get(ctx, "flap-1", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(node.Spec.Taints) != 1 {
			return errors.New("the not-ready taint is still there")
		}
		if _, err := control.admin.core.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, "flap-1", metav1.GetOptions{}); err != nil {
			return err
		}
		return nodeReady(node, corev1.ConditionTrue)
	})
	// The watch has brought what was written once a report of another edge, which waits in the same queue, is.
	createEdge(t, edgeWithPods("flap-2", nil))
	h.Report(online("flap-2", 1))
	eventually(t, "the other edge is online", func() error { return link(t, "flap-2", "flap", 1, linkOnline) })
	eventually(t, "its Node is ready", func() error {
		node, err := core.Nodes().Get(ctx, "flap-2", metav1.GetOptions{})
		if err != nil {
			return err
		}
		return nodeReady(node, corev1.ConditionTrue)
	})
	// A change is written at once, so that the regular write of the last contact is a minute away.
	for _, synced := range []bool{false, true} {
		state.Synced = synced
		h.Report(state)
		eventually(t, "the change is written", func() error {
			if getEdge(t, "flap-1").Status.Synced != synced {
				return errors.New("not yet")
			}
			return nil
		})
	}
	before := len(server.requests())
	instance := state.Instance
	for i := range 5 {
		state.Online, state.Synced, state.LastContact = false, false, time.Now()
		h.Report(state)
		worked(t, h)
		state = online("flap-1", uint64(i+2), report(t, p, false, status))
		state.Instance = instance
		h.Report(state)
		worked(t, h)
	}
	// Two changes of the other edge are written with the least pause between two writes: what waited for that is through then.
	for _, synced := range []bool{false, true} {
		other := online("flap-2", 1)
		other.Synced = synced
		h.Report(other)
		eventually(t, "the change of the other edge is written", func() error {
			if getEdge(t, "flap-2").Status.Synced != synced {
				return errors.New("not yet")
			}
			return nil
		})
	}
	asked := slices.DeleteFunc(server.requests()[before:], func(r string) bool { return strings.Contains(r, "flap-2") })
	if len(asked) > 0 {
		t.Fatalf("5 flaps cost %d requests: %q", len(asked), asked)
	}
	if err := link(t, "flap-1", "flap", 1, linkOnline); err != nil {
		t.Fatal(err)
	}

	// The end is told although the beginning of the last session was not.
	state.Online, state.Synced, state.LastContact = false, false, time.Now()
	h.Report(state)
	eventually(t, "the edge that stays away is shown", func() error { return link(t, "flap-1", "flap", 6, linkOffline) })
}

// worked waits until the hub has looked at everything that was reported.
func worked(t *testing.T, h *hub) {
	t.Helper()
	eventually(t, "the reports are worked off", func() error {
		if n := h.queue.Len(); n > 0 {
			return fmt.Errorf("%d edges wait", n)
		}
		return nil
	})
}

// G6: a hub that has not told its newest session yet, since only the number is new, is still known to hold the edge: another hub's
// older connection does not get it, and its newer one does.
func TestG6SessionThatWasNotToldStands(t *testing.T) {
	createEdge(t, edgeWithPods("lazy-1", nil))
	a, b := startHub(t, "lazy-a", control.hub), startHub(t, "lazy-b", control.hub)
	at := func(session uint64) mirror.EdgeState {
		s := online("lazy-1", session)
		s.Instance = "one agent"
		return s
	}
	a.Report(at(5))
	eventually(t, "hub a holds the edge", func() error { return link(t, "lazy-1", "lazy-a", 5, linkOnline) })
	a.Report(at(8)) // a flap: nothing is written
	worked(t, a)
	if err := link(t, "lazy-1", "lazy-a", 5, linkOnline); err != nil {
		t.Fatal(err)
	}
	// A dead connection that hub b had between is told late.
	b.Report(at(7))
	eventually(t, "hub a stands, with what it holds", func() error { return link(t, "lazy-1", "lazy-a", 8, linkOnline) })
	b.Report(at(9))
	eventually(t, "hub b holds the edge", func() error { return link(t, "lazy-1", "lazy-b", 9, linkOnline) })
	late := at(8)
	late.Online, late.LastContact = false, time.Now().Add(-flapAfter)
	a.Report(late)
	worked(t, a)
	if err := link(t, "lazy-1", "lazy-b", 9, linkOnline); err != nil {
		t.Fatal(err)
	}
}
