package infer

import (
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// If this fails, a corrupt file under a correct digest ends a model that served well, or is tried for ever.
func TestCorruptVersionLeavesTheOldOneServing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHub(t)
	e := startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	pid := workerPid(e.m, "default/adder")
	bad := h.modelOf("adder", "2", []byte("\x08\x07 not a model at all"))
	e.m.SetDesired(specs(bad))
	r := e.failed("adder", reasonLoadFailed, "1")
	if r.DesiredVersion != "2" || !strings.Contains(r.Message, "failed 3 times in a row") {
		t.Errorf("report %v", r)
	}
	if workerPid(e.m, "default/adder") != pid {
		t.Error("the old version's worker was replaced")
	}
	if e.infers("adder") != "1" {
		t.Error("the old version does not answer")
	}
	// The same spec again changes nothing.
	restarts := e.m.Metrics()[0].Restarts
	e.m.SetDesired(specs(proto.Clone(bad).(*longshorepb.Model)))
	e.m.LinkUp()
	e.until("the manager looked again", func() bool { return len(e.m.models["default/adder"].wake) == 0 })
	if n := e.m.Metrics()[0].Restarts; n != restarts {
		t.Errorf("%d more tries of a version given up", n-restarts)
	}
	// Nor does a restart of the agent, at first; the version that serves comes back without the hub.
	e.stop()
	e = startEdge(t, dir, nil, nil, nil)
	e.m.SetDesired(specs(bad))
	e.failed("adder", reasonLoadFailed, "1")
	if n := e.m.Metrics()[0].Restarts; n != 0 {
		t.Errorf("%d tries of a version given up, after a restart", n)
	}
	// Some time after the restart it is tried once more, beside the version that serves.
	e.stop()
	e = startEdge(t, dir, h, nil, func(m *Manager) { m.tune.retryAfterRestart = 0 })
	e.m.SetDesired(specs(bad))
	e.until("it is tried again", func() bool { return e.m.Metrics()[0].Restarts >= 3 })
	e.failed("adder", reasonLoadFailed, "1")
	if n := e.m.Metrics()[0].Restarts; n != 3 {
		t.Errorf("%d tries after the restart, want 3", n)
	}
	// A changed spec is tried.
	e.stop()
	e = startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(h.model("adder", "3", fault{})))
	e.serves("adder", "3")
	e.isGood("adder", "3")
	// And one that failed earlier is tried again once something else was wanted in between.
	e.m.SetDesired(specs(bad))
	e.failed("adder", reasonLoadFailed, "3")
	restarts = e.m.Metrics()[0].Restarts
	e.m.SetDesired(specs(h.model("adder", "3", fault{})))
	e.serves("adder", "3")
	e.m.SetDesired(specs(bad))
	e.failed("adder", reasonLoadFailed, "3")
	if n := e.m.Metrics()[0].Restarts; n < restarts+3 {
		t.Error("the version was not tried again")
	}
}

// If this fails, a version that fails only at real requests stays, though a good one is here (and is kept while the new
// one has proven nothing).
func TestRollBack(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, func(m *Manager) { m.tune.probation = 2 * time.Second })
	one := h.model("adder", "1", fault{})
	one.Bindings = []*longshorepb.ModelBinding{{Input: "in/one", Output: "out/one"}}
	e.m.SetDesired(specs(one))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	two := h.model("adder", "2", fault{Infer: "crash"})
	two.Bindings = []*longshorepb.ModelBinding{{Input: "in/two", Output: "out/two"}}
	e.m.SetDesired(specs(two))
	e.serves("adder", "2")
	e.until("the new version is given up", func() bool {
		if r := e.report("adder"); r.State == longshorepb.ModelState_MODEL_STATE_FAILED {
			return true
		}
		e.m.Message("in/two", []byte("[1,2]"))
		return false
	})
	r := e.failed("adder", reasonRolledBack, "1")
	if r.DesiredVersion != "2" || !strings.Contains(r.Message, "the model went wrong") {
		t.Errorf("report %v", r)
	}
	if e.infers("adder") != "1" || e.lastGood("adder") != "1" {
		t.Error("the last good version does not serve")
	}
	// Bindings are those of the version that serves.
	e.m.Message("in/one", []byte("[1,2]"))
	e.until("the old binding answers", func() bool { return len(e.messages("out/one")) == 1 })
}

// If this fails, a power cut right after an update leaves the edge with a version that was never seen to work (G2).
func TestLastGoodOnlyAfterServingWell(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHub(t)
	e := startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	e.stop()
	e = startEdge(t, dir, h, nil, func(m *Manager) { m.tune.probation = time.Hour })
	two := h.model("adder", "2", fault{})
	e.m.SetDesired(specs(two))
	e.serves("adder", "2")
	if v := e.lastGood("adder"); v != "1" {
		t.Errorf("version %s is the last good one before it proved itself", v)
	}
	e.stop()
	// Both are here, so the next start needs no hub, serves at once, and goes on to the desired one.
	e = startEdge(t, dir, nil, nil, nil)
	e.m.SetDesired(specs(two))
	e.serves("adder", "2")
	e.isGood("adder", "2")
	e.until("the version before is collected", func() bool { return e.m.files.usage() == int64(two.Variants[0].SizeBytes) })
}

// If this fails, models do not come back after a power cut without a link (G2).
func TestColdBoot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHub(t)
	e := startEdge(t, dir, h, nil, nil)
	one := h.model("adder", "1", fault{})
	e.m.SetDesired(specs(one))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	e.stop()
	e = startEdge(t, dir, nil, nil, nil)
	e.m.SetDesired(specs(one))
	e.serves("adder", "1")
	e.infers("adder")
	e.stop()
	// The committed list asks for a version whose file never came: the last good one serves.
	h.down.Store(true)
	two := h.model("adder", "2", fault{})
	e = startEdge(t, dir, h, nil, func(m *Manager) { m.tune.fetchMin, m.tune.fetchMax = time.Hour, time.Hour })
	e.m.SetDesired(specs(two))
	e.until("version 1 serves while 2 waits for the link", func() bool {
		r := e.report("adder")
		return r.ServingVersion == "1" && r.DesiredVersion == "2" && r.State == longshorepb.ModelState_MODEL_STATE_PENDING && r.Reason == reasonFetchFailed
	})
	e.infers("adder")
	// With the link the download goes on at once, whatever the backoff says.
	h.down.Store(false)
	e.m.LinkUp()
	e.serves("adder", "2")
}

// If this fails, one broken last good file keeps a model from being served although the hub has it.
func TestDamagedLastGoodFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHub(t)
	e := startEdge(t, dir, h, nil, nil)
	one := h.model("adder", "1", fault{})
	e.m.SetDesired(specs(one))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	path := e.m.files.path(one.Variants[0].Digest)
	e.stop()
	flipByte(t, path)
	e = startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(one))
	e.serves("adder", "1")
	if h.asked.Load() != 2 {
		t.Errorf("%d requests for the file, want 2", h.asked.Load())
	}
}

// If this fails, an edge downloads what it can't run, or does not use the variant that fits it.
func TestVariants(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, func(c *Config) { c.Arch = "arm64" }, func(m *Manager) { m.engines = engines{gomlx: true} })
	variant := func(name string, f fault, r *longshorepb.ModelRequirements) *longshorepb.ModelVariant {
		f.Pad = name
		v := h.modelOf("x", "1", f.file()).Variants[0]
		v.Name, v.Requires = name, r
		return v
	}
	unfit := []*longshorepb.ModelVariant{
		variant("other-arch", fault{}, &longshorepb.ModelRequirements{Arch: "amd64"}),
		variant("huge", fault{}, &longshorepb.ModelRequirements{MemoryBytes: 1 << 50}),
	}
	noLibrary := variant("ort", fault{}, &longshorepb.ModelRequirements{Engine: "onnxruntime"})
	noEngine := variant("picky", fault{Load: "noengine"}, nil)
	fits := variant("fits", fault{}, &longshorepb.ModelRequirements{Arch: "arm64", Engine: "gomlx"})
	model := func(name string, vs ...*longshorepb.ModelVariant) *longshorepb.Model {
		return &longshorepb.Model{Namespace: "default", Name: name, Version: "1", Variants: vs}
	}
	e.m.SetDesired(specs(
		model("all", append(unfit, noLibrary, noEngine, fits)...),
		model("none", unfit...),
		model("library", noLibrary),
		model("engine", noEngine),
		model("empty"),
	))
	e.serves("all", "1")
	if r := e.report("all"); r.Variant != "fits" || r.Engine != "test 1" {
		t.Errorf("report %v", r)
	}
	if r := e.failed("none", reasonNoVariant, ""); !strings.Contains(r.Message, `variant "other-arch": needs amd64, this machine is arm64; variant "huge": needs`) {
		t.Errorf("message %q", r.Message)
	}
	e.failed("library", reasonNoEngine, "")
	if r := e.failed("engine", reasonNoEngine, ""); !strings.Contains(r.Message, "no engine for this") {
		t.Errorf("message %q", r.Message)
	}
	e.failed("empty", reasonNoVariant, "")
	if n := h.asked.Load(); n > 3 { // picky for two models, fits
		t.Errorf("%d downloads", n)
	}
}

// fullKV is a store on a disk that is full on demand.
type fullKV struct {
	KV
	full atomic.Bool
}

func (k *fullKV) Put(key string, value []byte) error {
	if k.full.Load() {
		return syscall.ENOSPC
	}
	return k.KV.Put(key, value)
}

// If this fails, a full disk stops models that need nothing of it, makes a failed version loop, or is not told.
func TestFullStore(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	kv := &fullKV{}
	e := startEdge(t, t.TempDir(), h, func(c *Config) { kv.KV, c.KV = c.KV, kv }, nil)
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
	e.isGood("adder", "1")
	kv.full.Store(true)
	e.m.SetDesired(specs(h.model("adder", "2", fault{Load: "fail"})))
	e.failed("adder", reasonLoadFailed, "1")
	e.m.SetDesired(specs(h.model("adder", "3", fault{})))
	e.serves("adder", "3")
	e.until("the store's trouble is told", func() bool { return e.report("adder").Reason == reasonStore })
	if n := e.m.Metrics()[0].Restarts; n != 3 {
		t.Errorf("%d tries of the bad version, want 3", n)
	}
	e.infers("adder")
	kv.full.Store(false)
	e.isGood("adder", "3")
	e.until("the store's trouble is over", func() bool { return e.report("adder").Reason == "" })
}
