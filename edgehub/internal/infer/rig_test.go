package infer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// deadline for anything that is waited for.
const deadline = 60 * time.Second

func specs(s ...*longshorepb.Model) []*longshorepb.Model { return s }

func decodeSpec(b []byte) (*longshorepb.Model, error) {
	s := new(longshorepb.Model)
	return s, proto.Unmarshal(b, s)
}

// openManager opens a manager with this test binary as its worker, and a real store.
func openManager(dir string, from Fetcher, change func(*Config)) (*Manager, func(), error) {
	store, _, err := desired.OpenStore(filepath.Join(dir, "state"), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cfg := Config{
		Dir: filepath.Join(dir, "models"), Worker: self, KV: store, Fetcher: from,
		// The test worker under the race detector is large.
		MemoryLimit: 512 << 20,
	}
	if change != nil {
		change(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		return nil, nil, err
	}
	t := &m.tune
	t.probeEvery, t.probeTimeout, t.memoryEvery = 100*time.Millisecond, 3*time.Second, 20*time.Millisecond
	t.probation, t.backoffMin, t.backoffMax = 300*time.Millisecond, 20*time.Millisecond, 300*time.Millisecond
	t.fetchMin, t.fetchMax, t.resync = 20*time.Millisecond, 200*time.Millisecond, 100*time.Millisecond
	m.engines.gomlx = true
	return m, func() { _ = store.Close() }, nil
}

// edge is a manager that runs on a directory which outlives it.
type edge struct {
	*testing.T
	dir string
	m   *Manager

	mu        sync.Mutex
	published []message
	appended  []message

	stop func()
}

type message struct {
	topic, stream string
	payload       string
}

// startEdge runs a manager; tune may change it before it starts. It stops with the test at the latest.
func startEdge(t *testing.T, dir string, from Fetcher, change func(*Config), tune func(*Manager)) *edge {
	t.Helper()
	e := &edge{T: t, dir: dir}
	m, closeStore, err := openManager(dir, from, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
		c.Publish = func(_ context.Context, topic string, payload []byte) error {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.published = append(e.published, message{topic: topic, payload: string(payload)})
			return nil
		}
		c.Append = func(_ context.Context, stream, topic string, payload []byte) error {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.appended = append(e.appended, message{topic: topic, stream: stream, payload: string(payload)})
			return nil
		}
		if change != nil {
			change(c)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if tune != nil {
		tune(m)
	}
	e.m = m
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	var once sync.Once
	e.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			closeStore()
		})
	}
	t.Cleanup(e.stop)
	return e
}

// report of the model, nil if there is none.
func (e *edge) report(name string) *longshorepb.ModelReport {
	for _, r := range e.m.Reports() {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// until polls for a condition.
func (e *edge) until(what string, f func() bool) {
	e.Helper()
	end := time.Now().Add(deadline)
	for !f() {
		if time.Now().After(end) {
			e.Fatalf("waited in vain until %s; reports: %v", what, e.m.Reports())
		}
		<-time.After(5 * time.Millisecond)
	}
}

// serves waits until the desired version serves.
func (e *edge) serves(name, version string) {
	e.Helper()
	e.until(name+" "+version+" serves", func() bool {
		r := e.report(name)
		return r != nil && r.State == longshorepb.ModelState_MODEL_STATE_SERVING && r.DesiredVersion == version && r.ServingVersion == version
	})
}

// updateUnderLoad lets versions of the adder from first to last take over one after the other, while 4 clients ask again and
// again. ask gets numbers that grow by one for each client; no error may come of it.
func (e *edge) updateUnderLoad(h *hub, first, last int, ask func(n int) error) {
	e.Helper()
	var done, failed atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			for n := i; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := ask(n); err != nil {
					failed.Add(1)
					e.Errorf("request during an update: %v", err)
					return
				}
				done.Add(1)
			}
		})
	}
	for v := first; v <= last; v++ {
		e.m.SetDesired(specs(h.model("adder", strconv.Itoa(v), fault{})))
		e.serves("adder", strconv.Itoa(v))
		n := done.Load()
		e.until("requests go on", func() bool { return done.Load() > n+20 || failed.Load() > 0 })
	}
	close(stop)
	clients.Wait()
}

// isGood waits until a version is durably the last good one.
func (e *edge) isGood(name, version string) {
	e.Helper()
	e.until(name+" "+version+" is the last good version", func() bool { return e.lastGood(name) == version })
}

func (e *edge) lastGood(name string) string {
	u, _, _ := e.m.durable.get("default/" + name).good(0)
	return u.version
}

// failed waits for a failure of the desired version while another one serves ("" for none).
func (e *edge) failed(name, reason, serving string) *longshorepb.ModelReport {
	e.Helper()
	var r *longshorepb.ModelReport
	e.until(name+" failed with "+reason, func() bool {
		r = e.report(name)
		return r != nil && r.State == longshorepb.ModelState_MODEL_STATE_FAILED && r.Reason == reason && r.ServingVersion == serving
	})
	return r
}

// post sends values to the front door; it returns the status and the body.
func (e *edge) post(path string, body string) (int, string) {
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
	w := httptest.NewRecorder()
	e.m.Handler().ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func (e *edge) get(path string) (int, string) {
	w := httptest.NewRecorder()
	e.m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

const inferBody = `{"inputs":[{"name":"x","datatype":"FP32","shape":[3],"data":[1,2,4]}]}`

// infers checks one inference and returns the version that answered.
func (e *edge) infers(name string) string {
	e.Helper()
	code, body := e.post("/v2/models/"+name+"/infer", inferBody)
	if code != http.StatusOK || !strings.Contains(body, `"data":[7]`) {
		e.Fatalf("inference: %d %s", code, body)
	}
	var resp struct {
		Version string `json:"model_version"`
	}
	if err := json.Unmarshal([]byte(body), &resp); err != nil {
		e.Fatal(err)
	}
	return resp.Version
}

// messages that went to a topic.
func (e *edge) messages(topic string) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for _, m := range e.published {
		if m.topic == topic {
			out = append(out, m.payload)
		}
	}
	return out
}

// hub serves model files over HTTP, badly on demand. It is a Fetcher too.
type hub struct {
	server *httptest.Server
	cut    atomic.Int64 // bytes after which an answer is cut; 0 = none
	down   atomic.Bool
	sent   atomic.Int64 // bytes of files
	asked  atomic.Int64 // requests

	mu    sync.Mutex
	files map[string][]byte
}

func newHub(t testing.TB) *hub {
	h := &hub{files: map[string][]byte{}}
	h.server = httptest.NewServer(http.HandlerFunc(h.serve))
	t.Cleanup(h.server.Close)
	return h
}

func (h *hub) serve(w http.ResponseWriter, r *http.Request) {
	h.asked.Add(1)
	h.mu.Lock()
	b, ok := h.files[strings.TrimPrefix(r.URL.Path, "/models/")]
	h.mu.Unlock()
	if !ok {
		http.Error(w, "no such file", http.StatusNotFound)
		return
	}
	http.ServeContent(&countingWriter{w, h, 0}, r, "", time.Time{}, bytes.NewReader(b))
}

// countingWriter counts what goes out, and breaks the connection where hub.cut says.
type countingWriter struct {
	http.ResponseWriter
	h *hub
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	if cut := c.h.cut.Load(); cut > 0 && c.n+int64(len(p)) > cut {
		p = p[:cut-c.n]
		n, _ := c.ResponseWriter.Write(p)
		c.h.sent.Add(int64(n))
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	n, err := c.ResponseWriter.Write(p)
	c.n += int64(n)
	c.h.sent.Add(int64(n))
	return n, err
}

// Fetch implements Fetcher with a range request.
func (h *hub) Fetch(ctx context.Context, digest string, offset int64) (io.ReadCloser, error) {
	if h.down.Load() {
		return nil, fmt.Errorf("no link to the hub")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.server.URL+"/models/"+digest, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	resp, err := h.server.Client().Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusPartialContent {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("the hub answered %s", resp.Status)
	}
	return resp.Body, nil
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// put adds a file and returns its digest.
func (h *hub) put(b []byte) string {
	d := digestOf(b)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.files[d] = b
	return d
}

func (f fault) file() []byte {
	b, err := json.Marshal(f)
	if err != nil {
		panic(err)
	}
	return b
}

// model makes a spec with one variant, whose file the hub has.
func (h *hub) model(name, version string, f fault) *longshorepb.Model {
	if f.Pad == "" {
		f.Pad = name + version
	}
	return h.modelOf(name, version, f.file())
}

func (h *hub) modelOf(name, version string, file []byte) *longshorepb.Model {
	return &longshorepb.Model{
		Namespace: "default", Name: name, Uid: "uid-" + name, Version: version,
		Variants: []*longshorepb.ModelVariant{{Name: "main", Format: "onnx", Digest: h.put(file), SizeBytes: uint64(len(file))}},
	}
}
