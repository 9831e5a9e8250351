package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/e2e/cluster"
	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// kubectl runs kubectl as the cluster's administrator.
type kubectl struct {
	t          *testing.T
	command    string
	kubeconfig string
}

func (k kubectl) try(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(k.t.Context(), rigtest.Soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, k.command, append([]string{"--kubeconfig", k.kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %v: %w: %s", args, err, errs.String())
	}
	return string(out), err
}

func (k kubectl) do(stdin string, args ...string) string {
	k.t.Helper()
	out, err := k.try(stdin, args...)
	if err != nil {
		k.t.Fatal(err)
	}
	return out
}

// hubKubeconfig makes a kubeconfig with the rights of deploy/rbac.yaml that talks to the API server through a link.
func (k kubectl) hubKubeconfig(link *rig.Link) string {
	k.t.Helper()
	answer := k.do("{}", "create", "--raw", "/api/v1/namespaces/longshore-system/serviceaccounts/cloudhub/token", "-f", "-")
	var request struct{ Status struct{ Token string } }
	if err := json.Unmarshal([]byte(answer), &request); err != nil {
		k.t.Fatal(err)
	}
	b, err := os.ReadFile(k.kubeconfig)
	if err != nil {
		k.t.Fatal(err)
	}
	b = regexp.MustCompile(`server: "?https://[^"\s,}]+"?`).ReplaceAll(b, []byte(`server: "https://`+link.Addr()+`"`))
	path := filepath.Join(k.t.TempDir(), "hub.kubeconfig")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		k.t.Fatal(err)
	}
	hub := kubectl{k.t, k.command, path}
	hub.do("", "config", "set-credentials", "cloudhub", "--token", request.Status.Token)
	hub.do("", "config", "set-context", "--current", "--user", "cloudhub")
	return path
}

// server is the address of the API server.
func (k kubectl) server() string {
	k.t.Helper()
	u, err := url.Parse(k.do("", "config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"))
	if err != nil {
		k.t.Fatal(err)
	}
	return u.Host
}

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

// podUIDs returns the UIDs of the pods bound to an edge, as Kubernetes has them, sorted.
func (k kubectl) podUIDs(edge string) ([]string, error) {
	out, err := k.try("", "get", "pods", "-A", "--field-selector", "spec.nodeName="+edge, "-o", "jsonpath={.items[*].metadata.uid}")
	uids := strings.Fields(out)
	slices.Sort(uids)
	return uids, err
}

// equal says whether an edge holds exactly the pods that Kubernetes says, count of them, and confirmed so.
func (k kubectl) equal(e *rig.Edge, count int) error {
	want, err := k.podUIDs(e.Name)
	if err != nil {
		return err
	}
	st, err := e.Status(k.t.Context())
	if err != nil {
		return err
	}
	var got []string
	for _, p := range st.Pods {
		got = append(got, p.UID)
	}
	slices.Sort(got)
	if len(want) != count || !slices.Equal(got, want) || !st.List.Synced {
		return fmt.Errorf("the edge holds %v (synced %t, link %s %s), Kubernetes says %v, want %d", got, st.List.Synced, st.Link.State, st.Link.Error, want, count)
	}
	return nil
}

// G1, G6 and G7 against a real API server with its scheduler and controllers: whatever happens to the API server, the hubs, the
// link and the pods, the edge ends with exactly what Kubernetes says, never with an older state.
func TestG1G6G7Kubernetes(t *testing.T) {
	c := cluster.Start(t)
	k := kubectl{t, c.Kubectl, c.Kubeconfig}
	out, err := bin.Run(t.Context(), "cloudhub", "crds")
	if err != nil {
		t.Fatal(err)
	}
	k.do(out, "apply", "--server-side", "-f", "-")
	k.do("", "wait", "--for=condition=Established", "crd/edges.longshore.dev", "crd/models.longshore.dev")
	k.do("", "apply", "-f", "../deploy/namespace.yaml", "-f", "../deploy/rbac.yaml")

	s := rigtest.NewSite(t, bin)
	api, err := rig.NewLink(k.server())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	s.Hub.Kubeconfig = k.hubKubeconfig(api)
	s.Hub.Args = []string{"--hub-name", "hub-1"}
	k.do("apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: dock-1}\nspec: {pods: true}\n", "apply", "-f", "-")
	s.StartHub()
	e := s.Edge("dock-1", "")
	s.Start(e)

	k.do(deployment, "apply", "-f", "-")
	rigtest.Eventually(t, "the scheduler places the Deployment's pods on the edge", func() error { return k.equal(e, 2) })
	rigtest.Eventually(t, "kubectl shows the pods waiting for a runtime", func() error {
		out, err := k.try("", "get", "pods", "-l", "app=web")
		if err == nil && strings.Count(out, "NoRuntime") != 2 {
			err = fmt.Errorf("%s", out)
		}
		return err
	})

	k.do("", "set", "image", "deployment/web", "web=example.com/web:2")
	// The new pods never become ready without a runtime, so the rollout keeps old and new ones; the rest is deleted by hand.
	k.do("", "scale", "deployment/web", "--replicas=1")
	rigtest.Eventually(t, "deleted pods leave once the edge has let them go", func() error {
		uids, err := k.podUIDs("dock-1")
		if err != nil {
			return err
		}
		return k.equal(e, len(uids))
	})
	k.do("", "delete", "deployment/web")
	rigtest.Eventually(t, "nothing is left", func() error { return k.equal(e, 0) })

	solo := func(tag string) {
		k.do("apiVersion: v1\nkind: Pod\nmetadata: {name: solo}\nspec: {nodeName: dock-1, automountServiceAccountToken: false, containers: [{name: a, image: \"example.com/a:"+tag+"\"}]}\n", "apply", "-f", "-")
	}
	solo("1")
	rigtest.Eventually(t, "a bare pod", func() error { return k.equal(e, 1) })
	first, _ := k.podUIDs("dock-1")
	s.Cut("dock-1")
	rigtest.Eventually(t, "the link is seen down", func() error {
		st, err := e.Status(t.Context())
		if err == nil && st.Link.State != "down" {
			err = fmt.Errorf("link is %s", st.Link.State)
		}
		return err
	})
	k.do("", "delete", "pod", "solo", "--force", "--grace-period=0")
	solo("2")
	s.Restore("dock-1")
	rigtest.Eventually(t, "only the pod re-created under the same name", func() error { return k.equal(e, 1) })
	if second, _ := k.podUIDs("dock-1"); slices.Equal(first, second) {
		t.Error("the pod was not re-created: the test shows nothing")
	}

	if err := c.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.do("", "delete", "pod", "solo", "--wait=false")
	rigtest.Eventually(t, "after a restart of the API server", func() error { return k.equal(e, 0) })

	s.Hub.Kill()
	solo("3")
	s.StartHub()
	rigtest.Eventually(t, "after kill -9 of the hub", func() error { return k.equal(e, 1) })

	shipModels(s, k, e)
	laggingHub(s, k, e, solo)
}

// shipModels ships a good version, then one whose file is broken although its digest is right: the good one must serve on, and
// kubectl must show who failed.
func shipModels(s *rigtest.Site, k kubectl, e *rig.Edge) {
	counts := func(want string) func() error {
		return func() error {
			got, err := k.try("", "get", "model", "bearing", "-o", "jsonpath={.status.observedVersion} {.status.desired} {.status.serving} {.status.failed}")
			if err == nil && got != want {
				err = fmt.Errorf("version, desired, serving, failed: %q, want %q", got, want)
			}
			return err
		}
	}
	k.do(model(k.t, s, "1", bearingModel(k.t, "1")), "apply", "-f", "-")
	rigtest.Eventually(k.t, "version 1 serves", counts("1 1 1 0"))
	whole := bearingModel(k.t, "2")
	k.do(model(k.t, s, "2", whole[:len(whole)/2]), "apply", "-f", "-")
	rigtest.Eventually(k.t, "version 2 failed", counts("2 1 0 1"))
	if err := serves(k.t.Context(), e, "1", "Failed"); err != nil {
		k.t.Error(err)
	}
	if out := k.do("", "get", "models"); !regexp.MustCompile(`bearing +2 +1 +0 +0 +1 +0 `).MatchString(out) {
		k.t.Errorf("kubectl get models:\n%s", out)
	}
}

// laggingHub moves the edge to a second hub that was cut off from the API server before the last changes: the edge must not be
// taken back to what that hub knew, and must follow it once it has caught up.
func laggingHub(s *rigtest.Site, k kubectl, e *rig.Edge, solo func(tag string)) {
	t := k.t
	second, err := rig.NewHub(bin, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	api, err := rig.NewLink(k.server())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	second.Kubeconfig = k.hubKubeconfig(api)
	// Hubs of one cluster share the enrolled edges and the signing key.
	second.Args = []string{"--hub-name", "hub-2", "--token-file", filepath.Join(s.Hub.Data(), "tokens"), "--signing-key", filepath.Join(s.Hub.Data(), "signing-key.pem")}
	if err := second.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := second.Process
	s.EndWithTest(p)
	api.Cut()
	k.do("", "delete", "pod", "solo", "--force", "--grace-period=0")
	solo("4")
	rigtest.Eventually(t, "the first hub has the change", func() error { return k.equal(e, 1) })
	newest, _ := k.podUIDs("dock-1")

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
	k.do("", "delete", "pod", "solo", "--force", "--grace-period=0")
	solo("5")
	rigtest.Eventually(t, "the second hub has caught up", func() error { return k.equal(e, 1) })
}
