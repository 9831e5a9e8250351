package mirror_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

func view(c *mirror.Cache, edge string) *mirror.View { return c.View(edge, edgeKey(edge), func() {}) }

func names(l *desired.List) []string {
	if l == nil {
		return nil
	}
	all := []string{}
	for _, e := range l.Entries {
		name := e.Name
		if e.Absent {
			name += " absent: " + e.Reason
		}
		all = append(all, name)
	}
	return all
}

func configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
}

func naming(p *corev1.Pod, configMap string) *corev1.Pod {
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: configMap}}}})
	return p
}

// Without it, a pod would start without the settings that arrive a moment after it, or wait for ever for some that never do.
func TestListWaitsBrieflyForNamedObjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache("e1")
		v := view(c, "e1")
		defer v.Close()
		c.SetPod(naming(pod("e1", "web", "web:1"), "settings"))
		s := v.Snapshot(time.Now())
		if s.List != nil || s.Fresh || time.Until(s.RetryAt) != 2*time.Second {
			t.Fatalf("at once: %v, again in %v; want none before 2 s", names(s.List), time.Until(s.RetryAt))
		}
		<-time.After(time.Until(s.RetryAt))
		if s = v.Snapshot(time.Now()); !slices.Equal(names(s.List), []string{"web", "settings absent: the hub has not found it yet"}) {
			t.Errorf("after 2 s: %q", names(s.List))
		}
		c.SetConfigMap(configMap("settings"))
		if s = v.Snapshot(time.Now()); !slices.Equal(names(s.List), []string{"web", "settings"}) {
			t.Errorf("when it is there: %q", names(s.List))
		}
		c.SetAbsent(longshorepb.Kind_KIND_CONFIG_MAP, "default", "settings", "namespace not opted in")
		if s = v.Snapshot(time.Now()); !slices.Equal(names(s.List), []string{"web", "settings absent: namespace not opted in"}) {
			t.Errorf("when it is refused: %q", names(s.List))
		}
		// An earlier list stands while a later one waits.
		c.SetPod(naming(pod("e1", "zweb", "web:1"), "more"))
		if s = v.Snapshot(time.Now()); s.Fresh || len(s.List.Entries) != 2 {
			t.Errorf("while another is waited for: fresh %v, %q", s.Fresh, names(s.List))
		}
	})
}

// G5: without it, an edge would be sent Secrets of other edges' pods, or one could tell from digests that two Secrets are alike.
func TestG5SecretsAreNamedPerEdge(t *testing.T) {
	c := newCache("e1", "e2", "e3")
	for _, e := range []string{"e1", "e2"} {
		p := pod(e, "web-"+e, "web:1")
		p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "password"}}
		c.SetPod(p)
	}
	c.SetPod(pod("e3", "web-e3", "web:1"))
	c.SetSecret(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "password"}, Data: map[string][]byte{"p": []byte("swordfish")}})
	digests := map[string]desired.Digest{}
	views := map[string]*mirror.View{}
	for _, e := range []string{"e1", "e2", "e3"} {
		views[e] = view(c, e)
		defer views[e].Close()
		for _, entry := range views[e].Snapshot(time.Now()).List.Entries {
			if entry.Kind == longshorepb.Kind_KIND_SECRET {
				digests[e] = desired.Digest(entry.Digest)
			}
		}
	}
	if len(digests) != 2 || digests["e1"] == digests["e2"] {
		t.Fatalf("digests of the Secret: %v, want two different ones", digests)
	}
	for e, v := range views {
		for of, d := range digests {
			if o, ok := v.Object(d); ok != (e == of) {
				t.Errorf("%s reads the Secret as named for %s: %v (%d bytes)", e, of, ok, len(o.Body))
			}
		}
	}
}

// Without it, a pod that was deleted by force and made anew under its name would vanish from the edge with the old one.
func TestTwoPodsOfOneName(t *testing.T) {
	c := newCache("e1")
	v := view(c, "e1")
	defer v.Close()
	old, young := pod("e1", "web", "web:1"), pod("e1", "web", "web:1")
	young.UID = "uid-young"
	c.SetPod(old)
	c.SetPod(young)
	if l := v.Snapshot(time.Now()).List; len(l.Entries) != 2 {
		t.Fatalf("list %q, want both", names(l))
	}
	c.DeletePod("default", "web", old.UID)
	if l := v.Snapshot(time.Now()).List; len(l.Entries) != 1 || l.Entries[0].Uid != "uid-young" {
		t.Errorf("list %v, want the younger alone", l.Entries)
	}
	moved := pod("e2", "web", "web:1")
	moved.UID = "uid-young"
	c.SetPod(moved)
	if l := v.Snapshot(time.Now()).List; len(l.Entries) != 0 {
		t.Errorf("list %v, want none", names(l))
	}
}

// Without it, models would reach edges they are not for, or not reach those whose labels changed.
func TestModelsFollowLabels(t *testing.T) {
	c := newCache("e1")
	v := view(c, "e1")
	defer v.Close()
	c.SetModel(model("bearing", "1", map[string]string{"site": "north"}))
	none, all := model("none", "1", nil), model("all", "1", nil)
	none.Spec.EdgeSelector, all.Spec.EdgeSelector = nil, &metav1.LabelSelector{}
	c.SetModel(none)
	c.SetModel(all)
	broken := model("broken", "1", nil)
	broken.Spec.EdgeSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Near"}}}
	c.SetModel(broken)
	if got := names(v.Snapshot(time.Now()).List); !slices.Equal(got, []string{"all"}) {
		t.Errorf("models %q, want all", got)
	}
	e := edge("e1")
	e.Labels["site"] = "north"
	c.SetEdge(e)
	if got := names(v.Snapshot(time.Now()).List); !slices.Equal(got, []string{"all", "bearing"}) {
		t.Errorf("models %q, want all and bearing", got)
	}
	digest := model("bearing", "1", nil).Spec.Variants[0].Digest
	if !c.MayRead("e1", digest) || c.MayRead("e2", digest) {
		t.Error("the file may be read by the edges that the model selects, and by no others")
	}
	c.DeleteModel("default", "bearing")
	if got := names(v.Snapshot(time.Now()).List); !slices.Equal(got, []string{"all"}) {
		t.Errorf("models %q, want all", got)
	}
}

// Without it, a model would never be fetched, or be fetched for ever.
func TestModelSourcesAreNamedOnce(t *testing.T) {
	c := mirror.NewCache()
	a, b := model("a", "1", nil), model("b", "1", nil)
	b.Spec.Variants = append([]v1alpha1.ModelVariant{}, a.Spec.Variants...)
	c.SetModel(a)
	c.SetModel(b)
	select {
	case <-c.ModelsChanged():
	default:
		t.Error("nobody was told")
	}
	if s := c.ModelSources(); len(s) != 1 || s[0].URI != "file:a" {
		t.Errorf("sources %v, want one", s)
	}
}

// Without it, a ConfigMap or Secret that a container needs would be missing on the edge.
func TestReferences(t *testing.T) {
	local := func(n string) corev1.LocalObjectReference { return corev1.LocalObjectReference{Name: n} }
	p := pod("e1", "web", "web:1")
	p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{local("s1")}
	p.Spec.InitContainers = []corev1.Container{{EnvFrom: []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: local("c1")}}}}}
	p.Spec.Containers[0].Env = []corev1.EnvVar{
		{Name: "A", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: local("c2")}}},
		{Name: "B", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local("s2")}}},
		{Name: "C", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local("s2")}}},
	}
	p.Spec.Volumes = []corev1.Volume{
		{VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s3"}}},
		{VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: local("c3")}}, {Secret: &corev1.SecretProjection{LocalObjectReference: local("s4")}},
		}}}},
	}
	got := []string{}
	for _, r := range mirror.References(p) {
		got = append(got, r.Name)
	}
	if want := []string{"s1", "c1", "c2", "s2", "s3", "c3", "s4"}; !slices.Equal(got, want) {
		t.Errorf("references %v, want %v", got, want)
	}
}

// Measures what a connected edge's list costs the hub to compute anew after one of its ten pods changed.
func BenchmarkListOfTenPods(b *testing.B) {
	c := newCache("e1")
	for i := range 10 {
		c.SetPod(pod("e1", fmt.Sprint("p", i), "web:1"))
	}
	v := view(c, "e1")
	defer v.Close()
	for i := 0; b.Loop(); i++ {
		c.SetPod(pod("e1", "p0", fmt.Sprint("web:", i)))
		v.Snapshot(time.Now())
	}
}
