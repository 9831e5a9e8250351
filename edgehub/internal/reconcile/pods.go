package reconcile

import (
	"cmp"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// ObjectsPresent is the condition that names ConfigMaps and Secrets a pod needs and the edge does not have.
const ObjectsPresent corev1.PodConditionType = "longshore.dev/ObjectsPresent"

func (p Pod) name() string {
	if p.Pod == nil {
		return ""
	}
	return p.Namespace + "/" + p.Name
}

// state is a decoded list.
type state struct {
	pods   map[types.UID]*entry
	models []*longshorepb.Model
}

// object is a ConfigMap or Secret of the list.
type object struct {
	digest    string
	configMap *corev1.ConfigMap
	secret    *corev1.Secret
	absent    string // why, if it is absent
}

type objectName struct {
	kind            longshorepb.Kind
	namespace, name string
}

// decode makes a list and its objects usable. What cannot be decoded is logged and left out; a pod then is invalid.
func decode(list *desired.List, objects []desired.Object, log *slog.Logger) state {
	s := state{pods: map[types.UID]*entry{}}
	named := map[objectName]object{}
	for _, e := range list.Entries {
		if e.GetAbsent() {
			named[objectName{e.GetKind(), e.GetNamespace(), e.GetName()}] = object{absent: cmp.Or(e.GetReason(), "not found")}
		}
	}
	var pods []desired.Object
	for _, o := range objects {
		var err error
		got := object{digest: string(o.Digest[:])}
		switch o.Kind {
		case longshorepb.Kind_KIND_POD:
			pods = append(pods, o)
			continue
		case longshorepb.Kind_KIND_MODEL:
			var m *longshorepb.Model
			if m, err = o.Model(); err == nil {
				s.models = append(s.models, m)
			}
		case longshorepb.Kind_KIND_CONFIG_MAP:
			got.configMap, err = o.ConfigMap()
		case longshorepb.Kind_KIND_SECRET:
			got.secret, err = o.Secret()
		}
		if err != nil {
			log.Error("object of the committed list is unreadable", "kind", o.Kind, "namespace", o.Namespace, "name", o.Name, "error", err)
			got.absent = "unreadable: " + err.Error()
		}
		named[objectName{o.Kind, o.Namespace, o.Name}] = got
	}
	for _, o := range pods {
		s.pods[types.UID(o.UID)] = newEntry(o, named)
	}
	return s
}

func newEntry(o desired.Object, named map[objectName]object) *entry {
	e := &entry{digest: slices.Clone(o.Digest[:]), key: string(o.Digest[:])}
	p, err := o.Pod()
	if err != nil {
		p = &corev1.Pod{}
		p.Namespace, p.Name = o.Namespace, o.Name
		e.invalid = "the pod's spec is unreadable: " + err.Error()
	}
	p.UID = types.UID(o.UID)
	e.pod = Pod{Pod: p, ConfigMaps: map[string]*corev1.ConfigMap{}, Secrets: map[string]*corev1.Secret{}}
	if e.invalid == "" {
		e.invalid = invalid(p)
	}
	for _, ref := range references(p) {
		got, ok := named[objectName{ref.kind, p.Namespace, ref.name}]
		e.key += "\x00" + ref.name + "\x00" + got.digest + "\x00" + got.absent
		switch {
		case (!ok || got.absent != "") && !ref.optional:
			kind := "ConfigMap "
			if ref.kind == longshorepb.Kind_KIND_SECRET {
				kind = "Secret "
			}
			e.pod.Missing = append(e.pod.Missing, kind+ref.name+": "+cmp.Or(got.absent, "not in the list"))
		case got.configMap != nil:
			e.pod.ConfigMaps[ref.name] = got.configMap
		case got.secret != nil:
			e.pod.Secrets[ref.name] = got.secret
		}
	}
	return e
}

func missingCondition(p Pod) corev1.PodCondition {
	return corev1.PodCondition{
		Type: ObjectsPresent, Status: corev1.ConditionFalse, Reason: "Missing",
		Message: strings.Join(p.Missing, "; "), LastTransitionTime: p.CreationTimestamp,
	}
}

// reference is a ConfigMap or Secret that a pod names.
type reference struct {
	kind     longshorepb.Kind
	name     string
	optional bool
}

// references returns every ConfigMap and Secret a pod names, sorted, once each; optional only if every mention is.
func references(p *corev1.Pod) []reference {
	seen := map[reference]bool{} // without optional -> optional
	add := func(kind longshorepb.Kind, name string, optional *bool) {
		if name == "" {
			return
		}
		key := reference{kind: kind, name: name}
		was, ok := seen[key]
		seen[key] = optional != nil && *optional && (was || !ok)
	}
	const cm, secret = longshorepb.Kind_KIND_CONFIG_MAP, longshorepb.Kind_KIND_SECRET
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, e := range c.EnvFrom {
			if s := e.ConfigMapRef; s != nil {
				add(cm, s.Name, s.Optional)
			}
			if s := e.SecretRef; s != nil {
				add(secret, s.Name, s.Optional)
			}
		}
		for _, e := range c.Env {
			if e.ValueFrom == nil {
				continue
			}
			if s := e.ValueFrom.ConfigMapKeyRef; s != nil {
				add(cm, s.Name, s.Optional)
			}
			if s := e.ValueFrom.SecretKeyRef; s != nil {
				add(secret, s.Name, s.Optional)
			}
		}
	}
	for _, v := range p.Spec.Volumes {
		if s := v.ConfigMap; s != nil {
			add(cm, s.Name, s.Optional)
		}
		if s := v.Secret; s != nil {
			add(secret, s.SecretName, s.Optional)
		}
		if v.Projected == nil {
			continue
		}
		for _, src := range v.Projected.Sources {
			if s := src.ConfigMap; s != nil {
				add(cm, s.Name, s.Optional)
			}
			if s := src.Secret; s != nil {
				add(secret, s.Name, s.Optional)
			}
		}
	}
	for _, s := range p.Spec.ImagePullSecrets {
		add(secret, s.Name, nil)
	}
	var out []reference
	for ref, optional := range seen {
		ref.optional = optional
		out = append(out, ref)
	}
	slices.SortFunc(out, func(a, b reference) int { return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name)) })
	return out
}

// invalid says what makes a pod impossible to run, empty if nothing does. An API server lets no such pod pass; a folder of
// YAML may.
func invalid(p *corev1.Pod) string {
	if len(p.Spec.Containers) == 0 {
		return "spec.containers: a pod needs at least one container"
	}
	volumes := map[string]bool{}
	for i, v := range p.Spec.Volumes {
		if volumes[v.Name] || v.Name == "" {
			return fmt.Sprintf("spec.volumes[%d].name: %q is empty or used twice", i, v.Name)
		}
		volumes[v.Name] = true
	}
	names := map[string]bool{}
	check := func(field string, containers []corev1.Container) string {
		for i, c := range containers {
			at := fmt.Sprintf("spec.%s[%d]", field, i)
			if errs := validation.IsDNS1123Label(c.Name); len(errs) > 0 {
				return fmt.Sprintf("%s.name: %q: %s", at, c.Name, errs[0])
			}
			if names[c.Name] {
				return fmt.Sprintf("%s.name: %q is used twice", at, c.Name)
			}
			names[c.Name] = true
			if strings.TrimSpace(c.Image) == "" {
				return at + ".image: a container needs an image"
			}
			for k, m := range c.VolumeMounts {
				if !volumes[m.Name] {
					return fmt.Sprintf("%s.volumeMounts[%d].name: the pod has no volume %q", at, k, m.Name)
				}
				if m.MountPath == "" {
					return fmt.Sprintf("%s.volumeMounts[%d].mountPath: is empty", at, k)
				}
			}
		}
		return ""
	}
	if why := cmp.Or(check("initContainers", p.Spec.InitContainers), check("containers", p.Spec.Containers)); why != "" {
		return why
	}
	switch p.Spec.RestartPolicy {
	case "", corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever:
		return ""
	}
	return fmt.Sprintf("spec.restartPolicy: %q is not Always, OnFailure or Never", p.Spec.RestartPolicy)
}
