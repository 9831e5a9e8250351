package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/proto/onnxfile"
)

const bearing = "../../e2e/bearing/bearing-2.onnx"

// binary is the worker as it is shipped: built without cgo, and without the race detector, whose shadow memory would not
// fit under the memory limit.
var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "longshore-worker")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "longshore-worker")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// process is a worker under test.
type process struct {
	cmd    *exec.Cmd
	socket string
	stdin  io.Closer
	lines  *bufio.Reader
	log    lockedBuffer
	client *http.Client
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs a worker; it is killed when the test ends.
func start(t testing.TB, model string, args ...string) *process {
	t.Helper()
	p := &process{socket: filepath.Join(t.TempDir(), "s")}
	p.cmd = exec.Command(binary, append([]string{"--model", model, "--name", "m", "--version", "1", "--socket", p.socket}, args...)...)
	p.cmd.Stderr = &p.log
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		p.stdin, err = p.cmd.StdinPipe()
	}
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	p.lines = bufio.NewReader(out)
	p.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", p.socket)
	}}}
	t.Cleanup(func() {
		p.client.CloseIdleConnections()
		_ = p.cmd.Process.Kill() // it may have ended
		_ = p.cmd.Wait()
	})
	return p
}

type line struct {
	Ready                                  bool
	Engine, EngineVersion, Reason, Message string
}

// line reads what the worker reports.
func (p *process) line(t testing.TB) line {
	t.Helper()
	text, err := p.lines.ReadBytes('\n')
	var l line
	if err == nil {
		err = json.Unmarshal(text, &l)
	}
	if err != nil {
		t.Fatalf("no line: %q, %v\n%s", text, err, p.log.String())
	}
	return l
}

// ready waits until the model serves.
func (p *process) ready(t testing.TB) line {
	t.Helper()
	l := p.line(t)
	if l.Reason == noEngine {
		skipORT(t, l.Message)
	}
	if !l.Ready {
		t.Fatalf("not ready: %+v\n%s", l, p.log.String())
	}
	return l
}

func skipORT(t testing.TB, message string) {
	t.Helper()
	if os.Getenv("LONGSHORE_REQUIRE_ORT") == "1" {
		t.Fatalf("%s (run \"make onnxruntime\")", message)
	}
	t.Skip("NOT TESTED on ONNX Runtime: " + message)
}

// exit waits for the end and returns the code; a signal is -1.
func (p *process) exit(t *testing.T) int {
	t.Helper()
	if _, err := io.Copy(io.Discard, p.lines); err != nil {
		t.Fatal(err)
	}
	if _, ok := errors.AsType[*exec.ExitError](p.cmd.Wait()); !ok && p.cmd.ProcessState == nil {
		t.Fatal("not waited for")
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) get(t testing.TB, path string) (int, string) {
	t.Helper()
	resp, err := p.client.Get("http://worker" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// infer sends one window of the classifier.
func (p *process) infer(t testing.TB) (int, string) {
	t.Helper()
	r := &oip.InferRequest{Inputs: []oip.Tensor{oip.FP32Tensor("vibration", []int64{1, 1024}, make([]float32, 1024))}}
	return p.send(t, r)
}

func (p *process) send(t testing.TB, r *oip.InferRequest) (int, string) {
	t.Helper()
	body, header, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, "http://worker/v2/models/m/infer", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(oip.HeaderLength, header)
	resp, err := p.client.Do(req)
	if err != nil {
		t.Fatalf("%v\n%s", err, p.log.String())
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

var engines = []string{"gomlx", "onnxruntime"}

// The agent believes the ready line, routes requests to the socket, and stops workers with SIGTERM: all of that must be true
// on both engines.
func TestLifeOfWorker(t *testing.T) {
	for _, e := range engines {
		t.Run(e, func(t *testing.T) {
			p := start(t, bearing, "--engine", e)
			if l := p.ready(t); l.Engine != e || l.EngineVersion == "" || l.EngineVersion == "unknown" {
				t.Errorf("%+v", l)
			}
			for _, path := range []string{"/v2/health/live", "/v2/health/ready", "/v2/models/m/ready", "/v2/models/m"} {
				if status, body := p.get(t, path); status != 200 {
					t.Errorf("%s: %d %s", path, status, body)
				}
			}
			if status, body := p.infer(t); status != 200 || !strings.Contains(body, "probabilities") {
				t.Errorf("%d %s", status, body)
			}
			if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if code := p.exit(t); code != 0 {
				t.Errorf("exit code %d\n%s", code, p.log.String())
			}
		})
	}
}

// auto must take ONNX Runtime where it is, and serve all the same where it is not.
func TestAutoEngine(t *testing.T) {
	p := start(t, bearing, "--engine", "auto")
	if l := p.ready(t); l.Engine != "onnxruntime" && os.Getenv("LONGSHORE_REQUIRE_ORT") == "1" {
		t.Errorf("%+v\n%s", l, p.log.String())
	}
	p = start(t, bearing, "--engine", "auto", "--ort-library", "/nowhere/libonnxruntime.so.1")
	if l := p.ready(t); l.Engine != "gomlx" {
		t.Errorf("%+v", l)
	}
	if log := p.log.String(); !strings.Contains(log, "ONNX Runtime is not used") || !strings.Contains(log, "/nowhere") {
		t.Error("the log does not say why: " + log)
	}
}

// A model that can't be served must end the worker with a reason an operator reads in kubectl, never by a signal.
func TestFailures(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	garbage := write("garbage.onnx", bytes.Repeat([]byte("no model "), 1000))
	unknown := onnxfile.Model{Name: "u", Opset: 14, Inputs: []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{1}}},
		Nodes:   []onnxfile.Node{{Op: "NoSuchOperator", In: []string{"x"}, Out: []string{"y"}}}}
	operator := write("unknown.onnx", unknown.Marshal())
	large := write("large.onnx", make([]byte, 40<<20))
	fake := write("libonnxruntime.so.1", []byte("not a library"))
	for _, c := range []struct {
		name, model string
		args        []string
		reason      string
		message     string
	}{
		{"garbage on gomlx", garbage, []string{"--engine", "gomlx"}, loadFailed, "garbage.onnx"},
		{"garbage on onnxruntime", garbage, []string{"--engine", "onnxruntime"}, loadFailed, "protobuf"},
		{"unknown operator on gomlx", operator, []string{"--engine", "gomlx"}, loadFailed, "NoSuchOperator"},
		{"unknown operator on onnxruntime", operator, []string{"--engine", "onnxruntime"}, loadFailed, "NoSuchOperator"},
		{"no file", filepath.Join(dir, "none.onnx"), nil, loadFailed, "no such file"},
		{"another format", bearing, []string{"--format", "tflite"}, loadFailed, `"tflite" is not supported`},
		{"no library", bearing, []string{"--engine", "onnxruntime", "--ort-library", "/nowhere/x.so"}, noEngine, "/nowhere/x.so"},
		{"no real library", bearing, []string{"--engine", "onnxruntime", "--ort-library", fake}, noEngine, "libonnxruntime.so.1"},
		{"larger than the limit", large, []string{"--memory-limit", "33554432", "--max-request", "1000000"}, outOfMemory, "40 MiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := start(t, c.model, c.args...)
			l := p.line(t)
			if l.Reason == noEngine && c.reason != noEngine {
				skipORT(t, l.Message)
			}
			if l.Ready || l.Reason != c.reason || !strings.Contains(l.Message, c.message) {
				t.Errorf("%+v", l)
			}
			if code := p.exit(t); code != exitFailed {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// inflating turns n floats into n rows of width floats.
func inflating(t *testing.T, width int64) string {
	m := onnxfile.Model{Name: "inflating", Opset: 13,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Weights: []onnxfile.Tensor{onnxfile.Floats("w", []int64{1, width}, make([]float32, width))},
		Nodes: []onnxfile.Node{
			{Op: "MatMul", In: []string{"x", "w"}, Out: []string{"wide"}},
			{Op: "ReduceMean", In: []string{"wide"}, Out: []string{"y"}, Attributes: []onnxfile.Attribute{{Name: "axes", Ints: []int64{1}}, {Name: "keepdims", Int: 1}}}}}
	path := filepath.Join(t.TempDir(), "inflating.onnx")
	if err := os.WriteFile(path, m.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func rows(n int64) *oip.InferRequest {
	return &oip.InferRequest{Inputs: []oip.Tensor{oip.FP32Tensor("x", []int64{n, 1}, make([]float32, n))}}
}

// One request that needs more memory than the worker may have must fail by itself; the small machine around it lives on (G4).
func TestRequestTooLargeForMemory(t *testing.T) {
	p := start(t, inflating(t, 10_000), "--engine", "onnxruntime", "--memory-limit", strconv.Itoa(128<<20))
	p.ready(t)
	// 100,000 rows of 40 kB are 4 GB.
	if status, body := p.send(t, rows(100_000)); status != http.StatusInternalServerError || !strings.Contains(body, "alloc") {
		t.Errorf("%d %s", status, body)
	}
	if status, body := p.send(t, rows(1)); status != 200 {
		t.Errorf("afterwards: %d %s", status, body)
	}
}

// A worker that grows beyond its limit must end and say so, before the machine's memory is gone (G4).
func TestGrowingWorkerEnds(t *testing.T) {
	p := start(t, inflating(t, 10_000), "--engine", "gomlx", "--memory-limit", strconv.Itoa(48<<20))
	p.ready(t)
	// 2,000 rows of 40 kB are 80 MB: more than the limit, less than what the kernel refuses. Go keeps it a while.
	body, header, err := rows(2_000).Encode()
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			req, err := http.NewRequest(http.MethodPost, "http://worker/v2/models/m/infer", bytes.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set(oip.HeaderLength, header)
			if resp, err := p.client.Do(req); err == nil {
				resp.Body.Close()
			}
		}
	})
	l := p.line(t)
	close(stop)
	wg.Wait()
	if l.Reason != outOfMemory || !strings.Contains(l.Message, "its limit is 48 MiB") {
		t.Errorf("%+v", l)
	}
	if code := p.exit(t); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
}

// An agent that is gone must leave no worker behind: it would hold memory and the socket for ever.
func TestEndsWithParent(t *testing.T) {
	t.Run("input closed", func(t *testing.T) {
		p := start(t, bearing, "--engine", "gomlx")
		p.ready(t)
		if err := p.stdin.Close(); err != nil {
			t.Fatal(err)
		}
		if code := p.exit(t); code != 0 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("parent killed", func(t *testing.T) {
		// The shell is the parent; its child has no pipe as input, and is stopped, so only the kernel can end it.
		script := fmt.Sprintf("%s --model %s --name m --version 1 --socket %s --engine gomlx </dev/null & echo $!; wait",
			binary, bearing, filepath.Join(t.TempDir(), "s"))
		parent := exec.Command("sh", "-c", script)
		out, err := parent.StdoutPipe()
		if err == nil {
			err = parent.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		lines.Scan()
		pid, err := strconv.Atoi(lines.Text())
		if err != nil || !lines.Scan() || !strings.Contains(lines.Text(), "ready") {
			t.Fatalf("%v: %q", err, lines.Text())
		}
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		if err := parent.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = parent.Wait() // it was killed
		poll, deadline := time.NewTicker(10*time.Millisecond), time.After(20*time.Second)
		defer poll.Stop()
		for alive(pid) {
			select {
			case <-poll.C:
			case <-deadline:
				_ = syscall.Kill(pid, syscall.SIGKILL)
				t.Fatal("the worker outlived its parent")
			}
		}
	})
}

// alive tells whether a process runs; a zombie that nobody waits for does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(stat), ") ")
	return err == nil && !strings.HasPrefix(state, "Z")
}

// A worker killed before left its socket; the next one must take its place, but never remove somebody's file.
func TestSocketLeftBehind(t *testing.T) {
	p := start(t, bearing, "--engine", "gomlx")
	p.ready(t)
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.exit(t)
	again := start(t, bearing, "--engine", "gomlx", "--socket", p.socket)
	again.socket = p.socket
	again.ready(t)
	if status, body := again.infer(t); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	third := start(t, bearing, "--socket", file)
	if code := third.exit(t); code != exitOther || !strings.Contains(third.log.String(), "address already in use") {
		t.Errorf("%d %s", code, third.log.String())
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "precious" {
		t.Errorf("%q %v", content, err)
	}
}

// A person who runs the worker by hand must learn from it how.
func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--help"}, 0, "curl --unix-socket"},
		{[]string{"--nonsense"}, exitUsage, "nonsense"},
		{[]string{"--name", "x"}, exitUsage, "is needed"},
		{[]string{"--name", "x", "--model", "x", "--version", "x", "--socket", "x", "more"}, exitUsage, `unexpected argument "more"`},
		{[]string{"--name", "x", "--model", "x", "--version", "x", "--socket", "x", "--engine", "tpu"}, exitUsage, "not auto, onnxruntime or gomlx"},
		{[]string{"--name", "x", "--model", "x", "--version", "x", "--socket", "x", "--memory-limit", "512"}, exitUsage, "at least"},
		{[]string{"--name", "x", "--model", "x", "--version", "x", "--socket", "x", "--max-request", "0"}, exitUsage, "--max-request"},
		{[]string{"--name", "x", "--model", "x", "--version", "x", "--socket", "x", "--threads", "0"}, exitUsage, "--threads"},
		{[]string{"--name", "a/b", "--model", "x", "--version", "x", "--socket", "x"}, exitUsage, "slash"},
		{[]string{"--name", "x", "--model", "x", "--version", "x", "--socket", strings.Repeat("x", 108)}, exitUsage, "107"},
	} {
		var stderr bytes.Buffer
		cmd := exec.Command(binary, c.args...)
		cmd.Stderr = &stderr
		err := cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%v: %d, %v\n%s", c.args, code, err, stderr.String())
		}
	}
}

// BenchmarkInference is one window of the classifier through the socket, binary in and out, as the agent asks; the engine
// alone is measured by BenchmarkRun in internal/engine. p50 is in microseconds.
func BenchmarkInference(b *testing.B) {
	for _, e := range engines {
		b.Run(e, func(b *testing.B) {
			p := start(b, bearing, "--engine", e)
			p.ready(b)
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				if status, body := p.infer(b); status != 200 {
					b.Fatal(status, body)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1000, "p50-µs")
		})
	}
}
