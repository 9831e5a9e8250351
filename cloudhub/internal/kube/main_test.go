package kube

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/deploy"
	"github.com/longshore-edge/longshore/e2e/cluster"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// patience is how long a test waits for something that must come; two cores may be shared with much else.
const patience = 90 * time.Second

// control is the one control plane that the tests of this package share, with deploy/ applied.
var control struct {
	*cluster.Cluster
	admin *clients
	// hub is the kubeconfig of the hub's ServiceAccount: what deploy/rbac.yaml does not allow, the hub cannot do here.
	hub string
}

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "longshore-kube-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = startControl(ctx, dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the control plane:", err)
		return 1
	}
	code := m.Run()
	if err := control.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, "stop the control plane:", err)
		return 1
	}
	return code
}

func startControl(ctx context.Context, dir string) (err error) {
	if control.Cluster, err = cluster.Open(ctx, dir, os.Stderr); err != nil {
		return err
	}
	if control.admin, err = connect(control.Kubeconfig); err != nil {
		return err
	}
	root := "../../../deploy/"
	files := [][]byte{deploy.CRDs()}
	for _, name := range []string{"namespace.yaml", "rbac.yaml"} {
		b, err := os.ReadFile(root + name)
		if err != nil {
			return err
		}
		files = append(files, b)
	}
	for _, file := range files {
		for doc := range bytes.SplitSeq(file, []byte("\n---\n")) {
			if err := apply(ctx, doc); err != nil {
				return err
			}
		}
	}
	token, err := control.admin.core.CoreV1().ServiceAccounts("longshore-system").CreateToken(ctx, "cloudhub",
		&authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	config, err := clientcmd.LoadFromFile(control.Kubeconfig)
	if err != nil {
		return err
	}
	for _, user := range config.AuthInfos {
		*user = clientcmdapi.AuthInfo{Token: token.Status.Token}
	}
	control.hub = filepath.Join(dir, "hub.kubeconfig")
	if err := clientcmd.WriteToFile(*config, control.hub); err != nil {
		return err
	}
	// The kinds are served a moment after their definitions are stored.
	deadline := time.Now().Add(patience)
	for {
		err := control.admin.edge.Get().Resource("edges").Do(ctx).Error()
		err = cmpOr(err, control.admin.edge.Get().Resource("models").Do(ctx).Error())
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
		<-time.After(50 * time.Millisecond)
	}
}

func cmpOr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// apply does what kubectl apply --server-side does with one document.
func apply(ctx context.Context, doc []byte) error {
	var o metav1.PartialObjectMetadata
	if err := yaml.Unmarshal(doc, &o); err != nil {
		return err
	}
	if o.Kind == "" {
		return nil
	}
	path := "/api/" + o.APIVersion
	if strings.Contains(o.APIVersion, "/") {
		path = "/apis/" + o.APIVersion
	}
	if o.Namespace != "" {
		path += "/namespaces/" + o.Namespace
	}
	path += "/" + strings.ToLower(o.Kind) + "s/" + o.Name
	err := control.admin.edge.Patch(types.ApplyYAMLPatchType).AbsPath(path).
		Param("fieldManager", "test").Param("force", "true").Body(doc).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("apply %s %s: %w", o.Kind, o.Name, err)
	}
	return nil
}

// hub is a Source with a cache, running.
type hub struct {
	*Source
	cache *mirror.Cache
	stop  func()
}

func startHub(t *testing.T, name, kubeconfig string) *hub {
	t.Helper()
	cache := mirror.NewCache()
	log := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	source, err := New(Config{Kubeconfig: kubeconfig, HubName: name, Logger: log.With("hub", name), Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	source.named.askClosed, source.named.askOpen = time.Second, time.Second
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx) }()
	h := &hub{Source: source, cache: cache}
	h.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("hub %s: Run: %v", name, err)
			}
		case <-time.After(patience):
			t.Errorf("hub %s: Run does not end", name)
		}
	})
	t.Cleanup(h.stop)
	eventually(t, "hub "+name+" is ready", source.Ready)
	return h
}

// testWriter is where a hub logs. It is not used after the test: Run has ended then.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	begin := time.Now()
	deadline := begin.Add(patience)
	for {
		err := check()
		if err == nil {
			if took := time.Since(begin); took > patience/10 {
				t.Logf("%s: after %s", what, took.Round(time.Second))
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %s: %v", what, patience, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// namespace makes a namespace; its pods' default ServiceAccount is there when it returns.
func namespace(t *testing.T, name string) {
	t.Helper()
	ctx := context.Background()
	_, err := control.admin.core.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	must(t, err)
	eventually(t, "ServiceAccount of "+name, func() error {
		_, err := control.admin.core.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	t.Cleanup(func() {
		_ = control.admin.core.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{})
	})
}

// optIn binds longshore-objects in a namespace, as deploy/examples/opt-in.yaml does.
func optIn(t *testing.T, name string) {
	t.Helper()
	doc, err := os.ReadFile("../../../deploy/examples/opt-in.yaml")
	must(t, err)
	must(t, apply(context.Background(), bytes.ReplaceAll(doc, []byte("namespace: line1"), []byte("namespace: "+name))))
}

func createEdge(t *testing.T, e *v1alpha1.Edge) {
	t.Helper()
	must(t, control.admin.edge.Post().Resource("edges").Body(e).Do(context.Background()).Error())
	t.Cleanup(func() {
		err := control.admin.edge.Delete().Resource("edges").Name(e.Name).Do(context.Background()).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
}

func edgeWithPods(name string, labels map[string]string) *v1alpha1.Edge {
	return &v1alpha1.Edge{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: v1alpha1.EdgeSpec{Pods: true}}
}

func getEdge(t *testing.T, name string) *v1alpha1.Edge {
	t.Helper()
	var e v1alpha1.Edge
	must(t, control.admin.edge.Get().Resource("edges").Name(name).Do(context.Background()).Into(&e))
	return &e
}

func modelOf(namespace, name, version string, selector *metav1.LabelSelector) *v1alpha1.Model {
	return &v1alpha1.Model{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: v1alpha1.ModelSpec{
			Version: version, EdgeSelector: selector,
			Variants: []v1alpha1.ModelVariant{{
				Name: "default", Format: "onnx", Source: v1alpha1.ModelSource{URI: "file:model.onnx"},
				Digest: "sha256:" + strings.Repeat("ab", 32), SizeBytes: 1,
			}},
		},
	}
}

func createModel(t *testing.T, m *v1alpha1.Model) {
	t.Helper()
	must(t, postModel(m))
}

func postModel(m *v1alpha1.Model) error {
	return control.admin.edge.Post().Namespace(m.Namespace).Resource("models").Body(m).Do(context.Background()).Error()
}

// podOn makes a pod that is bound to a Node from the start, as a static pod would be.
func podOn(t *testing.T, namespace, name, node string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	no := false
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			NodeName: node, AutomountServiceAccountToken: &no,
			Containers: []corev1.Container{{Name: "main", Image: "example.org/main:1"}},
		},
	}
	if change != nil {
		change(p)
	}
	made, err := control.admin.core.CoreV1().Pods(namespace).Create(context.Background(), p, metav1.CreateOptions{})
	must(t, err)
	return made
}

// entries returns what a hub would list for an edge, as "kind namespace/name" plus " absent: reason", sorted.
func (h *hub) entries(edge string) []string {
	list := h.list(edge)
	var all []string
	for _, e := range list {
		text := fmt.Sprintf("%s %s/%s", strings.TrimPrefix(e.Kind.String(), "KIND_"), e.Namespace, e.Name)
		if e.Absent {
			text += " absent: " + e.Reason
		}
		all = append(all, text)
	}
	slices.Sort(all)
	return all
}

func (h *hub) list(edge string) []*longshorepb.Entry {
	v := h.cache.View(edge, make([]byte, 32), func() {})
	defer v.Close()
	snap := v.Snapshot(time.Now())
	if snap.List == nil {
		return nil
	}
	return snap.List.Entries
}

func (h *hub) expect(t *testing.T, edge string, want ...string) {
	t.Helper()
	slices.Sort(want)
	eventually(t, "hub "+h.cfg.HubName+" lists "+strings.Join(want, ", "), func() error {
		if got := h.entries(edge); !slices.Equal(got, want) {
			return fmt.Errorf("it lists %q", got)
		}
		return nil
	})
}

// online is the report of an edge that is connected and has told everything.
func online(edge string, session uint64, pods ...*longshorepb.PodReport) mirror.EdgeState {
	s := mirror.EdgeState{
		Edge: edge, Online: true, Session: session, Sequence: 1, Instance: fmt.Sprintf("%032x", session), LastContact: time.Now(),
		Synced: true, AgentVersion: "v0.1.0", Complete: true, Pods: map[types.UID]*longshorepb.PodReport{},
		Node: &longshorepb.NodeReport{
			Hostname: edge, Os: "linux", Architecture: "arm64", Kernel: "6.1.0", OsImage: "Debian 12", MachineId: "m", BootId: "b",
			CpuMillis: 4000, MemoryBytes: 1 << 30, MaxPods: 20,
		},
	}
	for _, p := range pods {
		s.Pods[types.UID(p.Uid)] = p
	}
	return s
}

func report(t *testing.T, p *corev1.Pod, finished bool, status corev1.PodStatus) *longshorepb.PodReport {
	t.Helper()
	b, err := status.Marshal()
	must(t, err)
	return &longshorepb.PodReport{Namespace: p.Namespace, Name: p.Name, Uid: string(p.UID), Status: b, Finished: finished}
}

func running() corev1.PodStatus {
	return corev1.PodStatus{
		Phase:      corev1.PodRunning,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: corev1.ContainersReady, Status: corev1.ConditionTrue}},
		ContainerStatuses: []corev1.ContainerStatus{{
			Name: "main", Ready: true, Image: "example.org/main:1",
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
		}},
	}
}

func getModel(namespace, name string) (*v1alpha1.Model, error) {
	var m v1alpha1.Model
	err := control.admin.edge.Get().Namespace(namespace).Resource("models").Name(name).Do(context.Background()).Into(&m)
	return &m, err
}
