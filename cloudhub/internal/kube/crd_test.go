package kube

import (
	"os/exec"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
)

// A mistake in a Model is told by kubectl apply, in words, and never reaches an edge.
func TestBadModelsAreRefused(t *testing.T) {
	namespace(t, "bad")
	for name, c := range map[string]struct {
		change func(*v1alpha1.Model)
		says   string
	}{
		"no-version":      {func(m *v1alpha1.Model) { m.Spec.Version = "" }, "spec.version"},
		"odd-version":     {func(m *v1alpha1.Model) { m.Spec.Version = "1/2" }, "spec.version"},
		"no-variant":      {func(m *v1alpha1.Model) { m.Spec.Variants = nil }, "spec.variants"},
		"same-variants":   {func(m *v1alpha1.Model) { m.Spec.Variants = append(m.Spec.Variants, m.Spec.Variants[0]) }, "Duplicate value"},
		"short-digest":    {func(m *v1alpha1.Model) { m.Spec.Variants[0].Digest = "sha256:ab" }, "digest"},
		"no-size":         {func(m *v1alpha1.Model) { m.Spec.Variants[0].SizeBytes = 0 }, "sizeBytes"},
		"other-format":    {func(m *v1alpha1.Model) { m.Spec.Variants[0].Format = "pickle" }, "format"},
		"other-scheme":    {func(m *v1alpha1.Model) { m.Spec.Variants[0].Source.URI = "ftp://host/x" }, "uri must begin with"},
		"other-engine":    {func(m *v1alpha1.Model) { m.Spec.Variants[0].Requires.Engine = "magic" }, "engine"},
		"binding-nowhere": {func(m *v1alpha1.Model) { m.Spec.Bindings = []v1alpha1.ModelBinding{{Input: "a"}} }, "a binding needs an output topic or a stream"},
		"output-wildcard": {func(m *v1alpha1.Model) { m.Spec.Bindings = []v1alpha1.ModelBinding{{Input: "a", Output: "b/+"}} }, "output must be a topic name"},
		"input-reserved": {func(m *v1alpha1.Model) {
			m.Spec.Bindings = []v1alpha1.ModelBinding{{Input: "longshore/v1/#", Output: "b"}}
		}, "input must not begin"},
		"odd-stream": {func(m *v1alpha1.Model) { m.Spec.Bindings = []v1alpha1.ModelBinding{{Input: "a", Stream: "No"}} }, "stream"},
	} {
		m := modelOf("bad", name, "1", &metav1.LabelSelector{})
		c.change(m)
		err := postModel(m)
		if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := modelOf("bad", "good", "1", nil)
	good.Spec.Bindings = []v1alpha1.ModelBinding{{Input: "line/+/vibration", Output: "line/{1}/class", Stream: "classes"}}
	must(t, postModel(good))
}

// What people type: without the columns, kubectl get edges would show names and ages only.
func TestPrinterColumns(t *testing.T) {
	namespace(t, "columns")
	createEdge(t, edgeWithPods("columns-1", nil))
	createModel(t, modelOf("columns", "model", "1.4.0", nil))
	for what, columns := range map[string][]string{
		"edges":               {"NAME", "LINK", "PODS", "SYNCED", "BACKLOG", "LAST CONTACT", "columns-1"},
		"models=columns":      {"NAME", "VERSION", "DESIRED", "SERVING", "STAGED", "FAILED", "OFFLINE", "AGE", "1.4.0"},
		"ed":                  {"columns-1"},
		"edges.longshore.dev": {"columns-1"},
	} {
		resource, ns, _ := strings.Cut(what, "=")
		text := table(t, resource, ns)
		for _, column := range columns {
			if !strings.Contains(text, column) {
				t.Errorf("kubectl get %s lacks %q:\n%s", resource, column, text)
			}
		}
	}
}

// Without this, an edge that is not in step, or has nothing left to send, would show nothing in its columns, as one that nobody
// knows anything of does.
func TestFalseAndZeroAreShown(t *testing.T) {
	createEdge(t, edgeWithPods("zero-1", nil))
	h := startHub(t, "zero-hub", control.hub)
	state := online("zero-1", 1)
	state.Synced = false
	h.Report(state)
	eventually(t, "the status is written", func() error { return link(t, "zero-1", "zero-hub", 1, linkOnline) })
	for path, want := range map[string]string{"{.status.synced}": "false", "{.status.backlogRecords}": "0"} {
		out, err := exec.CommandContext(t.Context(), control.Kubectl, "--kubeconfig", control.Kubeconfig, "get", "edge", "zero-1", "-o", "jsonpath="+path).Output()
		if err != nil || string(out) != want {
			t.Errorf("%s is %q, error %v; want %s", path, out, err, want)
		}
	}
}

func table(t *testing.T, resource, namespace string) string {
	t.Helper()
	args := []string{"--kubeconfig", control.Kubeconfig, "get", resource}
	if namespace != "" {
		args = append(args, "-n", namespace)
	}
	out, err := exec.CommandContext(t.Context(), control.Kubectl, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
