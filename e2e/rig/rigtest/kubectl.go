package rigtest

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
)

// Kubectl runs kubectl as the cluster's administrator, for one test.
type Kubectl struct {
	T          *testing.T
	Command    string
	Kubeconfig string
}

// Try returns what kubectl printed on standard output.
func (k Kubectl) Try(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(k.T.Context(), Soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, k.Command, append([]string{"--kubeconfig", k.Kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %v: %w: %s", args, err, errs.String())
	}
	return string(out), err
}

// Do fails the test when kubectl fails.
func (k Kubectl) Do(stdin string, args ...string) string {
	k.T.Helper()
	out, err := k.Try(stdin, args...)
	if err != nil {
		k.T.Fatal(err)
	}
	return out
}

// HubKubeconfig makes a kubeconfig with the rights of deploy/rbac.yaml that talks to the API server through a link.
func (k Kubectl) HubKubeconfig(link *rig.Link) string {
	k.T.Helper()
	answer := k.Do("{}", "create", "--raw", "/api/v1/namespaces/longshore-system/serviceaccounts/cloudhub/token", "-f", "-")
	var request struct{ Status struct{ Token string } }
	if err := json.Unmarshal([]byte(answer), &request); err != nil {
		k.T.Fatal(err)
	}
	b, err := os.ReadFile(k.Kubeconfig)
	if err != nil {
		k.T.Fatal(err)
	}
	b = regexp.MustCompile(`server: "?https://[^"\s,}]+"?`).ReplaceAll(b, []byte(`server: "https://`+link.Addr()+`"`))
	path := filepath.Join(k.T.TempDir(), "hub.kubeconfig")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		k.T.Fatal(err)
	}
	hub := Kubectl{k.T, k.Command, path}
	hub.Do("", "config", "set-credentials", "cloudhub", "--token", request.Status.Token)
	hub.Do("", "config", "set-context", "--current", "--user", "cloudhub")
	return path
}

// Server is the address of the API server.
func (k Kubectl) Server() string {
	k.T.Helper()
	u, err := url.Parse(k.Do("", "config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"))
	if err != nil {
		k.T.Fatal(err)
	}
	return u.Host
}

// PodUIDs returns the UIDs of the pods bound to an edge, as Kubernetes has them, sorted.
func (k Kubectl) PodUIDs(edge string) ([]string, error) {
	out, err := k.Try("", "get", "pods", "-A", "--field-selector", "spec.nodeName="+edge, "-o", "jsonpath={.items[*].metadata.uid}")
	uids := strings.Fields(out)
	slices.Sort(uids)
	return uids, err
}

// Holds says whether an edge holds exactly the pods that Kubernetes says, count of them, and confirmed so.
func (k Kubectl) Holds(e *rig.Edge, count int) error {
	want, err := k.PodUIDs(e.Name)
	if err != nil {
		return err
	}
	st, err := e.Status(k.T.Context())
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

// Install starts a control plane for the test and installs what the hub needs in it, as docs/KUBERNETES.md does. bin holds the
// commands, repo is the path of the repository.
func Install(t *testing.T, bin rig.Bin, repo string) (*cluster.Cluster, Kubectl) {
	t.Helper()
	c := cluster.Start(t)
	k := Kubectl{t, c.Kubectl, c.Kubeconfig}
	crds, err := bin.Run(t.Context(), "cloudhub", "crds")
	if err != nil {
		t.Fatal(err)
	}
	k.Do(crds, "apply", "--server-side", "-f", "-")
	k.Do("", "wait", "--for=condition=Established", "crd/edges.longshore.dev", "crd/models.longshore.dev")
	k.Do("", "apply", "-f", filepath.Join(repo, "deploy", "namespace.yaml"), "-f", filepath.Join(repo, "deploy", "rbac.yaml"))
	return c, k
}
