package manifest

import (
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

const goodPod = `apiVersion: v1
kind: Pod
metadata:
  name: web
spec:
  nodeName: dock-1
  containers:
  - name: web
    image: nginx:1.27
`

const goodModel = `apiVersion: longshore.dev/v1alpha1
kind: Model
metadata:
  name: bearing
  namespace: plant
spec:
  version: "1"
  edgeSelector: {}
  variants:
  - name: fp32
    format: onnx
    source: {uri: "file:bearing.onnx"}
    digest: sha256:0000000000000000000000000000000000000000000000000000000000000000
    sizeBytes: 10
  bindings:
  - input: sensors/+/vibration
    output: results/{1}
    stream: faults
`

// A person who mistypes a manifest loses an afternoon unless the message says which line to mend and why.
func TestBadManifestsNameLineAndReason(t *testing.T) {
	for _, c := range []struct {
		name, text string
		line       int
		reason     string
	}{
		{"syntax", "apiVersion: v1\nkind: Pod\nmetadata: [\n", 3, "malformed YAML"},
		{"tab", "apiVersion: v1\nkind: Pod\n\tmetadata: {}\n", 2, "found a tab character"}, // go-yaml names the line it came from
		{"not an object", "- a\n- b\n", 1, "must be an object"},
		{"no kind", "apiVersion: v1\n", 1, "not a kind this folder may hold"},
		{"another kind", "---\napiVersion: apps/v1\nkind: Deployment\n", 3, `apps/v1 "Deployment" is not a kind`},
		{"old version", "apiVersion: longshore.dev/v1\nkind: Model\n", 2, "not a kind"},
		{"missing nodeName", strings.Replace(goodPod, "  nodeName: dock-1\n", "", 1), 5, "spec.nodeName is missing"},
		{"bad nodeName", strings.Replace(goodPod, "dock-1", "Dock_1", 1), 6, "not a DNS subdomain"},
		{"second document", goodPod + "---\n" + strings.Replace(goodPod, "image:", "imagee:", 1), 19, `unknown field "spec.containers[0].imagee"`},
		{"unknown field", strings.Replace(goodPod, "spec:", "spec:\n  restart: Always", 1), 6, `unknown field "spec.restart"`},
		{"duplicate key", goodPod + "kind: Pod\n", 1, "already"},
		{"wrong type", strings.Replace(goodPod, "nodeName: dock-1", "nodeName: [1]", 1), 1, "cannot unmarshal"},
		{"no containers", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: e}\n", 4, "spec.containers is empty"},
		{"no image", strings.Replace(goodPod, "    image: nginx:1.27\n", "", 1), 8, "image is missing"},
		{"bad name", strings.Replace(goodPod, "name: web\nspec", "name: Web\nspec", 1), 4, "metadata.name"},
		{"path in namespace", strings.Replace(goodPod, "name: web\nspec", "name: web\n  namespace: ../../etc\nspec", 1), 5, "metadata.namespace"},
		{"bad label", strings.Replace(goodPod, "name: web\nspec", "name: web\n  labels: {a: 'b c'}\nspec", 1), 5, "label a=b c"},
		{"edge with namespace", "apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: a, namespace: b}\n", 3, "no namespace"},
		{"model digest", strings.Replace(goodModel, "sha256:0", "sha256:X", 1), 13, "digest"},
		{"model size", strings.Replace(goodModel, "sizeBytes: 10", "sizeBytes: -1", 1), 14, "sizeBytes"},
		{"model format", strings.Replace(goodModel, "onnx\n", "gguf\n", 1), 11, `"gguf" must be one of`},
		{"model uri", strings.Replace(goodModel, "file:bearing.onnx", "ftp://x/y", 1), 12, "want an address such as"},
		{"model filter", strings.Replace(goodModel, "sensors/+/vibration", "sensors/#/x", 1), 16, "'#' may only be"},
		{"model binding", strings.Replace(goodModel, "    output: results/{1}\n    stream: faults\n", "", 1), 16, "needs an output topic or a stream"},
		{"model version", strings.Replace(goodModel, `version: "1"`, `version: "../1"`, 1), 7, "spec.version"},
		{"control characters", "apiVersion: \"v1\x01\"\n", 1, "malformed YAML"},
	} {
		t.Run(c.name, func(t *testing.T) {
			objects, problems := parse("f.yaml", []byte(c.text))
			if len(objects) != 0 || len(problems) != 1 {
				t.Fatalf("got %d objects and problems %v, want one problem", len(objects), problems)
			}
			if p := problems[0]; p.Line != c.line || !strings.Contains(p.Reason, c.reason) {
				t.Errorf("got %v, want line %d and %q", p, c.line, c.reason)
			}
		})
	}
}

// A file is taken as a whole: half of a file applied would be a state nobody wrote.
func TestOneBadDocumentRefusesTheFile(t *testing.T) {
	objects, problems := parse("f.yaml", []byte(goodPod+"---\n"+goodModel+"---\nkind: Nonsense\n---\nkind: More\n"))
	if objects != nil || len(problems) != 2 {
		t.Fatalf("got %d objects, problems %v; want none and two", len(objects), problems)
	}
}

func TestGoodManifests(t *testing.T) {
	text := "# a comment\n---\n" + goodPod + "---\n" + goodModel + `---
apiVersion: v1
kind: Secret
metadata: {name: s, namespace: plant}
data: {a: YQ==}
stringData: {b: hello}
---
apiVersion: longshore.dev/v1alpha1
kind: Edge
metadata: {name: dock-1, labels: {site: hamburg}}
spec: {pods: true}
`
	objects, problems := parse("f.yaml", []byte(text))
	if len(problems) > 0 || len(objects) != 4 {
		t.Fatalf("got %d objects, problems %v", len(objects), problems)
	}
	pod := objects[0].value.(*corev1.Pod)
	if pod.Namespace != "default" || pod.Spec.RestartPolicy != corev1.RestartPolicyAlways || pod.UID == "" {
		t.Errorf("pod was not completed: %+v", pod)
	}
	secret := objects[2].value.(*corev1.Secret)
	if string(secret.Data["a"]) != "a" || string(secret.Data["b"]) != "hello" || secret.StringData != nil {
		t.Errorf("secret data %v, stringData %v", secret.Data, secret.StringData)
	}
}

// A folder pod that changes is another pod: an edge must never mistake the new one for the old.
func TestPodUIDIsItsHash(t *testing.T) {
	a, _ := parse("f.yaml", []byte(goodPod))
	b, _ := parse("other.yaml", []byte("# moved\n"+goodPod))
	c, _ := parse("f.yaml", []byte(strings.Replace(goodPod, "1.27", "1.28", 1)))
	if a[0].value.GetUID() != b[0].value.GetUID() {
		t.Error("the same pod in another file has another UID")
	}
	if a[0].value.GetUID() == c[0].value.GetUID() {
		t.Error("a changed pod kept its UID")
	}
}

// How fast a file is read must not decide what it says: what parseGood takes, parseLines takes as the same.
func FuzzParseGoodAgrees(f *testing.F) {
	for _, s := range []string{
		goodPod, goodModel, goodPod + "---\n" + goodModel + "...\n---\n# nothing\n---\n" + goodPod, "%YAML 1.1\n---\n" + goodPod,
		goodPod + "--- {apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {a: yes, b: 'yes', 1: 010}}\n",
		"{apiVersion: v1, kind: ConfigMap, metadata: {name: s}}\n{apiVersion: v1, kind: ConfigMap, metadata: {name: t}}\n",
		"apiVersion: v1\nkind: ConfigMap\nmetadata: &m {name: s, labels: {<<: {a: b}}}\ndata: {a: !!str 1, b: \"2026-01-01\", c: |\n  x\n   y\n\n, d: *m}\n",
		"apiVersion: v1\r\nkind: ConfigMap\r\nmetadata:\r\n  name: s\r\nbinaryData:\r\n  a: !!binary YQ==\r\ndata:\r\n  b: >-\r\n    a\r\n    b\r\n",
		strings.Replace(goodPod, "image:", "stdin: on\n    image:", 1), strings.Replace(goodPod, "nginx:1.27", "1:30", 1),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		fast, ok := parseGood(b)
		if !ok {
			return
		}
		slow, problems := parseLines("f.yaml", b)
		if len(problems) > 0 || len(fast) != len(slow) {
			t.Fatalf("%d objects; by line %d and %v", len(fast), len(slow), problems)
		}
		for i := range slow {
			slow[i].line = 0
			if !reflect.DeepEqual(fast[i], slow[i]) {
				t.Fatalf("object %d is %+v; by line %+v", i, fast[i], slow[i])
			}
		}
	})
}

// Whatever stands in a file, reading it must not end the hub.
func FuzzParse(f *testing.F) {
	for _, s := range []string{goodPod, goodModel, "a: &a [*a]", "- - -", "? {a: b}\n: c", "apiVersion: v1\nkind: Pod\nmetadata: 7\n", "%YAML 9.9\n---\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		objects, problems := parse("f.yaml", b)
		if len(problems) > 0 && len(objects) > 0 {
			t.Fatal("a file is both good and bad")
		}
		for _, p := range problems {
			if p.Line < 1 || p.Reason == "" {
				t.Fatalf("problem without a line or a reason: %+v", p)
			}
		}
	})
}
