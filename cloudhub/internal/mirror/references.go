package mirror

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// Reference names a ConfigMap or a Secret.
type Reference struct {
	Kind            longshorepb.Kind
	Namespace, Name string
}

// References returns the ConfigMaps and Secrets that a pod names and an edge can use: in environments, volumes
// (also projected ones) and image pull secrets, each once, in the order in which they appear. Volumes of network file
// systems name Secrets too; no edge mounts them, so those Secrets stay in the cluster.
func References(p *corev1.Pod) []Reference {
	var refs []Reference
	seen := map[Reference]bool{}
	add := func(kind longshorepb.Kind, name string) {
		r := Reference{kind, p.Namespace, name}
		if name != "" && !seen[r] {
			seen[r] = true
			refs = append(refs, r)
		}
	}
	for _, s := range p.Spec.ImagePullSecrets {
		add(longshorepb.Kind_KIND_SECRET, s.Name)
	}
	environment := func(from []corev1.EnvFromSource, env []corev1.EnvVar) {
		for _, f := range from {
			if f.ConfigMapRef != nil {
				add(longshorepb.Kind_KIND_CONFIG_MAP, f.ConfigMapRef.Name)
			}
			if f.SecretRef != nil {
				add(longshorepb.Kind_KIND_SECRET, f.SecretRef.Name)
			}
		}
		for _, e := range env {
			if e.ValueFrom == nil {
				continue
			}
			if k := e.ValueFrom.ConfigMapKeyRef; k != nil {
				add(longshorepb.Kind_KIND_CONFIG_MAP, k.Name)
			}
			if k := e.ValueFrom.SecretKeyRef; k != nil {
				add(longshorepb.Kind_KIND_SECRET, k.Name)
			}
		}
	}
	for _, c := range p.Spec.InitContainers {
		environment(c.EnvFrom, c.Env)
	}
	for _, c := range p.Spec.Containers {
		environment(c.EnvFrom, c.Env)
	}
	for _, c := range p.Spec.EphemeralContainers {
		environment(c.EnvFrom, c.Env)
	}
	for _, v := range p.Spec.Volumes {
		if v.ConfigMap != nil {
			add(longshorepb.Kind_KIND_CONFIG_MAP, v.ConfigMap.Name)
		}
		if v.Secret != nil {
			add(longshorepb.Kind_KIND_SECRET, v.Secret.SecretName)
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ConfigMap != nil {
				add(longshorepb.Kind_KIND_CONFIG_MAP, s.ConfigMap.Name)
			}
			if s.Secret != nil {
				add(longshorepb.Kind_KIND_SECRET, s.Secret.Name)
			}
		}
	}
	return refs
}
