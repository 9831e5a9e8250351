package desired

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// TestG7StatusSendsNothing: if a status patch changed the digest, every heartbeat of a pod would go down every slow link.
func TestG7StatusSendsNothing(t *testing.T) {
	p := newPair(t, t.TempDir())
	web := pod("web", 100)
	p.setObjects(must(FromPod(web)))
	p.connect()
	p.run()
	p.heads, p.downBytes = 0, 0
	for i := range 200 {
		patched := web.DeepCopy()
		patched.ResourceVersion, patched.Generation = fmt.Sprint(1000+i), int64(i)
		patched.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: fmt.Sprint(i)}}
		patched.Status.Message = fmt.Sprint("patch ", i)
		patched.Status.Phase = corev1.PodRunning
		before := patched.DeepCopy()
		p.setObjects(must(FromPod(patched)))
		if patched.String() != before.String() {
			t.Fatal("FromPod changed its argument")
		}
		p.run()
	}
	if p.heads != 0 || p.downBytes != 0 {
		t.Errorf("200 status patches sent %d heads and %d bytes", p.heads, p.downBytes)
	}
	deleted := web.DeepCopy()
	deleted.DeletionTimestamp = &metav1.Time{Time: time.Unix(1e9, 0)}
	p.setObjects(must(FromPod(deleted)))
	p.run()
	p.wantCommitted()
	if p.heads != 1 {
		t.Errorf("a deletion timestamp sent %d heads: the edge has to stop the pod", p.heads)
	}
}

// TestPodSpecHash: a container would restart for a label, or keep running an old image.
func TestPodSpecHash(t *testing.T) {
	base := pod("web", 10)
	hash := must(PodSpecHash(base))
	seconds := int64(3)
	same := map[string]func(*corev1.Pod){
		"label":             func(p *corev1.Pod) { p.Labels = map[string]string{"a": "b"} },
		"annotation":        func(p *corev1.Pod) { p.Annotations = map[string]string{"a": "b"} },
		"deletionTimestamp": func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} },
		"status":            func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning },
		"toleration":        func(p *corev1.Pod) { p.Spec.Tolerations = []corev1.Toleration{{Key: "x"}} },
		"grace period":      func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = &seconds },
	}
	for name, change := range same {
		p := base.DeepCopy()
		change(p)
		if must(PodSpecHash(p)) != hash {
			t.Errorf("a changed %s restarts the pod", name)
		}
	}
	other := map[string]func(*corev1.Pod){
		"image":  func(p *corev1.Pod) { p.Spec.Containers[0].Image = "img:2" },
		"env":    func(p *corev1.Pod) { p.Spec.Containers[0].Env[0].Value = "other" },
		"volume": func(p *corev1.Pod) { p.Spec.Volumes = []corev1.Volume{{Name: "v"}} },
	}
	for name, change := range other {
		p := base.DeepCopy()
		change(p)
		if must(PodSpecHash(p)) == hash {
			t.Errorf("a changed %s does not restart the pod", name)
		}
	}
}

// TestG5SecretDigest: whoever sees topics or lists could guess a Secret from its digest, or see that two edges share one.
func TestG5SecretDigest(t *testing.T) {
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "s"}, Data: map[string][]byte{"pin": []byte("1234")}}
	one := must(FromSecret(s, SecretKey(edgeKey)))
	two := must(FromSecret(s, SecretKey([]byte("another edge's credential"))))
	if one.Digest == two.Digest {
		t.Error("a Secret has the same digest for two edges")
	}
	if one.Digest == digestOf(longshorepb.Kind_KIND_CONFIG_MAP, one.Body, [32]byte{}) {
		t.Error("a Secret's digest needs no key")
	}
	if got := must(one.Secret()); string(got.Data["pin"]) != "1234" {
		t.Errorf("decoded %v", got.Data)
	}
}

// TestTooLarge: one huge ConfigMap would keep an edge from everything else it should hold.
func TestTooLarge(t *testing.T) {
	_, err := FromPod(pod("huge", MaxObjectBytes))
	if !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), "pod default/huge") {
		t.Errorf("err = %v, want one that names the pod", err)
	}
}

// TestListOrder: two hubs that read the same state in another order would send edges back and forth between equal lists.
func TestListOrder(t *testing.T) {
	a, b := must(FromPod(pod("a", 1))).Entry(), must(FromModel(&longshorepb.Model{Namespace: "default", Name: "m"})).Entry()
	c := AbsentEntry(longshorepb.Kind_KIND_SECRET, "default", "s", "not found")
	one, two := NewList([]*longshorepb.Entry{a, b, c}), NewList([]*longshorepb.Entry{c, b, a, a})
	if one.Digest != two.Digest {
		t.Error("the digest depends on the order")
	}
	l, err := parseList(one.Body(), MaxObjectBytes)
	if err != nil || l.Digest != one.Digest || len(l.Entries) != 3 {
		t.Errorf("parse: %v %v", l, err)
	}
}

// TestHostileLists: names become paths, topics and container names on the edge.
func TestHostileLists(t *testing.T) {
	good := func() *longshorepb.Entry {
		return &longshorepb.Entry{
			Kind: longshorepb.Kind_KIND_POD, Namespace: "default", Name: "web", Uid: "u1", Digest: make([]byte, 32), Size: 1,
		}
	}
	cases := map[string]func(e *longshorepb.Entry) []*longshorepb.Entry{
		"path in name":       func(e *longshorepb.Entry) []*longshorepb.Entry { e.Name = "../../etc"; return nil },
		"slash in name":      func(e *longshorepb.Entry) []*longshorepb.Entry { e.Name = "a/b"; return nil },
		"wildcard in name":   func(e *longshorepb.Entry) []*longshorepb.Entry { e.Name = "#"; return nil },
		"empty name":         func(e *longshorepb.Entry) []*longshorepb.Entry { e.Name = ""; return nil },
		"dots as namespace":  func(e *longshorepb.Entry) []*longshorepb.Entry { e.Namespace = ".."; return nil },
		"dotted namespace":   func(e *longshorepb.Entry) []*longshorepb.Entry { e.Namespace = "a.b"; return nil },
		"path in uid":        func(e *longshorepb.Entry) []*longshorepb.Entry { e.Uid = "../x"; return nil },
		"pod without uid":    func(e *longshorepb.Entry) []*longshorepb.Entry { e.Uid = ""; return nil },
		"a list in a list":   func(e *longshorepb.Entry) []*longshorepb.Entry { e.Kind = longshorepb.Kind_KIND_LIST; return nil },
		"unknown kind":       func(e *longshorepb.Entry) []*longshorepb.Entry { e.Kind = 77; return nil },
		"short digest":       func(e *longshorepb.Entry) []*longshorepb.Entry { e.Digest = e.Digest[:5]; return nil },
		"huge object":        func(e *longshorepb.Entry) []*longshorepb.Entry { e.Size = MaxObjectBytes + 1; return nil },
		"absent with digest": func(e *longshorepb.Entry) []*longshorepb.Entry { e.Absent = true; return nil },
		"twice":              func(e *longshorepb.Entry) []*longshorepb.Entry { return []*longshorepb.Entry{e, e} },
		"out of order": func(e *longshorepb.Entry) []*longshorepb.Entry {
			f := good()
			f.Name = "aaa"
			return []*longshorepb.Entry{e, f}
		},
		"one digest, 2 names": func(e *longshorepb.Entry) []*longshorepb.Entry {
			f := good()
			f.Name = "zzz"
			return []*longshorepb.Entry{e, f}
		},
	}
	for name, change := range cases {
		e := good()
		entries := change(e)
		if entries == nil {
			entries = []*longshorepb.Entry{e}
		}
		if _, err := parseList(marshal(&longshorepb.List{Entries: entries}), MaxObjectBytes); err == nil {
			t.Errorf("%s: the list is taken", name)
		}
	}
	if _, err := parseList(marshal(&longshorepb.List{Entries: []*longshorepb.Entry{good()}}), MaxObjectBytes); err != nil {
		t.Errorf("a good list is refused: %v", err)
	}
}

// A hub keeps pods packed: what it hands out must be what it took, or edges would refuse it by its digest.
func TestPackedObjectOpens(t *testing.T) {
	for _, value := range []string{"short", noise("a", 2000), strings.Repeat("long ", 1000)} {
		whole := pod("a", 1)
		whole.Spec.Containers[0].Env[0].Value = value
		o := must(FromPod(whole))
		p := o.Pack()
		if got := p.Open(); !p.Holds() || !reflect.DeepEqual(got, o) {
			t.Errorf("packed %+v, opened %+v", o, got)
		}
		if !proto.Equal(p.Entry(), o.Entry()) {
			t.Errorf("entry %v, want %v", p.Entry(), o.Entry())
		}
	}
	if none := (Packed{}); none.Holds() {
		t.Error("nothing holds something")
	}
}
