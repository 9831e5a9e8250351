package infer

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// If this fails, a model that was rolled out does not answer at the edge's front door, or a client can't tell why.
func TestFrontDoor(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	broken := h.model("broken", "1", fault{Load: "fail"})
	e.m.SetDesired(specs(h.model("adder", "1", fault{}), broken))
	e.serves("adder", "1")
	e.failed("broken", reasonLoadFailed, "")
	if v := e.infers("adder"); v != "1" {
		t.Errorf("version %q answered", v)
	}
	e.infers("default.adder")
	e.infers("adder/versions/1")
	for _, c := range []struct {
		path string
		code int
		text string
	}{
		{"/v2", 200, `"extensions":["binary_tensor_data"]`},
		{"/v2/health/live", 200, "live"},
		{"/v2/health/ready", 503, "default/broken is not ready: version 1 is failed, LoadFailed: this is no model"},
		{"/v2/models/adder", 200, `"inputs":[{"name":"x","datatype":"FP32","shape":[-1]}]`},
		{"/v2/models/adder/ready", 200, "true"},
		{"/v2/models/adder/versions/1/ready", 200, "true"},
		{"/v2/models/adder/versions/2/ready", 404, `version \"2\" of model default/adder is not served here, version \"1\" is`},
		{"/v2/models/broken/ready", 503, "LoadFailed"},
		{"/v2/models/nobody", 404, `no model \"nobody\" on this edge`},
		{"/v2/repository", 404, "not part of the Open Inference Protocol"},
	} {
		if code, body := e.get(c.path); code != c.code || !strings.Contains(body, c.text) {
			t.Errorf("GET %s: %d %s, want %d %s", c.path, code, body, c.code, c.text)
		}
	}
	if code, body := e.post("/v2/models/adder/infer", `{"inputs":[]}`); code != 400 || !strings.Contains(body, "error") {
		t.Errorf("empty request: %d %s", code, body)
	}
	mm := e.m.Metrics()
	if len(mm) != 2 || mm[0].Name != "adder" || mm[0].Inferences != 3 || mm[0].Errors != 1 || !mm[0].Ready || mm[1].Restarts < 3 {
		t.Errorf("metrics: %+v", mm)
	}
	// Removed from the list: the worker ends and the files go.
	pid := workerPid(e.m, "default/adder")
	e.m.SetDesired(nil)
	e.until("the worker is gone and the files too", func() bool { return gone(pid) && e.m.files.usage() == 0 })
	if r := e.m.Reports(); len(r) != 0 {
		t.Errorf("reports of removed models: %v", r)
	}
	// And wanted again.
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
}

// If this fails, requests fail while a new version of a model takes over, or the old worker stays.
func TestUpdateDropsNothing(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	slowFile := filepath.Join(t.TempDir(), "go")
	e.m.SetDesired(specs(h.model("adder", "1", fault{Infer: "slow", File: slowFile})))
	e.serves("adder", "1")
	old := servingWorker(e.m, "default/adder")
	// Requests that are under way during the switch are answered by the old version.
	type answer struct {
		code int
		body string
	}
	answers := make(chan answer, 4)
	for range cap(answers) {
		go func() {
			code, body := e.post("/v2/models/adder/infer", inferBody)
			answers <- answer{code, body}
		}()
	}
	e.until("requests are under way", func() bool {
		old.mu.Lock()
		defer old.mu.Unlock()
		return old.inflight == cap(answers)
	})
	e.m.SetDesired(specs(h.model("adder", "2", fault{})))
	e.serves("adder", "2")
	if v := e.infers("adder"); v != "2" {
		t.Errorf("version %q answers after the switch", v)
	}
	if gone(old.pid) {
		t.Error("the old worker ended with requests under way")
	}
	if err := os.WriteFile(slowFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range cap(answers) {
		if a := <-answers; a.code != 200 || !strings.Contains(a.body, `"model_version":"1"`) {
			t.Errorf("a request of the old version: %d %s", a.code, a.body)
		}
	}
	e.until("the old worker ended", func() bool { return gone(old.pid) })
	// Under a steady stream of requests none fails, whatever number of versions passes by.
	e.updateUnderLoad(h, 3, 5, func(int) error {
		if code, body := e.post("/v2/models/adder/infer", inferBody); code != 200 {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
}

// If this fails, a worker that was killed, stopped or grew stays broken, or takes the agent with it.
func TestSickWorkersAreReplaced(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGSEGV} {
		old := workerPid(e.m, "default/adder")
		if err := syscall.Kill(old, sig); err != nil {
			t.Fatal(err)
		}
		e.until("another worker serves after "+sig.String(), func() bool {
			pid := workerPid(e.m, "default/adder")
			return pid != 0 && pid != old
		})
		if !gone(old) {
			t.Errorf("%v: the sick worker is still there", sig)
		}
		e.serves("adder", "1")
		e.infers("adder")
	}
	if n := e.m.Metrics()[0].Restarts; n < 3 {
		t.Errorf("%d restarts counted", n)
	}
}

// If this fails, a model that leaks memory takes the whole machine down (G4).
func TestMemoryHogIsEnded(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	// On a busy machine it grows for longer than the tests' probation, and would count as a good version meanwhile.
	e := startEdge(t, t.TempDir(), h, nil, func(m *Manager) { m.tune.probation = deadline })
	hog := h.model("hog", "1", fault{Grow: 160 << 20})
	hog.Variants[0].Requires = &longshorepb.ModelRequirements{MemoryBytes: 96 << 20}
	e.m.SetDesired(specs(hog, h.model("adder", "1", fault{})))
	r := e.failed("hog", reasonOutOfMemory, "")
	if !strings.Contains(r.Message, "limit is 100663296") {
		t.Errorf("message %q", r.Message)
	}
	e.serves("adder", "1")
}

// If this fails, workers outlive an agent that was killed, hold memory, and answer nobody.
func TestWorkersDieWithTheAgent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHub(t)
	spec := h.model("adder", "1", fault{})
	e := startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(spec))
	e.serves("adder", "1")
	e.stop()

	b, err := proto.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "spec")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(os.Args[0], "--agent", dir, file)
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	for lines := bufio.NewScanner(out); pid == 0 && lines.Scan(); {
		if s, ok := strings.CutPrefix(lines.Text(), "pid "); ok {
			pid, err = strconv.Atoi(s)
		} else {
			t.Log(lines.Text())
		}
	}
	if pid == 0 || err != nil || gone(pid) {
		t.Fatalf("the agent tells no worker: %d %v", pid, err)
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait() // killed
	e.until("the worker ended", func() bool { return gone(pid) })
}

// If this fails, an inference that never ends blocks a model's bindings for good.
func TestHungInferenceIsEnded(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, func(m *Manager) { m.tune.inferTimeout = 500 * time.Millisecond })
	spec := h.model("stuck", "1", fault{Infer: "hang"})
	spec.Bindings = []*longshorepb.ModelBinding{{Input: "in", Output: "out"}}
	e.m.SetDesired(specs(spec))
	e.serves("stuck", "1")
	pid := workerPid(e.m, "default/stuck")
	e.m.Message("in", []byte("[1]"))
	e.until("the hung worker is replaced", func() bool { return gone(pid) && workerPid(e.m, "default/stuck") != 0 })
	e.until("the error is told", func() bool { return len(e.messages("out/error")) == 1 })
}

// If this fails, the agent serves a model whose worker only claims to be ready, or waits for one forever.
func TestNotReadyIsNotServed(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, func(m *Manager) { m.tune.loadTimeout = 2 * time.Second })
	e.m.SetDesired(specs(h.model("liar", "1", fault{Load: "lie"}), h.model("sleeper", "1", fault{Load: "hang"}), h.model("dead", "1", fault{Load: "crash"})))
	e.failed("liar", reasonLoadFailed, "")
	e.failed("sleeper", reasonHung, "")
	if r := e.failed("dead", reasonCrashed, ""); !strings.Contains(r.Message, "exit status 134: out of luck") {
		t.Errorf("message %q does not tell the worker's last words", r.Message)
	}
	if code, _ := e.get("/v2/models/liar/ready"); code != http.StatusServiceUnavailable {
		t.Errorf("ready: %d", code)
	}
}
