package infer

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// buildWorker builds the real worker.
func buildWorker(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "longshore-worker")
	cmd := exec.Command("go", "build", "-o", path, "github.com/longshore-edge/longshore/edgehub/worker")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the worker: %v\n%s", err, out)
	}
	return path
}

// bearing makes a spec of the trained classifier.
func bearing(t testing.TB, h *hub, version string) *longshorepb.Model {
	t.Helper()
	b, err := os.ReadFile("../../../e2e/bearing/bearing-" + version + ".onnx")
	if err != nil {
		t.Fatal(err)
	}
	return h.modelOf("bearing", version, b)
}

// zeros is an infer request that the model takes, with binary tensors.
func zeros(t testing.TB, meta oip.Metadata) (body []byte, header string) {
	t.Helper()
	req := &oip.InferRequest{BinaryOutput: true}
	for _, in := range meta.Inputs {
		shape := slices.Clone(in.Shape)
		for i, d := range shape {
			shape[i] = max(d, 1)
		}
		x, err := oip.Zeros(in.Name, in.Datatype, shape)
		if err != nil {
			t.Fatal(err)
		}
		req.Inputs = append(req.Inputs, x)
	}
	body, header, err := req.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return body, header
}

// If this fails, the real worker and the manager don't understand each other: no trained model serves, a corrupt one takes
// the good one down, or an update does not arrive.
func TestRealWorker(t *testing.T) {
	t.Parallel()
	worker := buildWorker(t)
	for _, engine := range []string{"gomlx", "onnxruntime"} {
		t.Run(engine, func(t *testing.T) {
			if engine == "onnxruntime" && !findEngines(Config{Worker: worker, Arch: runtime.GOARCH}).ort {
				if os.Getenv("LONGSHORE_REQUIRE_ORT") == "1" {
					t.Fatal("ONNX Runtime's library is not here: run make onnxruntime")
				}
				t.Skip("ONNX Runtime's library is not here: run make onnxruntime")
			}
			h := newHub(t)
			dir := t.TempDir()
			change := func(c *Config) { c.Worker = worker }
			need := func(m *longshorepb.Model) *longshorepb.Model {
				m.Variants[0].Requires = &longshorepb.ModelRequirements{Engine: engine}
				m.Bindings = []*longshorepb.ModelBinding{{Input: "in", Output: "out", Stream: "bearing"}}
				return m
			}
			e := startEdge(t, dir, h, change, nil)
			e.m.SetDesired(specs(need(bearing(t, h, "1"))))
			e.serves("bearing", "1")
			e.isGood("bearing", "1")
			if r := e.report("bearing"); !strings.HasPrefix(r.Engine, engine) {
				t.Errorf("engine %q", r.Engine)
			}
			meta := servingWorker(e.m, "default/bearing").meta
			body, header := zeros(t, meta)
			r := httptest.NewRequest(http.MethodPost, "/v2/models/bearing/infer", bytes.NewReader(body))
			r.Header.Set(oip.HeaderLength, header)
			w := httptest.NewRecorder()
			e.m.Handler().ServeHTTP(w, r)
			resp, err := oip.DecodeResponse(w.Body.Bytes(), w.Header().Get(oip.HeaderLength))
			if w.Code != 200 || err != nil || resp.ModelName != "bearing" || resp.ModelVersion != "1" || len(resp.Outputs) != len(meta.Outputs) {
				t.Fatalf("inference: %d %v %+v", w.Code, err, resp)
			}
			// A corrupt file with a correct digest.
			file := bytes.Clone(h.files[bearing(t, h, "2").Variants[0].Digest])
			corrupt := need(h.modelOf("bearing", "2", file[:len(file)*2/3]))
			e.m.SetDesired(specs(corrupt))
			e.failed("bearing", reasonLoadFailed, "1")
			e.m.SetDesired(specs(need(bearing(t, h, "2"))))
			e.serves("bearing", "2")
			e.isGood("bearing", "2")
			e.m.Message("in", []byte("[]"))
			e.until("an error about a payload the model can't take", func() bool { return len(e.messages("out/error")) == 1 })
			e.stop()
			// A cold boot without a hub.
			e = startEdge(t, dir, nil, change, nil)
			e.m.SetDesired(specs(need(bearing(t, h, "2"))))
			e.serves("bearing", "2")
		})
	}
}

// BenchmarkInference tells what the front door costs: direct is the worker's socket, door the front door over TCP.
func BenchmarkInference(b *testing.B) {
	h := newHub(b)
	m, closeStore, err := openManager(b.TempDir(), h, func(c *Config) { c.Worker = buildWorker(b) })
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	defer closeStore()
	defer func() { cancel(); <-done }()
	m.SetDesired(specs(bearing(b, h, "1")))
	for end := time.Now().Add(deadline); workerPid(m, "default/bearing") == 0; <-time.After(10 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatal(m.Reports())
		}
	}
	w := servingWorker(m, "default/bearing")
	body, header := zeros(b, w.meta)
	door := httptest.NewServer(m.Handler())
	defer door.Close()
	for _, c := range []struct {
		name, url string
		client    *http.Client
	}{{"direct", "http://worker", w.client}, {"door", door.URL, door.Client()}} {
		b.Run(c.name, func(b *testing.B) {
			times := make([]time.Duration, 0, 4096)
			for b.Loop() {
				began := time.Now()
				req, err := http.NewRequest(http.MethodPost, c.url+"/v2/models/bearing/infer", bytes.NewReader(body))
				if err != nil {
					b.Fatal(err)
				}
				req.Header.Set(oip.HeaderLength, header)
				resp, err := c.client.Do(req)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
					b.Fatal(resp.Status, err)
				}
				if err := resp.Body.Close(); err != nil {
					b.Fatal(err)
				}
				times = append(times, time.Since(began))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2])/1e3, "p50-µs")
			b.ReportMetric(float64(times[len(times)*99/100])/1e3, "p99-µs")
		})
	}
}
