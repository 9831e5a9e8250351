package plain_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/plain"
)

func testPod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "u1"},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "c", Image: "nginx:1", Args: []string{"-g"},
			Env: []corev1.EnvVar{{Name: "MODE", Value: "fast"}, {Name: "TOKEN", ValueFrom: &corev1.EnvVarSource{
				SecretKeyRef: &corev1.SecretKeySelector{Key: "token"},
			}}},
		}}},
	}
}

// TestIndexShowsVersions: a device that reads only plain/index would not see what changed, or was deleted.
func TestIndexShowsVersions(t *testing.T) {
	o, err := desired.FromPod(testPod())
	if err != nil {
		t.Fatal(err)
	}
	m, err := desired.FromModel(&longshorepb.Model{Namespace: "default", Name: "bearing", Uid: "u2", Version: "2"})
	if err != nil {
		t.Fatal(err)
	}
	l := desired.NewList([]*longshorepb.Entry{
		o.Entry(), m.Entry(), desired.AbsentEntry(longshorepb.Kind_KIND_SECRET, "default", "s", "not found"),
	})
	want := fmt.Sprintf(`{"edge":"e1","version":%q,"pods":[{"namespace":"default","name":"web","uid":"u1","version":%q}],`+
		`"models":[{"namespace":"default","name":"bearing","uid":"u2","version":%q}]}`,
		l.Digest.Short(), o.Digest.Short(), m.Digest.Short())
	if got := string(plain.NewIndex("e1", l).JSON()); got != want {
		t.Errorf("index\n got %s\nwant %s", got, want)
	}
	if got := string(plain.NewIndex("e1", desired.NewList(nil)).JSON()); !strings.Contains(got, `"pods":[],"models":[]`) {
		t.Errorf("an index of nothing is %s, a device that iterates wants empty arrays", got)
	}
}

// TestPodHidesReferences: G5 would break if a device's JSON held what comes from Secrets.
func TestPodHidesReferences(t *testing.T) {
	got := string(plain.FromPod(testPod(), desired.Digest{1}).JSON())
	want := `{"namespace":"default","name":"web","uid":"u1","version":"010000000000",` +
		`"containers":[{"name":"c","image":"nginx:1","args":["-g"],"env":{"MODE":"fast"}}]}`
	if got != want {
		t.Errorf("pod\n got %s\nwant %s", got, want)
	}
}

// TestModel: a device would not find its model's file or topics.
func TestModel(t *testing.T) {
	m := &longshorepb.Model{
		Namespace: "default", Name: "bearing", Uid: "u2", Version: "2",
		Variants: []*longshorepb.ModelVariant{{
			Name: "small", Format: "onnx", Digest: "sha256:00", SizeBytes: 7, Requires: &longshorepb.ModelRequirements{Arch: "arm64"},
		}},
		Bindings: []*longshorepb.ModelBinding{{Input: "vib/+", Output: "fault/{1}"}},
	}
	got := string(plain.FromModel(m, desired.Digest{1}).JSON())
	want := `{"namespace":"default","name":"bearing","uid":"u2","version":"010000000000","modelVersion":"2",` +
		`"variants":[{"name":"small","format":"onnx","digest":"sha256:00","sizeBytes":7,"arch":"arm64"}],` +
		`"bindings":[{"input":"vib/+","output":"fault/{1}"}]}`
	if got != want {
		t.Errorf("model\n got %s\nwant %s", got, want)
	}
}

// TestBounded: a device with a small buffer would be cut off by a message above 16 KiB.
func TestBounded(t *testing.T) {
	p := testPod()
	p.Spec.Containers[0].Args = []string{strings.Repeat("x", 2*plain.MaxBytes)}
	var entries []*longshorepb.Entry
	m := &longshorepb.Model{Namespace: "default", Name: "m", Version: "1"}
	for i := range 1000 {
		entries = append(entries, &longshorepb.Entry{
			Kind: longshorepb.Kind_KIND_POD, Namespace: "default", Name: fmt.Sprintf("p%d", i), Uid: "u", Digest: make([]byte, 32),
		})
		m.Bindings = append(m.Bindings, &longshorepb.ModelBinding{Input: fmt.Sprintf("topic/%d/temperature", i)})
	}
	for _, b := range [][]byte{
		plain.FromPod(p, desired.Digest{}).JSON(), plain.NewIndex("e1", desired.NewList(entries)).JSON(),
		plain.FromModel(m, desired.Digest{}).JSON(),
	} {
		var v struct {
			Truncated bool `json:"truncated"`
		}
		if err := json.Unmarshal(b, &v); err != nil || !v.Truncated || len(b) > plain.MaxBytes {
			t.Errorf("%d bytes, truncated %v: %v", len(b), v.Truncated, err)
		}
	}
}
