package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/bearing"
	"github.com/longshore-edge/longshore/e2e/bearing/sensor"
	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// model writes a model file into the hub's folder and returns the manifest of that version.
func model(t *testing.T, s *rigtest.Site, version string, content []byte) string {
	t.Helper()
	name := "bearing-" + version + ".onnx"
	if err := os.WriteFile(filepath.Join(s.Hub.Models(), name), content, 0o644); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`apiVersion: longshore.dev/v1alpha1
kind: Model
metadata: {name: bearing, namespace: default}
spec:
  version: "%s"
  edgeSelector: {}
  variants:
  - name: fp32
    format: onnx
    source: {uri: "file:%s"}
    digest: sha256:%x
    sizeBytes: %d
  bindings:
  - {input: machines/+/vibration, output: "machines/{1}/verdict", stream: faults}
`, version, name, sha256.Sum256(content), len(content))
}

func bearingModel(t *testing.T, version string) []byte {
	t.Helper()
	b, err := os.ReadFile("bearing/bearing-" + version + ".onnx")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// serves says whether an edge serves a version of the model, in a state.
func serves(ctx context.Context, e *rig.Edge, version, state string) error {
	st, err := e.Status(ctx)
	if err != nil {
		return err
	}
	m, err := st.Model("bearing")
	if err == nil && (m.ServingVersion != version || m.State != state) {
		err = fmt.Errorf("got %+v, want version %s and %s", m, version, state)
	}
	return err
}

// A model file that is broken although its digest is right must cost nobody the version that works, and the cloud must say
// so; a payload that the model cannot take must cost its sender an error and nobody else anything.
func TestBadModelsAndPayloadsDisturbNothing(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Write("model.yaml", model(t, s, "1", bearingModel(t, "1")))
	e := s.Edge("dock-1", "streams:\n- name: faults\n")
	s.Start(e)
	rigtest.Eventually(t, "version 1 serves", func() error { return serves(t.Context(), e, "1", "Serving") })

	whole := bearingModel(t, "2")
	corrupt := whole[:len(whole)/2] // as after a copy that was cut off
	s.Write("model.yaml", model(t, s, "2", corrupt))
	rigtest.Eventually(t, "the corrupt version failed and version 1 serves on", func() error { return serves(t.Context(), e, "1", "Failed") })
	rigtest.Eventually(t, "the cloud shows the failure", func() error {
		edges, err := s.Hub.Edges(t.Context())
		if models := edges["dock-1"].Models; err == nil && (len(models) != 1 || models[0].State != "Failed" || models[0].ServingVersion != "1" || models[0].Message == "") {
			err = fmt.Errorf("got %+v", models)
		}
		return err
	})

	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	verdicts := make(chan string, 1)
	go func() {
		out, _ := rigtest.Mosquitto(ctx, t, e.Broker, "mosquitto_sub", "-t", "machines/+/verdict", "-t", "machines/+/verdict/error", "-F", "%t %p", "-C", "4", "-W", "60")
		verdicts <- out
	}()
	rigtest.Eventually(t, "the subscriber is there", func() error {
		b, err := rig.Get(ctx, "http://"+e.HTTP+"/status")
		var st struct{ Devices struct{ Connections int } }
		if err == nil {
			err = json.Unmarshal(b, &st)
		}
		if err == nil && st.Devices.Connections < 1 {
			err = fmt.Errorf("nobody is connected")
		}
		return err
	})
	d := &rig.Device{Address: e.Broker, ClientID: "press-7"}
	defer d.Close()
	_, good, err := sensor.New(1, bearing.Normal).Payload()
	if err != nil {
		t.Fatal(err)
	}
	for _, payload := range [][]byte{[]byte("not json"), []byte(`{"values":[1,2,3]}`), []byte(`{"values":["x"]}`), good} {
		if _, err := d.Publish(ctx, "machines/press/vibration", payload); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case out := <-verdicts:
		if errs, ok := strings.Count(out, "machines/press/verdict/error "), strings.Count(out, `"probabilities"`); errs != 3 || ok != 1 {
			t.Errorf("%d errors and %d verdicts, want 3 and 1:\n%s", errs, ok, out)
		}
	case <-ctx.Done():
		t.Fatal("no verdicts")
	}
	if err := serves(ctx, e, "1", "Failed"); err != nil {
		t.Error("after bad payloads:", err)
	}

	s.Write("model.yaml", model(t, s, "2b", bearingModel(t, "2")))
	rigtest.Eventually(t, "a mended version takes over", func() error { return serves(t.Context(), e, "2b", "Serving") })
}

// A mistake in one manifest, or an object too large to mirror, must be told with file, line and reason, and must not touch
// what other files say.
func TestBadManifestsDisturbNothing(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", "")
	s.Start(e)
	s.Write("good.yaml", rigtest.PodManifest("good", "dock-1", "v1"))
	rigtest.Eventually(t, "the good pod", func() error { return s.Holds(e, true, "good") })
	s.Write("good.yaml", strings.Replace(rigtest.PodManifest("good", "dock-1", "v2"), "image:", "imagee:", 1))
	s.Write("syntax.yaml", "kind: [\n")
	s.Write("kind.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n")
	s.Write("nodeless.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: a, image: b}]}\n")
	s.Write("huge.yaml", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: huge\n  annotations: {a: \""+strings.Repeat("x", 5<<20)+"\"}\nspec:\n  nodeName: dock-1\n  containers: [{name: a, image: b}]\n")
	for _, want := range []string{"file=good.yaml line=9 ", "unknown field", "file=syntax.yaml line=1 ", "malformed YAML", "file=kind.yaml line=2 ", "file=nodeless.yaml line=4 ", "nodeName", "name=huge "} {
		rigtest.Eventually(t, "the log says "+want, func() error {
			b, err := os.ReadFile(s.Hub.Log)
			if err == nil && !strings.Contains(string(b), want) {
				err = fmt.Errorf("it ends with %s", s.Hub.Tail(5))
			}
			return err
		})
	}
	s.Write("next.yaml", rigtest.PodManifest("next", "dock-1", "v1"))
	rigtest.Eventually(t, "other files go on", func() error { return s.Holds(e, true, "good", "next") })
}

// A device on the edge's broker must not reach Longshore's own topics, nor fall over the agent with hostile packets.
func TestHostileDevicesDisturbNothing(t *testing.T) {
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings)
	s.Start(e)
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	for name, raw := range map[string][]byte{
		"nothing but noise":        {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"a length without an end":  {0x10, 0x80, 0x80, 0x80, 0x80, 0x80},
		"a huge CONNECT":           {0x10, 0xff, 0xff, 0xff, 0x7f},
		"a PUBLISH before CONNECT": append([]byte{0x30, 5, 0, 3}, "a/b"...),
		"another protocol":         []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
	} {
		c, err := net.DialTimeout("tcp", e.Broker, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(raw)
		_ = c.SetReadDeadline(time.Now().Add(rigtest.Soon))
		n, err := c.Read(make([]byte, 64))
		if isTimeout(err) || n > 4 {
			t.Errorf("%s was not refused: read %d, %v", name, n, err)
		}
		c.Close()
	}
	d := &rig.Device{Address: e.Broker, ClientID: "press-7"}
	defer d.Close()
	for _, name := range []string{"longshore/v1/nodes/dock-1/reported", "longshore/v1/nodes/dock-1/telemetry", "longshore/v1/models/x", "$SYS/x"} {
		try, done := context.WithTimeout(ctx, 2*time.Second)
		_, err := d.Publish(try, name, []byte("forged"))
		done()
		if out, _ := rigtest.Mosquitto(ctx, t, e.Broker, "mosquitto_sub", "-t", name, "-W", "1", "-v"); strings.Contains(out, "forged") {
			t.Errorf("%s reached subscribers (publish: %v)", name, err)
		}
		d.Close()
	}
	if _, err := d.Publish(ctx, "sensors/a", []byte("1")); err != nil {
		t.Fatal(err)
	}
	rigtest.Eventually(t, "readings go on to the cloud", func() error { return s.Drained(e, "readings") })
	if records, err := s.Hub.Records(ctx, "dock-1", "readings"); err != nil || len(records) != 1 {
		t.Errorf("%d records, %v; want the one reading", len(records), err)
	}
}
