package infer

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// If this fails, a device that speaks MQTT only gets no result, one that it can't place, or no word about its mistakes.
func TestBindings(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	spec := h.model("adder", "1", fault{})
	spec.Bindings = []*longshorepb.ModelBinding{
		{Input: "plant/+/machine/+/raw", Output: "plant/{1}/sum/{2}", Stream: "sums"},
		{Input: "silent/#", Stream: "quiet"},
		{Input: "bad/+", Output: "bad/{1}"},
		{Input: "own/+", Output: "longshore/v1/nodes/x/index"},
		{Input: "not/[a]/filter#", Output: "x"},
		{Input: "short/+", Output: "to/{2}"},
	}
	e.m.SetDesired(specs(spec))
	// Messages wait for the worker.
	began := time.Now()
	e.m.Message("plant/a/machine/7/raw", []byte("[1, 2, 4]"))
	e.until("a result is published", func() bool { return len(e.messages("plant/a/sum/7")) == 1 })
	var r result
	text := e.messages("plant/a/sum/7")[0]
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	if r.Model != "adder" || r.Namespace != "default" || r.Version != "1" || r.Topic != "plant/a/machine/7/raw" ||
		r.Time.Before(began.Add(-time.Second)) || r.Time.After(time.Now()) || string(r.Outputs["sum"]) != "[7]" || r.Error != "" {
		t.Errorf("result %s", text)
	}
	e.until("the result is in the stream", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.appended) == 1 && e.appended[0] == message{"plant/a/sum/7", "sums", text}
	})
	// Without an output there is the stream alone, under the input's topic.
	e.m.Message("silent/x", []byte(`{"values":[3],"id":"n1"}`))
	e.until("the silent result is in the stream", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.appended) == 2 && e.appended[1].topic == "silent/x" && e.appended[1].stream == "quiet"
	})
	// Errors, and where they go.
	for _, c := range []struct{ topic, payload, to string }{
		{"plant/a/machine/7/raw", "hello", "plant/a/sum/7/error"},
		{"plant/a/machine/7/raw", `{"inputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[1]}]}`, "plant/a/sum/7/error"},
		{"silent/x", "", "longshore-error/silent/x"}, // silent/x/error is an input
		{"bad/a", "[1]", "bad/a/error"},              // bad/a is an input: no result may go there
		{"own/a", "[1]", "own/a/error"},
		{"short/a", "[1]", "short/a/error"},
	} {
		n := len(e.messages(c.to))
		e.m.Message(c.topic, []byte(c.payload))
		e.until("an error about "+c.topic, func() bool { return len(e.messages(c.to)) == n+1 })
		var r result
		if err := json.Unmarshal([]byte(e.messages(c.to)[n]), &r); err != nil || r.Error == "" || r.Topic != c.topic || r.Outputs != nil {
			t.Errorf("error about %s: %+v %v", c.topic, r, err)
		}
	}
	mm := e.m.Metrics()[0]
	if mm.Inferences != 2 || mm.Errors != 6 || mm.QueueDrops != 0 {
		t.Errorf("metrics %+v", mm)
	}
	// Errors are no inputs, and a device may send anything.
	e.m.Message("silent/x/error", []byte("x"))
	e.m.Message("longshore-error/silent/x", []byte("x"))
	e.m.Message("", nil)
	e.m.Message("unrelated", []byte("[1]"))
	if n := e.m.Metrics()[0].Queued; n != 0 {
		t.Errorf("%d messages queued", n)
	}
}

// If this fails, results come in another order than the inputs, or a flood of inputs takes all memory (G4).
func TestBindingQueue(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	file := filepath.Join(t.TempDir(), "go")
	spec := h.model("adder", "1", fault{Infer: "slow", File: file})
	spec.Bindings = []*longshorepb.ModelBinding{{Input: "in", Output: "out"}}
	e.m.SetDesired(specs(spec))
	e.serves("adder", "1")
	e.m.Message("in", []byte("[0]"))
	e.until("the first message is with the worker", func() bool { return e.m.Metrics()[0].Queued == 0 })
	queue := e.m.tune.queue
	for i := 1; i <= queue+10; i++ {
		e.m.Message("in", fmt.Appendf(nil, "[%d]", i))
	}
	if mm := e.m.Metrics()[0]; mm.QueueDrops != 10 || mm.Queued != queue {
		t.Errorf("metrics %+v", mm)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	e.until("all that were taken are answered", func() bool { return len(e.messages("out")) == queue+1 })
	for i, text := range e.messages("out") {
		var r result
		if err := json.Unmarshal([]byte(text), &r); err != nil || string(r.Outputs["sum"]) != fmt.Sprintf("[%d]", i) {
			t.Fatalf("result %d is %s %v", i, text, err)
		}
	}
}

// If this fails, a change of a binding needs a new version of the model, or restarts its worker.
func TestBindingChange(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	spec := h.model("adder", "1", fault{})
	spec.Bindings = []*longshorepb.ModelBinding{{Input: "in", Output: "out"}}
	e.m.SetDesired(specs(spec))
	e.serves("adder", "1")
	pid := workerPid(e.m, "default/adder")
	spec = h.model("adder", "1", fault{})
	spec.Bindings = []*longshorepb.ModelBinding{{Input: "other", Output: "out"}}
	e.m.SetDesired(specs(spec))
	e.until("the new binding answers", func() bool {
		e.m.Message("other", []byte("[1]"))
		return len(e.messages("out")) > 0
	})
	if workerPid(e.m, "default/adder") != pid {
		t.Error("the worker was restarted")
	}
}

// If this fails, an output topic gets a wrong name.
func TestFill(t *testing.T) {
	b := func(in, out string) *longshorepb.ModelBinding {
		return &longshorepb.ModelBinding{Input: in, Output: out}
	}
	for _, c := range []struct {
		b         *longshorepb.ModelBinding
		in, out   string
		wantError bool
	}{
		{b("a/+/b/+", "r/{2}/{1}/{2}"), "a/x/b/y", "r/y/x/y", false},
		{b("+", "{1}/r"), "a", "a/r", false},
		{b("in/+/#", "r/{1}"), "in/a", "r/a", false},
		{b("a", "r/{x}/{/{}"), "a", "r/{x}/{/{}", false},
		{b("a", ""), "a", "", false},
		{b("+", "r/{2}"), "a", "", true},
		{b("+", "r/{0}"), "a", "", true},
		{b("a", "r/#"), "a", "", true},
		{b("#", "r"), "a", "", true},
		{b("a", "$SYS/x"), "a", "", true},
	} {
		out, err := expand(c.b, c.in)
		if out != c.out || (err != nil) != c.wantError {
			t.Errorf("expand(%v, %q) = %q, %v", c.b, c.in, out, err)
		}
	}
}
