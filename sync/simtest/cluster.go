package simtest

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// cluster is the one truth: every state Kubernetes was in, the newest last. A restored backup is one more state.
type cluster struct {
	history []state
	// bodies and names know every object and list there ever was.
	bodies map[desired.Digest][]byte
	names  map[desired.Digest]string
}

// state is what each edge should hold.
type state map[string]assignment

type assignment struct {
	objects map[string]desired.Object // by "kind/name"
	list    *desired.List
}

func newCluster() *cluster {
	return &cluster{
		history: []state{{}}, bodies: make(map[desired.Digest][]byte), names: make(map[desired.Digest]string),
	}
}

func (c *cluster) newest() int { return len(c.history) - 1 }

// at returns an edge's assignment in the state of that position.
func (c *cluster) at(pos int, edge string) assignment {
	if a, ok := c.history[pos][edge]; ok {
		return a
	}
	return assignment{list: desired.NewList(nil)}
}

// change appends a state in which edge has other objects.
func (c *cluster) change(edge string, f func(objects map[string]desired.Object)) {
	next := make(state)
	for e, a := range c.history[c.newest()] {
		next[e] = a
	}
	objects := make(map[string]desired.Object)
	for n, o := range c.at(c.newest(), edge).objects {
		objects[n] = o
	}
	f(objects)
	entries := make([]*longshorepb.Entry, 0, len(objects))
	for n, o := range objects {
		entries = append(entries, o.Entry())
		c.bodies[o.Digest] = o.Body
		c.names[o.Digest] = n
	}
	list := desired.NewList(entries)
	next[edge] = assignment{objects: objects, list: list}
	c.bodies[list.Digest] = list.Body()
	if _, ok := c.names[list.Digest]; !ok {
		c.names[list.Digest] = fmt.Sprintf("%s@%d", edge, len(c.history))
	}
	c.history = append(c.history, next)
}

// restore makes an earlier state the newest.
func (c *cluster) restore(pos int) { c.history = append(c.history, c.history[pos]) }

// follows returns the first position not before pos at which edge should hold the list d; -1 if there is none.
func (c *cluster) follows(pos int, edge string, d desired.Digest) int {
	for ; pos < len(c.history); pos++ {
		if c.at(pos, edge).list.Digest == d {
			return pos
		}
	}
	return -1
}

func (c *cluster) name(d desired.Digest) string {
	if d.IsZero() {
		return "nothing"
	}
	if n, ok := c.names[d]; ok {
		return n
	}
	if d == desired.NewList(nil).Digest {
		return "empty"
	}
	return d.Short()
}

// newObject makes the object "kind/name" whose content is text.
func newObject(name, text string, edgeKey []byte) (desired.Object, error) {
	kind, short, _ := strings.Cut(name, "/")
	meta := metav1.ObjectMeta{Namespace: "default", Name: short, UID: types.UID("u-" + kind + "-" + short)}
	switch kind {
	case "pod":
		return desired.FromPod(&corev1.Pod{ObjectMeta: meta, Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "c", Image: "image", Args: []string{text}}},
		}})
	case "cm":
		return desired.FromConfigMap(&corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"text": text}})
	case "secret":
		return desired.FromSecret(&corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{"text": []byte(text)}}, desired.SecretKey(edgeKey))
	case "model":
		return desired.FromModel(&longshorepb.Model{Namespace: meta.Namespace, Name: short, Uid: string(meta.UID), Version: text})
	}
	return desired.Object{}, fmt.Errorf("no kind %q", kind)
}
