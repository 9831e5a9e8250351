package kube

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// An edge that connects becomes a Ready Node with a Lease, the scheduler puts a Deployment's pod there, its status arrives, and
// when the Deployment shrinks the pod goes once the edge has ended it. That is the whole life of a pod on an edge.
func TestDeploymentOnAnEdge(t *testing.T) {
	ctx := context.Background()
	core := control.admin.core.CoreV1()
	namespace(t, "deploy")
	createEdge(t, edgeWithPods("deploy-1", map[string]string{"site": "hall", "kubernetes.io/hostname": "not-this"}))
	h := startHub(t, "deploy", control.hub)
	h.Report(online("deploy-1", 7))

	eventually(t, "the Node is ready", func() error {
		node, err := core.Nodes().Get(ctx, "deploy-1", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for k, v := range map[string]string{
			corev1.LabelHostname: "deploy-1", corev1.LabelOSStable: "linux", corev1.LabelArchStable: "arm64", "node-role.kubernetes.io/edge": "",
			corev1.LabelTopologyZone: "edge-deploy-1", "site": "hall",
		} {
			if got, ok := node.Labels[k]; !ok || got != v {
				return fmt.Errorf("label %s is %q", k, got)
			}
		}
		if len(node.Spec.Taints) != 1 || node.Spec.Taints[0].Key != nodeTaint || node.Spec.Taints[0].Effect != corev1.TaintEffectNoSchedule {
			return fmt.Errorf("taints %v", node.Spec.Taints) // not-ready is gone as well
		}
		if node.Status.Allocatable.Pods().Value() != 20 || node.Status.NodeInfo.KernelVersion != "6.1.0" {
			return fmt.Errorf("status %v", node.Status)
		}
		return nodeReady(node, corev1.ConditionTrue)
	})
	eventually(t, "the Lease is renewed", func() error {
		lease, err := control.admin.core.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, "deploy-1", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if *lease.Spec.LeaseDurationSeconds != 40 || *lease.Spec.HolderIdentity != "deploy-1" || lease.OwnerReferences[0].Kind != "Node" {
			t.Fatalf("lease %v", lease)
		}
		if lease.Spec.RenewTime.Sub(lease.CreationTimestamp.Time) < renewEvery/2 {
			return errors.New("not renewed yet")
		}
		return nil
	})

	one := int32(1)
	deployment := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "app"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &one, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "app"}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "app"}},
				Spec: corev1.PodSpec{
					NodeSelector: map[string]string{"site": "hall"},
					Tolerations:  []corev1.Toleration{{Key: nodeTaint, Operator: corev1.TolerationOpExists}},
					Containers:   []corev1.Container{{Name: "main", Image: "example.org/main:1"}},
				},
			},
		},
	}
	_, err := control.admin.core.AppsV1().Deployments("deploy").Create(ctx, deployment, metav1.CreateOptions{})
	must(t, err)
	var pod corev1.Pod
	eventually(t, "the pod is scheduled onto the edge", func() error {
		list, err := core.Pods("deploy").List(ctx, metav1.ListOptions{})
		must(t, err)
		if len(list.Items) != 1 || list.Items[0].Spec.NodeName != "deploy-1" {
			return fmt.Errorf("%d pods", len(list.Items))
		}
		pod = list.Items[0]
		return nil
	})
	optedOut := "CONFIG_MAP deploy/kube-root-ca.crt absent: " + fmt.Sprintf(notOptedIn, "deploy")
	h.expect(t, "deploy-1", "POD deploy/"+pod.Name, optedOut)
	must(t, h.Prove(ctx, "deploy-1"))

	state := online("deploy-1", 7, report(t, &pod, false, running()))
	state.Sequence = 2
	h.Report(state)
	eventually(t, "the Deployment is available", func() error {
		d, err := control.admin.core.AppsV1().Deployments("deploy").Get(ctx, "app", metav1.GetOptions{})
		must(t, err)
		if d.Status.AvailableReplicas != 1 {
			return fmt.Errorf("status %v", d.Status)
		}
		return nil
	})
	now, err := core.Pods("deploy").Get(ctx, pod.Name, metav1.GetOptions{})
	must(t, err)
	if now.Status.Phase != corev1.PodRunning || now.Status.QOSClass != pod.Status.QOSClass {
		t.Fatalf("pod status %v", now.Status)
	}
	scheduled := false
	for _, c := range now.Status.Conditions {
		scheduled = scheduled || c.Type == corev1.PodScheduled
	}
	if !scheduled {
		t.Fatal("the scheduler's condition was overwritten")
	}

	none := int32(0)
	deployment.Spec.Replicas = &none
	_, err = control.admin.core.AppsV1().Deployments("deploy").Update(ctx, deployment, metav1.UpdateOptions{})
	must(t, err)
	eventually(t, "the pod is being deleted", func() error {
		p, err := core.Pods("deploy").Get(ctx, pod.Name, metav1.GetOptions{})
		if err == nil && p.DeletionTimestamp == nil {
			err = errors.New("no deletionTimestamp")
		}
		return err
	})
	ended := running()
	ended.Phase = corev1.PodSucceeded
	state = online("deploy-1", 7, report(t, &pod, true, ended))
	state.Sequence = 3
	h.Report(state)
	eventually(t, "the pod is gone", func() error {
		_, err := core.Pods("deploy").Get(ctx, pod.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
}

func nodeReady(node *corev1.Node, want corev1.ConditionStatus) error {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == want {
			return nil
		}
	}
	return fmt.Errorf("conditions %v", node.Status.Conditions)
}

// Force-deleted and made again under one name while the edge still ends the first: what the edge says of the first must not
// touch the second. Otherwise the second is deleted before it ever ran.
func TestForcedDeleteAndSamePodNameAgain(t *testing.T) {
	ctx := context.Background()
	core := control.admin.core.CoreV1()
	namespace(t, "again")
	createEdge(t, edgeWithPods("again-1", nil))
	first := podOn(t, "again", "pod", "again-1", nil)
	h := startHub(t, "again", control.hub)
	h.expect(t, "again-1", "POD again/pod")
	now := int64(0)
	must(t, core.Pods("again").Delete(ctx, "pod", metav1.DeleteOptions{GracePeriodSeconds: &now}))
	second := podOn(t, "again", "pod", "again-1", nil)
	// The second is being deleted too, in its time: only its own report may finish it.
	grace := int64(3600)
	must(t, core.Pods("again").Delete(ctx, "pod", metav1.DeleteOptions{GracePeriodSeconds: &grace}))
	eventually(t, "the second pod is mirrored", func() error {
		for _, p := range h.pods.on("again-1") {
			if p.uid == second.UID && p.deleting {
				return nil
			}
		}
		return errors.New("not yet")
	})
	ended := running()
	ended.Phase = corev1.PodFailed
	state := online("again-1", 1, report(t, first, true, ended), report(t, second, false, running()))
	h.Report(state)
	eventually(t, "the second pod's own status arrives", func() error {
		p, err := core.Pods("again").Get(ctx, "pod", metav1.GetOptions{})
		must(t, err)
		if p.UID != second.UID {
			t.Fatalf("pod %s, want %s", p.UID, second.UID)
		}
		if p.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("phase %s", p.Status.Phase)
		}
		return nil
	})
	state = online("again-1", 1, report(t, second, true, ended))
	state.Sequence = 2
	h.Report(state)
	eventually(t, "the second pod is gone", func() error {
		_, err := core.Pods("again").Get(ctx, "pod", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// A pod that is being deleted on an edge that is away stays, whatever was reported before: nobody knows whether it runs.
func TestNothingIsDeletedWhileOffline(t *testing.T) {
	ctx := context.Background()
	core := control.admin.core.CoreV1()
	namespace(t, "away")
	createEdge(t, edgeWithPods("away-1", nil))
	p := podOn(t, "away", "pod", "away-1", nil)
	h := startHub(t, "away", control.hub)
	h.expect(t, "away-1", "POD away/pod")
	h.Report(online("away-1", 1))
	eventually(t, "the Edge is online", func() error { return link(t, "away-1", "away", 1, linkOnline) })
	grace := int64(3600)
	must(t, core.Pods("away").Delete(ctx, "pod", metav1.DeleteOptions{GracePeriodSeconds: &grace}))
	gone := online("away-1", 1, report(t, p, true, running()))
	gone.Online = false
	h.Report(gone)
	eventually(t, "the Edge is offline", func() error { return link(t, "away-1", "away", 1, linkOffline) })
	now, err := core.Pods("away").Get(ctx, "pod", metav1.GetOptions{})
	must(t, err)
	if now.Status.Phase == corev1.PodRunning {
		t.Fatal("a status was written for an edge that is away")
	}
}

func link(t *testing.T, edge, hub string, session int64, link string) error {
	t.Helper()
	s := getEdge(t, edge).Status
	if s.Hub != hub || s.Session != session || s.Link != link {
		return fmt.Errorf("%s session %d at hub %s", s.Link, s.Session, s.Hub)
	}
	return nil
}

// G6: an edge that moves from one hub to another is shown where it is. What the first hub still says about its dead connection
// changes nothing, and an older session never takes over from a newer one.
func TestTwoHubsOneEdge(t *testing.T) {
	createEdge(t, edgeWithPods("two-1", nil))
	a, b := startHub(t, "two-a", control.hub), startHub(t, "two-b", control.hub)
	a.Report(online("two-1", 5))
	eventually(t, "hub a holds the edge", func() error { return link(t, "two-1", "two-a", 5, linkOnline) })
	b.Report(online("two-1", 6))
	eventually(t, "hub b holds the edge", func() error { return link(t, "two-1", "two-b", 6, linkOnline) })

	late := online("two-1", 5)
	late.Sequence = 99
	a.Report(late)
	ended := online("two-1", 5)
	ended.Online = false
	a.Report(ended)
	// Hub b's own end, told after, shows that nothing of hub a came between.
	over := online("two-1", 6)
	over.Online, over.Sequence = false, 2
	b.Report(over)
	eventually(t, "hub b tells the end", func() error { return link(t, "two-1", "two-b", 6, linkOffline) })
	if s := getEdge(t, "two-1").Status; s.Sequence != 2 {
		t.Fatalf("sequence %d", s.Sequence)
	}
	// A box that was installed anew counts from 1 again; with the old session over it is welcome.
	a.Report(online("two-1", 1))
	eventually(t, "hub a holds the edge again", func() error { return link(t, "two-1", "two-a", 1, linkOnline) })
}

// What people look at with kubectl get models: how many edges serve which version. Both hubs count; the result is one.
func TestModelCounts(t *testing.T) {
	namespace(t, "counts")
	selector := &metav1.LabelSelector{MatchLabels: map[string]string{"counts": "yes"}}
	for i := range 3 {
		e := edgeWithPods(fmt.Sprintf("counts-%d", i), selector.MatchLabels)
		e.Spec.Pods = false
		createEdge(t, e)
	}
	createModel(t, modelOf("counts", "model", "2", selector))
	a, b := startHub(t, "counts-a", control.hub), startHub(t, "counts-b", control.hub)
	reports := []*longshorepb.ModelReport{
		{Namespace: "counts", Name: "model", DesiredVersion: "2", ServingVersion: "2", State: longshorepb.ModelState_MODEL_STATE_SERVING},
		{Namespace: "counts", Name: "model", DesiredVersion: "2", ServingVersion: "1", State: longshorepb.ModelState_MODEL_STATE_FAILED, Reason: "LoadFailed", Message: strings.Repeat("é", maxMessage)},
	}
	for i, h := range []*hub{a, b} {
		state := online(fmt.Sprintf("counts-%d", i), 1)
		state.Models = map[string]*longshorepb.ModelReport{"counts/model": reports[i]}
		h.Report(state)
	}
	eventually(t, "the counts are right", func() error {
		m, err := getModel("counts", "model")
		must(t, err)
		s := m.Status
		if s.Desired != 3 || s.Serving != 1 || s.Failed != 1 || s.Offline != 1 || s.Staged != 0 || s.ObservedVersion != "2" || len(s.Versions) != 2 {
			return fmt.Errorf("status %+v", s)
		}
		for _, c := range s.Conditions {
			if c.Type == "Failed" && c.Status == metav1.ConditionTrue && c.Message == "counts-1: LoadFailed" {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", s.Conditions)
	})
}

// A pod too big to mirror is told where people look: in its Events, once.
func TestProblemBecomesAnEvent(t *testing.T) {
	ctx := context.Background()
	namespace(t, "problem")
	h := startHub(t, "problem", control.hub)
	for range 3 {
		h.Problem(mirror.ObjectRef{Kind: "Pod", Namespace: "problem", Name: "big", UID: "1"}, "TooLarge", "the pod is too large")
	}
	h.Problem(mirror.ObjectRef{Kind: "Pod", Namespace: "problem", Name: "last", UID: "2"}, "TooLarge", "the pod is too large")
	eventually(t, "both Events", func() error {
		list, err := control.admin.core.CoreV1().Events("problem").List(ctx, metav1.ListOptions{})
		must(t, err)
		if len(list.Items) != 2 {
			return fmt.Errorf("%d Events", len(list.Items))
		}
		for _, e := range list.Items {
			if e.Count != 1 || e.Type != corev1.EventTypeWarning || e.Reason != "TooLarge" {
				t.Fatalf("event %v", e)
			}
		}
		return nil
	})
}

// G7: an edge that reports the same again and again costs Kubernetes nothing; numbers alone wait a minute.
func TestUnchangedReportsWriteNothing(t *testing.T) {
	ctx := context.Background()
	namespace(t, "quiet")
	createEdge(t, edgeWithPods("quiet-1", nil))
	p := podOn(t, "quiet", "pod", "quiet-1", nil)
	h := startHub(t, "quiet", control.hub)
	status := running()
	h.Report(online("quiet-1", 1, report(t, p, false, status)))
	core := control.admin.core.CoreV1()
	eventually(t, "the pod runs and the Node is ready", func() error {
		now, err := core.Pods("quiet").Get(ctx, "pod", metav1.GetOptions{})
		must(t, err)
		if now.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("phase %s", now.Status.Phase)
		}
		node, err := core.Nodes().Get(ctx, "quiet-1", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(node.Spec.Taints) != 1 {
			return errors.New("the not-ready taint is still there")
		}
		return nodeReady(node, corev1.ConditionTrue)
	})
	versions := func() string {
		now, err := core.Pods("quiet").Get(ctx, "pod", metav1.GetOptions{})
		must(t, err)
		node, err := core.Nodes().Get(ctx, "quiet-1", metav1.GetOptions{})
		must(t, err)
		return fmt.Sprintf("pod %s, node %s, edge %s", now.ResourceVersion, node.ResourceVersion, getEdge(t, "quiet-1").ResourceVersion)
	}
	before := versions()
	for i := range 200 {
		state := online("quiet-1", 1, report(t, p, false, status))
		state.Sequence, state.Node.BacklogRecords = uint64(i+2), uint64(i)
		h.Report(state)
	}
	// The queue is worked off when a later change of another edge is written.
	createEdge(t, edgeWithPods("quiet-2", nil))
	h.Report(online("quiet-2", 1))
	eventually(t, "the other edge is online", func() error { return link(t, "quiet-2", "quiet", 1, linkOnline) })
	if after := versions(); after != before {
		t.Fatalf("200 reports that say nothing new: %s, before %s", after, before)
	}
}
