package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// checkLeaks fails the test if it leaves goroutines behind.
func checkLeaks(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
}

// recorder stands where the models would be and keeps what it was told.
type recorder struct {
	changed chan struct{}

	mu    sync.Mutex
	calls [][]*longshorepb.Model
}

func (r *recorder) SetDesired(m []*longshorepb.Model) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, m)
}
func (r *recorder) Reports() []*longshorepb.ModelReport { return nil }
func (r *recorder) Changed() <-chan struct{}            { return r.changed }

func (r *recorder) names() (calls int, names string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.calls) == 0 {
		return 0, ""
	}
	var out []string
	for _, m := range r.calls[len(r.calls)-1] {
		out = append(out, m.GetName()+"@"+m.GetVersion())
	}
	return len(r.calls), strings.Join(out, " ")
}

// troubled is a container runtime that fails for some pods and holds others from before.
type troubled struct {
	changed chan types.UID

	mu      sync.Mutex
	held    map[types.UID]bool
	fail    map[string]int // by pod name: how often Sync still fails
	synced  map[string]int
	removed []types.UID
}

func (r *troubled) Version() string           { return "troubled/1" }
func (r *troubled) Changed() <-chan types.UID { return r.changed }
func (r *troubled) Known(context.Context) ([]types.UID, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []types.UID
	for uid := range r.held {
		out = append(out, uid)
	}
	return out, nil
}

func (r *troubled) Sync(_ context.Context, p Pod) (Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.synced[p.Name]++
	if r.fail[p.Name] > 0 {
		r.fail[p.Name]--
		return Result{}, errors.New("no such image")
	}
	r.held[p.UID] = true
	return Result{Status: corev1.PodStatus{Phase: corev1.PodRunning}}, nil
}

func (r *troubled) Remove(_ context.Context, uid types.UID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.held, uid)
	r.removed = append(r.removed, uid)
	return nil
}

func (r *troubled) count(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.synced[name]
}

// world is a reconciler that runs on a real store.
type world struct {
	*Reconciler
	t      *testing.T
	store  *desired.Store
	models *recorder
}

func start(t *testing.T, rt Runtime) *world {
	t.Helper()
	checkLeaks(t)
	store, _, err := desired.OpenStore(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: store, models: &recorder{changed: make(chan struct{}, 1)}}
	w.Reconciler = New(Config{Logger: slog.New(slog.DiscardHandler), Store: store, Models: w.models, Runtime: rt})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("Run:", err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// commit makes a list of the objects the committed one, as a replica would.
func (w *world) commit(absent []*longshorepb.Entry, objects ...desired.Object) {
	w.t.Helper()
	entries := absent
	for _, o := range objects {
		if err := w.store.Apply(desired.SaveObject{Object: o}); err != nil {
			w.t.Fatal(err)
		}
		entries = append(entries, &longshorepb.Entry{
			Kind: o.Kind, Namespace: o.Namespace, Name: o.Name, Uid: o.UID, Digest: o.Digest[:], Size: uint64(len(o.Body)),
		})
	}
	list := desired.NewList(entries)
	for _, a := range []desired.EdgeAction{
		desired.SaveObject{Object: desired.Object{Ref: desired.Ref{Kind: longshorepb.Kind_KIND_LIST}, Digest: list.Digest, Body: list.Body()}},
		desired.Commit{List: list, Cluster: "test"},
	} {
		if err := w.store.Apply(a); err != nil {
			w.t.Fatal(err)
		}
	}
	w.Wake()
}

// eventually polls until ok, with a deadline far beyond what is needed.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func (w *world) report(name string) *longshorepb.PodReport {
	for _, p := range w.Pods() {
		if p.GetName() == name {
			return p
		}
	}
	return nil
}

func (w *world) status(name string) (*longshorepb.PodReport, corev1.PodStatus) {
	w.t.Helper()
	p := w.report(name)
	var s corev1.PodStatus
	if p != nil {
		if err := s.Unmarshal(p.GetStatus()); err != nil {
			w.t.Fatal(err)
		}
	}
	return p, s
}

func pod(name string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "plant", Name: name, UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "registry.example/app:1"}}},
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func made(t *testing.T, o desired.Object, err error) desired.Object {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func podObject(t *testing.T, p *corev1.Pod) desired.Object {
	t.Helper()
	o, err := desired.FromPod(p)
	return made(t, o, err)
}

// Without this, people would see a pod without status on an edge that cannot run it, and not know why.
func TestPodsWaitForARuntime(t *testing.T) {
	w := start(t, None{})
	w.commit(nil, podObject(t, pod("app")))
	eventually(t, "the pod is reported", func() bool { return w.report("app") != nil })
	p, s := w.status("app")
	if s.Phase != corev1.PodPending || p.GetFinished() || len(s.ContainerStatuses) != 1 {
		t.Fatalf("got phase %s, finished %v, containers %v", s.Phase, p.GetFinished(), s.ContainerStatuses)
	}
	if wait := s.ContainerStatuses[0].State.Waiting; wait == nil || wait.Reason != NoRuntime || wait.Message == "" {
		t.Errorf("the container does not say what it waits for: %v", wait)
	}
	o := podObject(t, pod("app"))
	if string(p.GetDigest()) != string(o.Digest[:]) || p.GetUid() != "uid-app" {
		t.Errorf("the report names another pod: %v", p)
	}
}

// Without this, a deleted pod would hang in Terminating for ever on an edge that never started it.
func TestDeletedPodIsFinishedAtOnce(t *testing.T) {
	w := start(t, None{})
	w.commit(nil, podObject(t, pod("app")))
	eventually(t, "the pod is reported", func() bool { return w.report("app") != nil })
	now := metav1.NewTime(time.Unix(1_800_000_000, 0))
	w.commit(nil, podObject(t, pod("app", func(p *corev1.Pod) { p.DeletionTimestamp = &now })))
	eventually(t, "the pod is finished", func() bool { return w.report("app").GetFinished() })
	w.commit(nil)
	eventually(t, "the pod is forgotten", func() bool { return w.report("app") == nil })
}

// Without this, a pod of a folder with a typing error would be tried for ever, or take the others down, and nobody would
// know which line to look at.
func TestInvalidPodIsRejectedAlone(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*corev1.Pod)
		want   string
	}{
		{"no containers", func(p *corev1.Pod) { p.Spec.Containers = nil }, "spec.containers: "},
		{"no image", func(p *corev1.Pod) { p.Spec.Containers[0].Image = " " }, "spec.containers[0].image"},
		{"bad name", func(p *corev1.Pod) { p.Spec.Containers[0].Name = "Main_1" }, "spec.containers[0].name"},
		{"same name", func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{{Name: "main", Image: "a"}}
		}, `spec.containers[0].name: "main" is used twice`},
		{"no volume", func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
		}, `the pod has no volume "data"`},
		{"same volume", func(p *corev1.Pod) { p.Spec.Volumes = []corev1.Volume{{Name: "a"}, {Name: "a"}} }, "spec.volumes[1].name"},
		{"policy", func(p *corev1.Pod) { p.Spec.RestartPolicy = "Sometimes" }, "spec.restartPolicy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := start(t, None{})
			w.commit(nil, podObject(t, pod("bad", c.change)), podObject(t, pod("good")))
			eventually(t, "both pods are reported", func() bool { return w.report("bad") != nil && w.report("good") != nil })
			_, s := w.status("bad")
			if s.Phase != corev1.PodFailed || s.Reason != "InvalidPod" || !strings.Contains(s.Message, c.want) {
				t.Errorf("got %s %s %q, want a message with %q", s.Phase, s.Reason, s.Message, c.want)
			}
			if _, s := w.status("good"); s.Phase != corev1.PodPending {
				t.Errorf("the good pod is %s", s.Phase)
			}
		})
	}
}

// Without this, nobody would learn which ConfigMap or Secret keeps a pod from working, nor when it is there.
func TestMissingObjectsAreNamed(t *testing.T) {
	w := start(t, None{})
	yes := true
	p := pod("app", func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{
			{Name: "a", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}},
			{Name: "b", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "key"}}},
			{Name: "c", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "extra", Optional: &yes}}},
		}
	})
	cm, err := desired.FromConfigMap(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "plant", Name: "settings"}, Data: map[string]string{"a": "b"}})
	settings := made(t, cm, err)
	missing := &longshorepb.Entry{Kind: longshorepb.Kind_KIND_SECRET, Namespace: "plant", Name: "key", Absent: true, Reason: "namespace not opted in"}
	w.commit([]*longshorepb.Entry{missing}, podObject(t, p))
	condition := func() string {
		_, s := w.status("app")
		for _, c := range s.Conditions {
			if c.Type == ObjectsPresent {
				return c.Message
			}
		}
		return ""
	}
	eventually(t, "both are named", func() bool {
		return condition() == "ConfigMap settings: not in the list; Secret key: namespace not opted in"
	})
	w.commit([]*longshorepb.Entry{missing}, podObject(t, p), settings)
	eventually(t, "one is named", func() bool { return condition() == "Secret key: namespace not opted in" })
}

// G2: without this, an edge that boots with no network would serve nothing until the hub is back.
func TestColdBootStartsWhatIsCommitted(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	store, _, err := desired.OpenStore(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	m, err := desired.FromModel(&longshorepb.Model{Namespace: "plant", Name: "bearing", Version: "3"})
	w := &world{t: t, store: store, Reconciler: New(Config{})}
	w.commit(nil, podObject(t, pod("app")), made(t, m, err))
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	if store, _, err = desired.OpenStore(dir, log); err != nil {
		t.Fatal(err)
	}
	models := &recorder{changed: make(chan struct{}, 1)}
	r := New(Config{Logger: log, Store: store, Models: models, Runtime: None{}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	eventually(t, "model and pod are started", func() bool {
		_, names := models.names()
		return names == "bearing@3" && len(r.Pods()) == 1
	})
	cancel()
	if err := errors.Join(<-done, store.Close()); err != nil {
		t.Error(err)
	}
}

// Without this, an edge whose store was lost would stop every pod and remove every model before the hub told it
// what to hold.
func TestNoListMeansNothingIsRemoved(t *testing.T) {
	rt := &troubled{held: map[types.UID]bool{"uid-app": true}, synced: map[string]int{}}
	w := start(t, rt)
	w.Wake()
	w.models.changed <- struct{}{}
	eventually(t, "the reconciler went round", func() bool {
		select {
		case <-w.Changed():
			return true
		default:
			return false
		}
	})
	if calls, _ := w.models.names(); calls != 0 || len(rt.removed) != 0 {
		t.Errorf("without a list %d models were told and %v removed", calls, rt.removed)
	}
	w.commit(nil)
	eventually(t, "an empty list empties the runtime", func() bool {
		rt.mu.Lock()
		defer rt.mu.Unlock()
		return len(rt.removed) == 1 && rt.removed[0] == "uid-app"
	})
}

// Without this, one pod that cannot start would keep the others from starting, or never be tried again.
func TestFailingPodIsTriedAgainAlone(t *testing.T) {
	rt := &troubled{held: map[types.UID]bool{}, fail: map[string]int{"bad": 1}, synced: map[string]int{}, changed: make(chan types.UID)}
	w := start(t, rt)
	w.commit(nil, podObject(t, pod("bad")), podObject(t, pod("good")))
	eventually(t, "the good pod runs", func() bool { _, s := w.status("good"); return s.Phase == corev1.PodRunning })
	eventually(t, "the bad pod runs after its pause", func() bool { _, s := w.status("bad"); return s.Phase == corev1.PodRunning })
	if n := rt.count("bad"); n != 2 {
		t.Errorf("the bad pod was synced %d times, want 2", n)
	}
	if n := rt.count("good"); n != 1 {
		t.Errorf("the good pod was synced %d times although nothing changed", n)
	}
	rt.changed <- "uid-good"
	eventually(t, "a change that the runtime tells of is looked at", func() bool { return rt.count("good") == 2 })
}
