package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// G1, G6: while the API server is away a hub is not ready and proves nothing; when it is back, the hub goes on by itself, and
// what changed meanwhile arrives. Edges lose nothing in between: the cache stays as it was.
func TestAPIServerRestart(t *testing.T) {
	ctx := context.Background()
	namespace(t, "restart")
	createEdge(t, edgeWithPods("restart-1", nil))
	podOn(t, "restart", "first", "restart-1", nil)
	h := startHub(t, "restart", control.hub)
	h.expect(t, "restart-1", "POD restart/first")

	must(t, control.Kill())
	eventually(t, "the hub is not ready", func() error {
		if h.Ready() == nil {
			return errors.New("it is")
		}
		return nil
	})
	if err := h.Prove(ctx, "restart-1"); err == nil {
		t.Fatal("a hub that is cut off proved its view")
	}
	if got := h.entries("restart-1"); len(got) != 1 {
		t.Fatalf("while the API server is away: %q", got)
	}
	must(t, control.Restart(ctx))
	podOn(t, "restart", "second", "restart-1", nil)
	h.expect(t, "restart-1", "POD restart/first", "POD restart/second")
	eventually(t, "the hub is ready", h.Ready)
	must(t, h.Prove(ctx, "restart-1"))
}

// G1: a hub whose watch is behind must not tell an edge an older state than another hub has told it. A proof returns only when the
// cache has caught up.
func TestProofWaitsForALaggingCache(t *testing.T) {
	ctx := context.Background()
	namespace(t, "lag")
	optIn(t, "lag")
	createEdge(t, edgeWithPods("lag-1", map[string]string{"lag": "yes"}))
	slow := newSlowServer(t)
	h := startHub(t, "lag", slow.kubeconfig)
	h.expect(t, "lag-1")
	named := func(p *corev1.Pod) {
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{
			{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "config"}}},
		}
	}
	config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "config"}, Data: map[string]string{"a": "1"}}
	config, err := control.admin.core.CoreV1().ConfigMaps("lag").Create(ctx, config, metav1.CreateOptions{})
	must(t, err)
	podOn(t, "lag", "old", "lag-1", named)
	h.expect(t, "lag-1", "POD lag/old", "CONFIG_MAP lag/config")
	before := h.digest("lag-1", "config")

	for name, change := range map[string]func(){
		"pod": func() { podOn(t, "lag", "new", "lag-1", nil) },
		"config map": func() {
			config.Data["a"] = "2"
			_, err = control.admin.core.CoreV1().ConfigMaps("lag").Update(ctx, config, metav1.UpdateOptions{})
			must(t, err)
		},
		"model": func() {
			createModel(t, modelOf("lag", "model", "1", &metav1.LabelSelector{MatchLabels: map[string]string{"lag": "yes"}}))
		},
	} {
		slow.hold()
		change()
		proven := make(chan error, 1)
		asked := slow.lists()
		go func() { proven <- h.Prove(ctx, "lag-1") }()
		eventually(t, "the proof has asked the store about the "+name, func() error {
			if slow.lists() == asked {
				return errors.New("not yet")
			}
			return nil
		})
		select {
		case err := <-proven:
			t.Fatalf("%s: proven while the watches stand still: %v", name, err)
		default:
		}
		slow.release()
		must(t, <-proven)
		got := strings.Join(h.entries("lag-1"), ", ")
		changed := string(h.digest("lag-1", "config")) != string(before)
		switch name {
		case "pod":
			if !strings.Contains(got, "POD lag/new") {
				t.Fatalf("proven, but the hub lists %s", got)
			}
		case "config map":
			if !changed {
				t.Fatal("proven, but the hub lists the old ConfigMap")
			}
		case "model":
			if !strings.Contains(got, "MODEL lag/model") {
				t.Fatalf("proven, but the hub lists %s", got)
			}
		}
	}
}

// Whoever stops a hub waits for all of it: nothing of it goes on with the API server or the cache after Run.
func TestRunLeavesNothingBehind(t *testing.T) {
	before := goleak.IgnoreCurrent()
	namespace(t, "behind")
	optIn(t, "behind")
	createEdge(t, edgeWithPods("behind-1", nil))
	h := startHub(t, "behind", control.hub)
	podOn(t, "behind", "pod", "behind-1", func(p *corev1.Pod) {
		p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "registry"}}
	})
	h.expect(t, "behind-1", "POD behind/pod", "SECRET behind/registry absent: not found")
	h.Report(online("behind-1", 1))
	eventually(t, "the Edge is online", func() error { return link(t, "behind-1", "behind", 1, linkOnline) })
	h.stop()
	goleak.VerifyNone(t, before,
		// Idle connections to the API server belong to the process.
		goleak.IgnoreAnyFunction("golang.org/x/net/http2.(*ClientConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*http2ClientConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http/internal/http2.(*ClientConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}

// slowServer stands before the API server and can hold back what watches say.
type slowServer struct {
	kubeconfig string

	mu    sync.Mutex
	held  chan struct{} // closed: watches flow
	count int           // of lists answered
	asked []string      // method and path of everything else that came: no watches
}

// requests returns what was asked so far, but for what is asked anyhow: the probe, and the renewal of Leases.
func (s *slowServer) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *slowServer) note(r *http.Request) {
	probe := r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/edges")
	if r.URL.Query().Get("watch") != "" || probe || strings.Contains(r.URL.Path, "/leases/") && r.Method != http.MethodGet {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, r.Method+" "+r.URL.Path)
}

func newSlowServer(t *testing.T) *slowServer {
	t.Helper()
	s := &slowServer{held: make(chan struct{})}
	close(s.held)
	config, err := clientcmd.LoadFromFile(control.hub)
	must(t, err)
	one := config.Clusters["controlplane"]
	target, err := url.Parse(one.Server)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(one.CertificateAuthorityData)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { s.note(r.In); r.SetURL(target) },
		Transport:     transport,
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			switch {
			case r.Request.URL.Query().Get("watch") != "":
				r.Body = &heldBody{r.Body, s, r.Request.Context()}
			case r.Request.Method == http.MethodGet:
				s.mu.Lock()
				s.count++
				s.mu.Unlock()
			}
			return nil
		},
	}
	server := httptest.NewTLSServer(proxy)
	t.Cleanup(func() {
		s.release()
		server.CloseClientConnections()
		server.Close()
		transport.CloseIdleConnections()
	})
	one.Server = server.URL
	one.CertificateAuthorityData = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	s.kubeconfig = filepath.Join(t.TempDir(), "slow.kubeconfig")
	must(t, clientcmd.WriteToFile(*config, s.kubeconfig))
	return s
}

func (s *slowServer) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = make(chan struct{})
}

func (s *slowServer) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.held:
	default:
		close(s.held)
	}
}

func (s *slowServer) lists() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count
}

// heldBody is a watch's stream.
type heldBody struct {
	io.ReadCloser
	server  *slowServer
	request context.Context //nolint:containedctx // as http.Request keeps it
}

func (b *heldBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.server.mu.Lock()
	held := b.server.held
	b.server.mu.Unlock()
	select {
	case <-held:
	case <-b.request.Done():
		return n, b.request.Err()
	}
	return n, err
}

// G1: after the store is restored from a backup, the hub drops what it holds and follows the restored state, though it had seen
// later ones.
func TestRestoredStore(t *testing.T) {
	ctx := context.Background()
	core := control.admin.core.CoreV1()
	namespace(t, "restored")
	createEdge(t, edgeWithPods("restored-1", nil))
	podOn(t, "restored", "kept", "restored-1", nil)
	h := startHub(t, "restored", control.hub)
	h.expect(t, "restored-1", "POD restored/kept")

	must(t, control.Stop())
	db := filepath.Join(filepath.Dir(control.Kubeconfig), "db")
	backup := filepath.Join(t.TempDir(), "db")
	must(t, os.CopyFS(backup, os.DirFS(db)))
	must(t, control.Restart(ctx))
	podOn(t, "restored", "lost", "restored-1", nil)
	h.expect(t, "restored-1", "POD restored/kept", "POD restored/lost")
	// The store goes far ahead, so that the restored one stays behind whatever else is written.
	for i := range 300 {
		_, err := core.ConfigMaps("restored").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("c", i)}}, metav1.CreateOptions{})
		must(t, err)
	}
	podOn(t, "restored", "lost-too", "restored-1", nil)
	h.expect(t, "restored-1", "POD restored/kept", "POD restored/lost", "POD restored/lost-too")

	must(t, control.Stop())
	must(t, os.RemoveAll(db))
	must(t, os.CopyFS(db, os.DirFS(backup)))
	must(t, control.Restart(ctx))
	h.expect(t, "restored-1", "POD restored/kept")
	eventually(t, "the hub proves the restored state", func() error { return h.Prove(ctx, "restored-1") })
}
