package kube

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// proofLimit bounds one proof; the mirror asks again.
const proofLimit = 30 * time.Second

// Prove implements mirror.Upstream: it reads what the store itself holds for an edge (its pods, the Edge, the Models, the
// objects that the pods name) and returns when the mirror's cache holds at least that. It fails while the hub is cut off
// from the API server.
func (s *Source) Prove(ctx context.Context, edge string) error {
	ctx, cancel := context.WithTimeout(ctx, proofLimit)
	defer cancel()
	if err := s.prove(ctx, edge); err != nil {
		return fmt.Errorf("prove the view of edge %s: %w", edge, err)
	}
	return nil
}

func (s *Source) prove(ctx context.Context, edge string) error {
	gen, err := s.current()
	if err != nil {
		return err
	}
	only := gen.edges.what
	only.fields = fields.OneTermEqualSelector(metav1.ObjectNameField, edge)
	one, err := check(ctx, gen, gen.edges, only)
	if err != nil {
		return err
	}
	if err := gen.edges.reaches(ctx, one, func(id identity) bool { return id.name == edge }); err != nil {
		return err
	}
	all, err := s.lists.do(ctx, "models", func(ctx context.Context) (snapshot[*v1alpha1.Model], error) {
		return check(ctx, gen, gen.models, gen.models.what)
	})
	if err != nil {
		return err
	}
	if err := gen.models.reaches(ctx, all, func(identity) bool { return true }); err != nil {
		return err
	}
	if len(one.objects) == 1 && one.objects[0].Spec.Pods {
		if err := s.provePods(ctx, gen, edge); err != nil {
			return err
		}
	}
	if now, err := s.current(); err != nil || now != gen {
		return errRestored
	}
	return nil
}

// check lists from the store. An answer from before what the feed already holds means that the store was restored.
func check[T object](ctx context.Context, gen *generation, f *feed[T], what selection) (snapshot[T], error) {
	before := f.at()
	snap, err := list[T](ctx, what)
	if err == nil && older(snap.position, before) {
		gen.restored()
		err = errRestored
	}
	return snap, err
}

func (s *Source) provePods(ctx context.Context, gen *generation, edge string) error {
	if err := s.judge(ctx, edge); err != nil {
		return err
	}
	if host, _ := s.pods.host(edge); !host {
		return nil
	}
	only := gen.pods.what
	only.fields = fields.OneTermEqualSelector("spec.nodeName", edge)
	bound, err := check(ctx, gen, gen.pods, only)
	if err != nil {
		return err
	}
	if err := gen.pods.reaches(ctx, bound, s.pods.boundTo(edge)); err != nil {
		return err
	}
	proven := map[mirror.Reference]bool{}
	for _, p := range bound.objects {
		for _, r := range mirror.References(p) {
			if proven[r] {
				continue
			}
			proven[r] = true
			if err := s.named.prove(ctx, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// prove returns when the cache holds at least what the store holds of one object, or that it may not be read.
func (n *named) prove(ctx context.Context, r mirror.Reference) error {
	w, err := n.find(ctx, r)
	if err != nil || w == nil {
		return err
	}
	for {
		open, known, moved := w.gate.read()
		if known && !open {
			return nil
		}
		if known {
			break
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("ask whether namespace %s is opted in: %w", r.Namespace, ctx.Err())
		}
	}
	all := func(identity) bool { return true }
	key := r.Kind.String() + " " + r.Namespace + "/" + r.Name
	if w.secret != nil {
		snap, err := n.secrets.do(ctx, key, func(ctx context.Context) (snapshot[*corev1.Secret], error) {
			return list[*corev1.Secret](ctx, w.secret.what)
		})
		if err != nil {
			return err
		}
		return w.secret.reaches(ctx, snap, all)
	}
	snap, err := n.configMaps.do(ctx, key, func(ctx context.Context) (snapshot[*corev1.ConfigMap], error) {
		return list[*corev1.ConfigMap](ctx, w.configMap.what)
	})
	if err != nil {
		return err
	}
	return w.configMap.reaches(ctx, snap, all)
}
