package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/sync/topic"
)

// complete checks an object as the API server would where it matters here, and fills in what the API server would fill
// in. An error comes with the path of the field it is about.
func complete(o metav1.Object) (path string, err error) {
	if msgs := validation.IsDNS1123Subdomain(o.GetName()); len(msgs) > 0 {
		return "metadata.name", fmt.Errorf("metadata.name %q: %s", o.GetName(), msgs[0])
	}
	for k, v := range o.GetLabels() {
		if msgs := append(validation.IsQualifiedName(k), validation.IsValidLabelValue(v)...); len(msgs) > 0 {
			return "metadata.labels", fmt.Errorf("label %s=%s: %s", k, v, msgs[0])
		}
	}
	kind := fmt.Sprintf("%T", o)
	if e, ok := o.(*v1alpha1.Edge); ok {
		if e.Namespace != "" {
			return "metadata.namespace", errors.New("an Edge has no namespace")
		}
		e.UID = uid(kind, e.Name)
		return "metadata.name", topic.ValidEdge(e.Name)
	}
	if o.GetNamespace() == "" {
		o.SetNamespace(metav1.NamespaceDefault)
	}
	if msgs := validation.IsDNS1123Label(o.GetNamespace()); len(msgs) > 0 {
		return "metadata.namespace", fmt.Errorf("metadata.namespace %q: %s", o.GetNamespace(), msgs[0])
	}
	o.SetUID(uid(kind, o.GetNamespace(), o.GetName()))
	switch o := o.(type) {
	case *corev1.Pod:
		return completePod(o)
	case *corev1.Secret:
		if len(o.StringData) > 0 {
			data := maps.Clone(o.Data)
			if data == nil {
				data = map[string][]byte{}
			}
			for k, v := range o.StringData {
				data[k] = []byte(v)
			}
			o.Data, o.StringData = data, nil
		}
	case *v1alpha1.Model:
		return completeModel(o)
	}
	return "", nil
}

func completePod(p *corev1.Pod) (path string, err error) {
	if p.Spec.NodeName == "" {
		return "spec", errors.New("spec.nodeName is missing: name the Edge that should run this pod")
	}
	if err := topic.ValidEdge(p.Spec.NodeName); err != nil {
		return "spec.nodeName", fmt.Errorf("spec.nodeName: %w", err)
	}
	if len(p.Spec.Containers) == 0 {
		return "spec", errors.New("spec.containers is empty: a pod needs a container")
	}
	seen := map[string]bool{}
	for i, c := range p.Spec.Containers {
		at := fmt.Sprintf("spec.containers[%d]", i)
		if msgs := validation.IsDNS1123Label(c.Name); len(msgs) > 0 {
			return at + ".name", fmt.Errorf("%s.name %q: %s", at, c.Name, msgs[0])
		}
		if seen[c.Name] {
			return at + ".name", fmt.Errorf("%s.name %q is taken by another container of this pod", at, c.Name)
		}
		seen[c.Name] = true
		if c.Image == "" {
			return at, fmt.Errorf("%s.image is missing", at)
		}
	}
	p.Status = corev1.PodStatus{}
	if p.Spec.RestartPolicy == "" {
		p.Spec.RestartPolicy = corev1.RestartPolicyAlways
	}
	if p.Spec.TerminationGracePeriodSeconds == nil {
		p.Spec.TerminationGracePeriodSeconds = new(int64(corev1.DefaultTerminationGracePeriodSeconds))
	}
	if p.Spec.DNSPolicy == "" {
		p.Spec.DNSPolicy = corev1.DNSClusterFirst
	}
	// The pod's UID is its hash: whatever changes makes it another pod.
	p.UID = ""
	js, err := json.Marshal(p)
	if err != nil {
		return "", err
	}
	p.UID = uid("Pod", string(js))
	return "", nil
}

var (
	versionPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	digestPattern  = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	streamPattern  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
)

// completeModel checks what the Model CRD's schema checks in a cluster.
func completeModel(m *v1alpha1.Model) (path string, err error) {
	m.Status = v1alpha1.ModelStatus{}
	if !versionPattern.MatchString(m.Spec.Version) {
		return "spec.version", fmt.Errorf("spec.version %q must be 1 to 63 letters, digits, '.', '_' or '-', with a letter or digit at both ends", m.Spec.Version)
	}
	if m.Spec.EdgeSelector != nil {
		if _, err := metav1.LabelSelectorAsSelector(m.Spec.EdgeSelector); err != nil {
			return "spec.edgeSelector", fmt.Errorf("spec.edgeSelector: %w", err)
		}
	}
	if n := len(m.Spec.Variants); n == 0 || n > 16 {
		return "spec.variants", fmt.Errorf("spec.variants has %d entries, must have 1 to 16", n)
	}
	seen := map[string]bool{}
	for i, v := range m.Spec.Variants {
		at := fmt.Sprintf("spec.variants[%d]", i)
		if v.Name == "" || len(v.Name) > 63 || seen[v.Name] {
			return at + ".name", fmt.Errorf("%s.name %q must be unique, of 1 to 63 bytes", at, v.Name)
		}
		seen[v.Name] = true
		if field, err := checkVariant(v); err != nil {
			return at + "." + field, fmt.Errorf("%s.%s: %w", at, field, err)
		}
	}
	if len(m.Spec.Bindings) > 16 {
		return "spec.bindings", fmt.Errorf("spec.bindings has %d entries, may have 16", len(m.Spec.Bindings))
	}
	for i, b := range m.Spec.Bindings {
		if field, err := checkBinding(b); err != nil {
			at := fmt.Sprintf("spec.bindings[%d].%s", i, field)
			return at, fmt.Errorf("%s: %w", at, err)
		}
	}
	return "", nil
}

func checkVariant(v v1alpha1.ModelVariant) (field string, err error) {
	oneOf := func(s string, allowed ...string) error {
		for _, a := range allowed {
			if s == a {
				return nil
			}
		}
		return fmt.Errorf("%q must be one of %q", s, allowed)
	}
	if err := oneOf(v.Format, "onnx"); err != nil {
		return "format", err
	}
	if err := oneOf(v.Precision, "", "fp32", "fp16", "int8"); err != nil {
		return "precision", err
	}
	if err := oneOf(v.Requires.Arch, "", "amd64", "arm64", "arm"); err != nil {
		return "requires.arch", err
	}
	if err := oneOf(v.Requires.Engine, "", "onnxruntime", "gomlx"); err != nil {
		return "requires.engine", err
	}
	uri := v.Source.URI
	if !strings.HasPrefix(uri, "http://") && !strings.HasPrefix(uri, "https://") && !strings.HasPrefix(uri, "file:") {
		return "source.uri", fmt.Errorf("want an address such as http://…, https://… or file:…, got %q", uri)
	}
	if !digestPattern.MatchString(v.Digest) {
		return "digest", fmt.Errorf("%q must be sha256: and 64 lower-case hexadecimal digits (sha256sum prints them)", v.Digest)
	}
	if v.SizeBytes < 1 {
		return "sizeBytes", fmt.Errorf("%d must be the size of the file in bytes", v.SizeBytes)
	}
	return "", nil
}

func checkBinding(b v1alpha1.ModelBinding) (field string, err error) {
	if err := topic.ValidFilter(b.Input); err != nil {
		return "input", err
	}
	if b.Output == "" && b.Stream == "" {
		return "output", errors.New("a binding needs an output topic or a stream")
	}
	if b.Output != "" {
		if err := topic.ValidName(b.Output); err != nil {
			return "output", err
		}
	}
	if b.Stream != "" && !streamPattern.MatchString(b.Stream) {
		return "stream", fmt.Errorf("%q must be 1 to 63 lower-case letters, digits, '-' or '.'", b.Stream)
	}
	return "", nil
}
