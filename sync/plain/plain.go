package plain

import (
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// MaxBytes bounds the JSON of every plain message.
const MaxBytes = 16 << 10

// Index is the payload of plain/index: what the edge should hold. A pod or model that is not in it was deleted.
type Index struct {
	Edge string `json:"edge"`
	// Version changes whenever anything of the edge's specs does.
	Version string `json:"version"`
	Pods    []Item `json:"pods"`
	Models  []Item `json:"models"`
	// Truncated is set when not all names fit: Pods and Models hold the first ones.
	Truncated bool `json:"truncated,omitempty"`
}

// Item names one pod or model and its version, which changes when the object does.
type Item struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Version   string `json:"version"`
}

// Pod is the payload of plain/pods/<namespace>.<name>.
type Pod struct {
	Item
	// DeletionTime is set, in RFC 3339, while the pod is being deleted.
	DeletionTime string      `json:"deletionTime,omitempty"`
	Containers   []Container `json:"containers"`
	// Truncated is set when commands, arguments and environment were left out because they do not fit.
	Truncated bool `json:"truncated,omitempty"`
}

// Container is what a device may want to know of a container. Values taken from ConfigMaps and Secrets are not in it.
type Container struct {
	Name    string            `json:"name"`
	Image   string            `json:"image"`
	Command []string          `json:"command,omitempty"`
	Args    []string          `json:"args,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
}

// Model is the payload of plain/models/<namespace>.<name>.
type Model struct {
	Item
	// ModelVersion is the version its author gave it.
	ModelVersion string    `json:"modelVersion"`
	Variants     []Variant `json:"variants"`
	Bindings     []Binding `json:"bindings,omitempty"`
	// Truncated is set when variants or bindings were left out because they do not fit.
	Truncated bool `json:"truncated,omitempty"`
}

// Variant is one file of a model.
type Variant struct {
	Name      string `json:"name"`
	Format    string `json:"format"`
	Precision string `json:"precision,omitempty"`
	// Digest is "sha256:<hex>" of the file.
	Digest string `json:"digest"`
	// SizeBytes of the file.
	SizeBytes uint64 `json:"sizeBytes"`
	// MemoryBytes, Arch and Engine that it needs; 0 and empty: any.
	MemoryBytes uint64 `json:"memoryBytes,omitempty"`
	Arch        string `json:"arch,omitempty"`
	Engine      string `json:"engine,omitempty"`
}

// Binding connects topics of the edge's broker with the model.
type Binding struct {
	Input  string `json:"input"`
	Output string `json:"output,omitempty"`
	Stream string `json:"stream,omitempty"`
}

// NewIndex describes a list.
func NewIndex(edge string, l *desired.List) Index {
	x := Index{Edge: edge, Version: l.Digest.Short(), Pods: []Item{}, Models: []Item{}}
	for _, e := range l.Entries {
		if e.GetAbsent() {
			continue
		}
		item := Item{
			Namespace: e.GetNamespace(), Name: e.GetName(), UID: e.GetUid(), Version: desired.Digest(e.GetDigest()).Short(),
		}
		switch e.GetKind() {
		case longshorepb.Kind_KIND_POD:
			x.Pods = append(x.Pods, item)
		case longshorepb.Kind_KIND_MODEL:
			x.Models = append(x.Models, item)
		}
	}
	return x
}

// FromPod describes a pod whose object has the digest d.
func FromPod(p *corev1.Pod, d desired.Digest) Pod {
	out := Pod{
		Item:       Item{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID), Version: d.Short()},
		Containers: make([]Container, 0, len(p.Spec.Containers)),
	}
	if p.DeletionTimestamp != nil {
		out.DeletionTime = p.DeletionTimestamp.UTC().Format(time.RFC3339)
	}
	for _, c := range p.Spec.Containers {
		pc := Container{Name: c.Name, Image: c.Image, Command: c.Command, Args: c.Args}
		for _, e := range c.Env {
			if e.ValueFrom != nil {
				continue
			}
			if pc.Env == nil {
				pc.Env = make(map[string]string)
			}
			pc.Env[e.Name] = e.Value
		}
		out.Containers = append(out.Containers, pc)
	}
	return out
}

// FromModel describes a model whose object has the digest d.
func FromModel(m *longshorepb.Model, d desired.Digest) Model {
	out := Model{
		Item:         Item{Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid(), Version: d.Short()},
		ModelVersion: m.GetVersion(), Variants: make([]Variant, 0, len(m.GetVariants())),
	}
	for _, v := range m.GetVariants() {
		out.Variants = append(out.Variants, Variant{
			Name: v.GetName(), Format: v.GetFormat(), Precision: v.GetPrecision(), Digest: v.GetDigest(), SizeBytes: v.GetSizeBytes(),
			MemoryBytes: v.GetRequires().GetMemoryBytes(), Arch: v.GetRequires().GetArch(), Engine: v.GetRequires().GetEngine(),
		})
	}
	for _, b := range m.GetBindings() {
		out.Bindings = append(out.Bindings, Binding{Input: b.GetInput(), Output: b.GetOutput(), Stream: b.GetStream()})
	}
	return out
}

// JSON encodes x in at most MaxBytes, the same bytes for the same content.
func (x Index) JSON() []byte {
	for {
		b := encode(x)
		if len(b) <= MaxBytes {
			return b
		}
		x.Truncated = true
		x.Pods, x.Models = x.Pods[:len(x.Pods)*3/4], x.Models[:len(x.Models)*3/4]
	}
}

// JSON encodes p in at most MaxBytes, the same bytes for the same content.
func (p Pod) JSON() []byte {
	b := encode(p)
	if len(b) <= MaxBytes {
		return b
	}
	p.Truncated = true
	slim := make([]Container, 0, len(p.Containers))
	for _, c := range p.Containers {
		slim = append(slim, Container{Name: c.Name, Image: c.Image})
	}
	for p.Containers = slim; ; p.Containers = p.Containers[:len(p.Containers)*3/4] {
		if b = encode(p); len(b) <= MaxBytes || len(p.Containers) == 0 {
			return b
		}
	}
}

// JSON encodes m in at most MaxBytes, the same bytes for the same content.
func (m Model) JSON() []byte {
	for {
		b := encode(m)
		if len(b) <= MaxBytes || len(m.Variants) == 0 && len(m.Bindings) == 0 {
			return b
		}
		m.Truncated = true
		m.Variants, m.Bindings = m.Variants[:len(m.Variants)*3/4], m.Bindings[:len(m.Bindings)*3/4]
	}
}

// encode can't fail for the types above: they hold strings, numbers and booleans only.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return b
}
