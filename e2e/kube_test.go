package e2e

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

const deployment = `apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      automountServiceAccountToken: false
      nodeSelector: {kubernetes.io/hostname: dock-1}
      tolerations: [{key: longshore.dev/edge, operator: Exists, effect: NoSchedule}]
      containers: [{name: web, image: "example.com/web:1"}]
`

// G1, G6 and G7 against a real API server with its scheduler and controllers: whatever happens to the API server, the hubs, the
// link and the pods, the edge ends with exactly what Kubernetes says, never with an older state.
func TestG1G6G7Kubernetes(t *testing.T) {
	c, k := rigtest.Install(t, bin, "..")
	s := rigtest.NewSite(t, bin)
	api, err := rig.NewLink(k.Server())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	s.Hub.Kubeconfig = k.HubKubeconfig(api)
	s.Hub.Args = []string{"--hub-name", "hub-1"}
	k.Do("apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: dock-1}\nspec: {pods: true}\n", "apply", "-f", "-")
	s.StartHub()
	e := s.Edge("dock-1", "")
	s.Start(e)

	k.Do(deployment, "apply", "-f", "-")
	rigtest.Eventually(t, "the scheduler places the Deployment's pods on the edge", func() error { return k.Holds(e, 2) })
	rigtest.Eventually(t, "kubectl shows the pods waiting for a runtime", func() error {
		out, err := k.Try("", "get", "pods", "-l", "app=web")
		if err == nil && strings.Count(out, "NoRuntime") != 2 {
			err = fmt.Errorf("%s", out)
		}
		return err
	})

	k.Do("", "set", "image", "deployment/web", "web=example.com/web:2")
	// The new pods never become ready without a runtime, so the rollout keeps old and new ones; the rest is deleted by hand.
	k.Do("", "scale", "deployment/web", "--replicas=1")
	rigtest.Eventually(t, "deleted pods leave once the edge has let them go", func() error {
		uids, err := k.PodUIDs("dock-1")
		if err != nil {
			return err
		}
		return k.Holds(e, len(uids))
	})
	k.Do("", "delete", "deployment/web")
	rigtest.Eventually(t, "nothing is left", func() error { return k.Holds(e, 0) })

	solo := func(tag string) {
		k.Do("apiVersion: v1\nkind: Pod\nmetadata: {name: solo}\nspec: {nodeName: dock-1, automountServiceAccountToken: false, containers: [{name: a, image: \"example.com/a:"+tag+"\"}]}\n", "apply", "-f", "-")
	}
	solo("1")
	rigtest.Eventually(t, "a bare pod", func() error { return k.Holds(e, 1) })
	first, _ := k.PodUIDs("dock-1")
	s.Cut("dock-1")
	rigtest.Eventually(t, "the link is seen down", func() error {
		st, err := e.Status(t.Context())
		if err == nil && st.Link.State != "down" {
			err = fmt.Errorf("link is %s", st.Link.State)
		}
		return err
	})
	k.Do("", "delete", "pod", "solo", "--force", "--grace-period=0")
	solo("2")
	s.Restore("dock-1")
	rigtest.Eventually(t, "only the pod re-created under the same name", func() error { return k.Holds(e, 1) })
	if second, _ := k.PodUIDs("dock-1"); slices.Equal(first, second) {
		t.Error("the pod was not re-created: the test shows nothing")
	}

	if err := c.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.Do("", "delete", "pod", "solo", "--wait=false")
	rigtest.Eventually(t, "after a restart of the API server", func() error { return k.Holds(e, 0) })

	s.Hub.Kill()
	solo("3")
	s.StartHub()
	rigtest.Eventually(t, "after kill -9 of the hub", func() error { return k.Holds(e, 1) })

	shipModels(s, k, e)
	laggingHub(s, k, e, solo)
}

// shipModels ships a good version, then one whose file is broken although its digest is right: the good one must serve on, and
// kubectl must show who failed.
func shipModels(s *rigtest.Site, k rigtest.Kubectl, e *rig.Edge) {
	counts := func(want string) func() error {
		return func() error {
			got, err := k.Try("", "get", "model", "bearing", "-o", "jsonpath={.status.observedVersion} {.status.desired} {.status.serving} {.status.failed}")
			if err == nil && got != want {
				err = fmt.Errorf("version, desired, serving, failed: %q, want %q", got, want)
			}
			return err
		}
	}
	k.Do(model(k.T, s, "1", bearingModel(k.T, "1")), "apply", "-f", "-")
	rigtest.Eventually(k.T, "version 1 serves", counts("1 1 1 0"))
	whole := bearingModel(k.T, "2")
	k.Do(model(k.T, s, "2", whole[:len(whole)/2]), "apply", "-f", "-")
	rigtest.Eventually(k.T, "version 2 failed", counts("2 1 0 1"))
	if err := serves(k.T.Context(), e, "1", "Failed"); err != nil {
		k.T.Error(err)
	}
	if out := k.Do("", "get", "models"); !regexp.MustCompile(`bearing +2 +1 +0 +0 +1 +0 `).MatchString(out) {
		k.T.Errorf("kubectl get models:\n%s", out)
	}
}

// laggingHub moves the edge to a second hub that was cut off from the API server before the last changes: the edge must not be
// taken back to what that hub knew, and must follow it once it has caught up.
func laggingHub(s *rigtest.Site, k rigtest.Kubectl, e *rig.Edge, solo func(tag string)) {
	t := k.T
	second, err := rig.NewHub(bin, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	api, err := rig.NewLink(k.Server())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	second.Kubeconfig = k.HubKubeconfig(api)
	// Hubs of one cluster share the enrolled edges and the signing key.
	second.Args = []string{"--hub-name", "hub-2", "--token-file", filepath.Join(s.Hub.Data(), "tokens"), "--signing-key", filepath.Join(s.Hub.Data(), "signing-key.pem")}
	if err := second.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := second.Process
	s.EndWithTest(p)
	api.Cut()
	k.Do("", "delete", "pod", "solo", "--force", "--grace-period=0")
	solo("4")
	rigtest.Eventually(t, "the first hub has the change", func() error { return k.Holds(e, 1) })
	newest, _ := k.PodUIDs("dock-1")

	s.Links["dock-1"].Retarget(second.MQTT)
	s.Files["dock-1"].Retarget(second.HTTP)
	rigtest.Eventually(t, "the edge is at the second hub", func() error {
		edges, err := second.Edges(t.Context())
		if err == nil && edges["dock-1"].Link != "Online" {
			err = fmt.Errorf("%+v", edges["dock-1"])
		}
		return err
	})
	st, err := e.Status(t.Context())
	if err != nil || len(st.Pods) != 1 || st.Pods[0].UID != newest[0] {
		t.Errorf("at a hub that lags, the edge holds %+v, want pod %s; %v", st.Pods, newest[0], err)
	}
	api.Restore()
	k.Do("", "delete", "pod", "solo", "--force", "--grace-period=0")
	solo("5")
	rigtest.Eventually(t, "the second hub has caught up", func() error { return k.Holds(e, 1) })
}
