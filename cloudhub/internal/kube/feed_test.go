package kube

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// G1, G5: an edge gets its pods, its models and the objects that its pods name, as they change, and nothing else. Without this
// nothing that kubectl does would reach an edge, or Secrets of others would.
func TestFeedMirrorsWhatAnEdgeNeedsAndNothingElse(t *testing.T) {
	ctx := context.Background()
	core := control.admin.core.CoreV1()
	namespace(t, "feed")
	optIn(t, "feed")
	createEdge(t, edgeWithPods("feed-1", map[string]string{"feed": "yes"}))
	createEdge(t, edgeWithPods("feed-2", nil))
	h := startHub(t, "feed", control.hub)

	config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "feed", Name: "config"}, Data: map[string]string{"a": "1"}}
	_, err := core.ConfigMaps("feed").Create(ctx, config, metav1.CreateOptions{})
	must(t, err)
	for _, name := range []string{"named", "unnamed"} {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "feed", Name: name}, StringData: map[string]string{"k": "v"}}
		_, err := core.Secrets("feed").Create(ctx, secret, metav1.CreateOptions{})
		must(t, err)
	}
	createModel(t, modelOf("feed", "model", "1", &metav1.LabelSelector{MatchLabels: map[string]string{"feed": "yes"}}))
	podOn(t, "feed", "pod", "feed-1", func(p *corev1.Pod) {
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "config"}}},
			{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "named"}}},
			{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "missing"}}},
		}
	})
	podOn(t, "feed", "elsewhere", "feed-2", nil)
	h.expect(t, "feed-1", "POD feed/pod", "CONFIG_MAP feed/config", "SECRET feed/named", "SECRET feed/missing absent: not found", "MODEL feed/model")
	h.expect(t, "feed-2", "POD feed/elsewhere")

	before := h.digest("feed-1", "config")
	config.Data["a"] = "2"
	_, err = core.ConfigMaps("feed").Update(ctx, config, metav1.UpdateOptions{})
	must(t, err)
	eventually(t, "the new ConfigMap is mirrored", func() error {
		if now := h.digest("feed-1", "config"); slices.Equal(now, before) || now == nil {
			return fmt.Errorf("digest %x", now)
		}
		return nil
	})
	must(t, core.Secrets("feed").Delete(ctx, "named", metav1.DeleteOptions{}))
	h.expect(t, "feed-1", "POD feed/pod", "CONFIG_MAP feed/config", "SECRET feed/named absent: not found", "SECRET feed/missing absent: not found", "MODEL feed/model")

	now := int64(0)
	must(t, core.Pods("feed").Delete(ctx, "pod", metav1.DeleteOptions{GracePeriodSeconds: &now}))
	h.expect(t, "feed-1", "MODEL feed/model")
	eventually(t, "no object is watched that no pod names", func() error {
		h.named.mu.Lock()
		defer h.named.mu.Unlock()
		if len(h.named.watches) > 0 || len(h.named.gates) > 0 {
			return fmt.Errorf("%d watches, %d gates", len(h.named.watches), len(h.named.gates))
		}
		return nil
	})
}

func (h *hub) digest(edge, name string) []byte {
	for _, e := range h.list(edge) {
		if e.Name == name {
			return e.Digest
		}
	}
	return nil
}

// G5: a namespace that is not opted in gives nothing, and says so; opting in helps without a restart, and opting out takes
// effect. Otherwise the hub would hold every Secret of the cluster, or an operator would wait in vain.
func TestNamespacesOptIn(t *testing.T) {
	ctx := context.Background()
	namespace(t, "opt")
	createEdge(t, edgeWithPods("opt-1", nil))
	_, err := control.admin.core.CoreV1().ConfigMaps("opt").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "config"}}, metav1.CreateOptions{})
	must(t, err)
	podOn(t, "opt", "pod", "opt-1", func(p *corev1.Pod) {
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "config"}}},
		}
	})
	h := startHub(t, "opt", control.hub)
	closed := "CONFIG_MAP opt/config absent: " + fmt.Sprintf(notOptedIn, "opt")
	h.expect(t, "opt-1", "POD opt/pod", closed)
	must(t, h.Prove(ctx, "opt-1"))

	optIn(t, "opt")
	h.expect(t, "opt-1", "POD opt/pod", "CONFIG_MAP opt/config")
	must(t, control.admin.core.RbacV1().RoleBindings("opt").Delete(ctx, "longshore-objects", metav1.DeleteOptions{}))
	h.expect(t, "opt-1", "POD opt/pod", closed)
}

// G7: a status-only change in Kubernetes sends nothing. Otherwise every heartbeat of every pod would
// cross the slow links.
func TestStatusPatchesReachNoEdge(t *testing.T) {
	ctx := context.Background()
	namespace(t, "patches")
	createEdge(t, edgeWithPods("patches-1", nil))
	p := podOn(t, "patches", "pod", "patches-1", nil)
	h := startHub(t, "patches", control.hub)
	h.expect(t, "patches-1", "POD patches/pod")

	var woken atomic.Int32
	v := h.cache.View("patches-1", make([]byte, 32), func() { woken.Add(1) })
	defer v.Close()
	before := v.Snapshot(time.Now()).List
	var last *corev1.Pod
	for i := range 200 {
		patch := fmt.Sprintf(`{"status":{"message":"%d"}}`, i)
		var err error
		last, err = control.admin.core.CoreV1().Pods("patches").Patch(ctx, p.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
		must(t, err)
	}
	gen, err := h.current()
	must(t, err)
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	must(t, gen.pods.wait(limited, func() bool { return !older(gen.pods.position, last.ResourceVersion) }))
	after := v.Snapshot(time.Now()).List
	if n := woken.Load(); n != 0 || after.Digest != before.Digest {
		t.Fatalf("200 status patches: senders woken %d times, list %x, before %x", n, after.Digest, before.Digest)
	}
}

// A Node that somebody else made may have the name of an Edge, by mistake or to get at its pods' Secrets. It stays as it is, its
// pods stay in the cluster, and the Edge says why.
func TestForeignNodeIsLeftAlone(t *testing.T) {
	ctx := context.Background()
	namespace(t, "foreign")
	_, err := control.admin.core.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "foreign-1"}}, metav1.CreateOptions{})
	must(t, err)
	t.Cleanup(func() { must(t, control.admin.core.CoreV1().Nodes().Delete(ctx, "foreign-1", metav1.DeleteOptions{})) })
	podOn(t, "foreign", "pod", "foreign-1", nil)
	h := startHub(t, "foreign", control.hub)
	createEdge(t, edgeWithPods("foreign-1", nil))
	eventually(t, "the Edge tells of the conflict", func() error {
		for _, c := range getEdge(t, "foreign-1").Status.Conditions {
			if c.Type == "NodeConflict" && c.Status == metav1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("no such condition")
	})
	must(t, h.Prove(ctx, "foreign-1"))
	if got := h.entries("foreign-1"); len(got) != 0 {
		t.Fatalf("pods of a foreign Node are mirrored: %q", got)
	}
	node, err := control.admin.core.CoreV1().Nodes().Get(ctx, "foreign-1", metav1.GetOptions{})
	must(t, err)
	if node.Labels[nodeLabel] != "" {
		t.Fatal("the hub took a foreign Node over")
	}
}

// An Edge that comes to take pods later gets those that are bound to its name already; one that stops loses them and its Node.
func TestEdgeBecomesANode(t *testing.T) {
	ctx := context.Background()
	namespace(t, "becomes")
	e := edgeWithPods("becomes-1", nil)
	e.Spec.Pods = false
	createEdge(t, e)
	podOn(t, "becomes", "pod", "becomes-1", nil)
	h := startHub(t, "becomes", control.hub)
	h.expect(t, "becomes-1")
	patch := func(pods bool) {
		must(t, control.admin.edge.Patch(types.MergePatchType).Resource("edges").Name("becomes-1").
			Body(fmt.Appendf(nil, `{"spec":{"pods":%t}}`, pods)).Do(ctx).Error())
	}
	patch(true)
	h.expect(t, "becomes-1", "POD becomes/pod")
	patch(false)
	h.expect(t, "becomes-1")
	eventually(t, "the Node is gone", func() error {
		list, err := control.admin.core.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: nodeLabel})
		must(t, err)
		for _, n := range list.Items {
			if n.Name == "becomes-1" {
				return fmt.Errorf("it is there")
			}
		}
		return nil
	})
}
