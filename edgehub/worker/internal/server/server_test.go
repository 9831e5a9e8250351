package server

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine/gomlx"
	"github.com/longshore-edge/longshore/proto/onnxfile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sumAndProduct is a model with two inputs and two outputs of any number of rows.
func sumAndProduct(t *testing.T) engine.Session {
	shape := []int64{-1, 2}
	m := onnxfile.Model{Name: "two", Opset: 14,
		Inputs:  []onnxfile.Value{{Name: "a", Type: onnxfile.Float, Shape: shape}, {Name: "b", Type: onnxfile.Float, Shape: shape}},
		Outputs: []onnxfile.Value{{Name: "sum", Type: onnxfile.Float, Shape: shape}, {Name: "product", Type: onnxfile.Float, Shape: shape}},
		Nodes: []onnxfile.Node{
			{Op: "Add", In: []string{"a", "b"}, Out: []string{"sum"}},
			{Op: "Mul", In: []string{"a", "b"}, Out: []string{"product"}}}}
	e, err := gomlx.Open()
	if err != nil {
		t.Fatal(err)
	}
	s, err := e.Load(m.Marshal(), engine.Options{Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// start serves over real HTTP.
func start(t *testing.T, cfg Config) (*Server, *httptest.Server) {
	cfg.Logger = slog.New(slog.DiscardHandler)
	cfg.Name, cfg.Version, cfg.WorkerVersion = "two", "7", "test"
	s := New(cfg)
	front := httptest.NewServer(s)
	t.Cleanup(front.Close)
	return s, front
}

func do(t *testing.T, method, url, header, body string) (int, http.Header, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if header != "" {
		r.Header.Set(oip.HeaderLength, header)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, strings.TrimSpace(string(text))
}

const request = `{"id":"42","inputs":[
  {"name":"b","shape":[1,2],"datatype":"FP32","data":[[10,20]]},
  {"name":"a","shape":[1,2],"datatype":"FP32","data":[1,2]}]`

// Standard clients find their way by these answers, and the agent routes nothing to a worker that is not ready.
func TestProtocol(t *testing.T) {
	s, front := start(t, Config{MaxRequest: 1 << 20, MaxConcurrent: 4})
	for range 2 {
		loaded := s.loaded.Load() != nil
		for _, c := range []struct {
			path          string
			loading, then int
			body          string
		}{
			{"/v2", 200, 200, `{"name":"longshore-worker","version":"test","extensions":["binary_tensor_data"]}`},
			{"/v2/health/live", 200, 200, `{"live":true}`},
			{"/v2/health/ready", 503, 200, `{"live":true,"ready":true}`},
			{"/v2/models/two/ready", 503, 200, `{"name":"two","ready":true}`},
			{"/v2/models/two/versions/7/ready", 503, 200, `{"name":"two","ready":true}`},
			{"/v2/models/two", 503, 200, `{"name":"two","versions":["7"],"platform":"onnx_onnxv1",` +
				`"inputs":[{"name":"a","datatype":"FP32","shape":[-1,2]},{"name":"b","datatype":"FP32","shape":[-1,2]}],` +
				`"outputs":[{"name":"sum","datatype":"FP32","shape":[-1,2]},{"name":"product","datatype":"FP32","shape":[-1,2]}]}`},
			{"/v2/models/two/versions/8", 404, 404, `{"error":"model \"two\" has no version \"8\" here, only \"7\""}`},
			{"/v2/models/three", 404, 404, `{"error":"there is no model \"three\" here, only \"two\""}`},
			{"/v3", 404, 404, `{"error":"there is no GET /v3 in the Open Inference Protocol v2"}`},
		} {
			status, _, body := do(t, "GET", front.URL+c.path, "", "")
			want := c.loading
			if loaded {
				want = c.then
			}
			if status != want || loaded && body != c.body {
				t.Errorf("loaded %v, %s: %d %s", loaded, c.path, status, body)
			}
		}
		if !loaded {
			if status, _, body := do(t, "POST", front.URL+"/v2/models/two/infer", "", request+"}"); status != 503 || !strings.Contains(body, "loaded") {
				t.Errorf("infer while loading: %d %s", status, body)
			}
			s.SetSession(sumAndProduct(t))
		}
	}
}

// The forms a client may choose, each with exact results.
func TestInfer(t *testing.T) {
	s, front := start(t, Config{MaxRequest: 1 << 20, MaxConcurrent: 4})
	s.SetSession(sumAndProduct(t))
	for _, path := range []string{"/v2/models/two/infer", "/v2/models/two/versions/7/infer"} {
		status, header, body := do(t, "POST", front.URL+path, "", request+`,"parameters":{"whatever":1}}`)
		want := `{"model_name":"two","model_version":"7","id":"42","outputs":[` +
			`{"name":"sum","shape":[1,2],"datatype":"FP32","data":[11,22]},{"name":"product","shape":[1,2],"datatype":"FP32","data":[10,40]}]}`
		if status != 200 || body != want || header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %v %s", path, status, header, body)
		}
	}
	_, _, body := do(t, "POST", front.URL+"/v2/models/two/infer", "", request+`,"outputs":[{"name":"product"}]}`)
	if want := `{"model_name":"two","model_version":"7","id":"42","outputs":[{"name":"product","shape":[1,2],"datatype":"FP32","data":[10,40]}]}`; body != want {
		t.Error(body)
	}
	// Binary in, one output binary and one as JSON out.
	r := &oip.InferRequest{ID: "b", BinaryOutput: true, Outputs: []oip.RequestedOutput{{Name: "sum", Binary: true}, {Name: "product"}},
		Inputs: []oip.Tensor{oip.FP32Tensor("a", []int64{2, 2}, []float32{1, 2, 3, 4}), oip.FP32Tensor("b", []int64{2, 2}, []float32{5, 6, 7, 8})}}
	text, length, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	status, header, body := do(t, "POST", front.URL+"/v2/models/two/infer", length, string(text))
	got, err := oip.DecodeResponse([]byte(body), header.Get(oip.HeaderLength))
	want := []oip.Tensor{oip.FP32Tensor("sum", []int64{2, 2}, []float32{6, 8, 10, 12}), oip.FP32Tensor("product", []int64{2, 2}, []float32{5, 12, 21, 32})}
	if err != nil || status != 200 || header.Get("Content-Type") != "application/octet-stream" || !reflect.DeepEqual(got.Outputs, want) {
		t.Errorf("%d %v %v %+v", status, header, err, got)
	}
	if !strings.Contains(body, `"name":"product","shape":[2,2],"datatype":"FP32","data":[5,12,21,32]`) {
		t.Errorf("product is not JSON: %q", body)
	}
}

// Every mistake gets a status and words that tell the client's author what to change, and the next request works.
func TestErrors(t *testing.T) {
	s, front := start(t, Config{MaxRequest: 1000, MaxConcurrent: 4})
	s.SetSession(sumAndProduct(t))
	for _, c := range []struct {
		body, header string
		status       int
		want         string
	}{
		{"", "", 400, "malformed JSON"},
		{"{}", "", 400, `no \"inputs\"`},
		{request, "", 400, "malformed JSON"},
		{request + "}", "12345", 400, "with a body of"},
		{strings.Replace(request, `"b"`, `"c"`, 1) + "}", "", 400, `no input \"c\"`},
		{strings.ReplaceAll(request, "FP32", "FP64") + "}", "", 400, "datatype is FP64, the model takes FP32"},
		{strings.ReplaceAll(request, "[1,2],\"data", "[2,1],\"data") + "}", "", 400, "shape"},
		{strings.Replace(request, "[1,2],\"data", "[1,3],\"data", 1) + "}", "", 400, "shape"},
		{strings.Replace(strings.Replace(request, "[1,2],\"data", "[2,2],\"data", 1), "[[10,20]]", "[1,2,3,4]", 1) + "}", "", 400, ""},
		{request + `,"outputs":[{"name":"difference"}]}`, "", 400, `no output \"difference\"`},
		{strings.Repeat(" ", 1001), "", 413, "larger than 1000 bytes"},
	} {
		status, _, body := do(t, "POST", front.URL+"/v2/models/two/infer", c.header, c.body)
		var e oip.Error
		if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error == "" || status != c.status || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %s, want %d %s", c.body, status, body, c.status, c.want)
		}
		if status, _, body := do(t, "POST", front.URL+"/v2/models/two/infer", "", request+"}"); status != 200 {
			t.Fatalf("after it: %d %s", status, body)
		}
	}
	// A client that tells no length is bounded too.
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, front.URL+"/v2/models/two/infer", io.MultiReader(bytes.NewReader(make([]byte, 5000))))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Error(resp.Status)
	}
}

// More clients than the worker can take must be told at once, or its memory has no bound (G4).
func TestOverload(t *testing.T) {
	s, front := start(t, Config{MaxRequest: 1 << 20, MaxConcurrent: 1})
	s.SetSession(sumAndProduct(t))
	body, finish := io.Pipe()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, front.URL+"/v2/models/two/infer", body)
	if err != nil {
		t.Fatal(err)
	}
	first := make(chan int, 1)
	go func() {
		defer close(first)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Error(err)
			return
		}
		resp.Body.Close()
		first <- resp.StatusCode
	}()
	// The worker holds the slot as soon as it reads; a pipe's write returns when it was read by the client's sender, so
	// ask until the slot is taken.
	if _, err := finish.Write([]byte(request)); err != nil {
		t.Fatal(err)
	}
	for {
		status, header, text := do(t, "POST", front.URL+"/v2/models/two/infer", "", request+"}")
		if status == 503 {
			if header.Get("Retry-After") == "" || !strings.Contains(text, "try again") {
				t.Errorf("%v %s", header, text)
			}
			break
		}
		if t.Context().Err() != nil {
			t.Fatal("the slot was never taken")
		}
	}
	if _, err := finish.Write([]byte("}")); err != nil {
		t.Fatal(err)
	}
	finish.Close()
	if status := <-first; status != 200 {
		t.Errorf("the first request: %d", status)
	}
	if status, _, text := do(t, "POST", front.URL+"/v2/models/two/infer", "", request+"}"); status != 200 {
		t.Errorf("afterwards: %d %s", status, text)
	}
}
