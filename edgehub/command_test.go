package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
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
	"strings"
	"syscall"
	"testing"
	"time"
)

// asCommand makes the test binary the command itself, so that the tests below start a real process.
const asCommand = "LONGSHORE_TEST_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// command prepares "edgehub args...".
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCommand+"=1", "GORACE=atexit_sleep_ms=0") // a process of the race detector else lingers for a second
	return cmd
}

// edgehub runs the command to its end and returns what it printed and whether it succeeded.
func edgehub(t *testing.T, args ...string) (out string, ok bool) {
	t.Helper()
	b, err := command(t, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(b), err == nil
}

// testBox is a folder with a configuration of an edge whose hub is not there.
type testBox struct {
	t                  *testing.T
	dir, config, token string
	state              string
	broker, http       string // addresses of the running agent
	cmd                *exec.Cmd
}

func newTestBox(t *testing.T) *testBox {
	t.Helper()
	b := &testBox{t: t, dir: t.TempDir()}
	b.state = filepath.Join(b.dir, "state")
	var credential string
	credential, b.token = testCredential(t, b.dir)
	b.config = write(t, b.dir, "edgehub.yaml", fmt.Sprintf(`state: %s
credential: %s
hub: {url: "tcp://127.0.0.1:1"}
broker: {listen: "127.0.0.1:0"}
http: {listen: "127.0.0.1:0"}
models: {worker: /bin/true}
streams: [{name: vibration, topics: ["sensors/#"]}]
`, b.state, credential), 0o600)
	return b
}

// start runs the agent and waits until it answers.
func (b *testBox) start() {
	b.t.Helper()
	b.cmd = command(b.t, "run", "--config", b.config)
	var out bytes.Buffer
	b.cmd.Stderr = &out
	if err := b.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		raw, err := ask(b.t.Context(), stateDir(b.state), "/status")
		var st Status
		if err == nil {
			err = json.Unmarshal(raw, &st)
		}
		if err == nil {
			b.broker, b.http = st.Devices.Listen, st.HTTP
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			_ = b.cmd.Process.Kill()
			_ = b.cmd.Wait()
			b.t.Fatalf("the agent does not answer: %v\n%s", err, out.String())
		}
	}
}

// stop ends the agent as systemd does and returns how long that took.
func (b *testBox) stop() time.Duration {
	b.t.Helper()
	began := time.Now()
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		b.t.Fatal(err)
	}
	if err := b.cmd.Wait(); err != nil {
		b.t.Errorf("the agent ended with %v", err)
	}
	return time.Since(began)
}

func (b *testBox) status() Status {
	b.t.Helper()
	out, ok := edgehub(b.t, "status", "-o", "json", "--config", b.config)
	var s Status
	if err := json.Unmarshal([]byte(out), &s); err != nil || !ok {
		b.t.Fatalf("status: %v\n%s", err, out)
	}
	return s
}

func (b *testBox) publish(message string) {
	b.t.Helper()
	host, port, _ := strings.Cut(b.broker, ":")
	path, err := exec.LookPath("mosquitto_pub")
	if err != nil {
		b.t.Fatal("mosquitto_pub is missing: install the Debian package mosquitto-clients")
	}
	out, err := exec.CommandContext(b.t.Context(), path, "-h", host, "-p", port, "-q", "1", "-t", "sensors/1", "-m", message).CombinedOutput()
	if err != nil {
		b.t.Fatalf("mosquitto_pub: %v: %s", err, out)
	}
}

// G2, G3: without this, a box without a network would not start, or forget over a restart what its devices were promised.
func TestAgentWorksWithNoHub(t *testing.T) {
	b := newTestBox(t)
	b.start()
	b.publish("one")
	b.publish("two")
	if took := b.stop(); took > 15*time.Second {
		t.Errorf("SIGTERM took %s", took)
	}
	b.start()
	defer b.stop()
	b.publish("three")
	s := b.status()
	if s.Edge != "edge-1" || s.Link.State != linkDown || len(s.Outbox.Streams) != 1 {
		t.Fatalf("status %+v", s)
	}
	if o := s.Outbox.Streams[0]; o.Stream != "vibration" || o.Accepted != 3 || o.Held != 3 || o.Acked != 0 {
		t.Errorf("stream %+v", o)
	}
	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ok", "/status": `"edge": "edge-1"`, "/v2/health/live": "", "/metrics": `longshore_edge_outbox_held_records{stream="vibration"} 3`,
	} {
		resp, err := http.Get("http://" + b.http + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s %v, without %q", path, resp.Status, err, want)
		}
	}
	text, ok := edgehub(t, "status", "--config", b.config)
	if !ok || !strings.Contains(text, "nothing listens at") || !strings.Contains(text, "vibration") {
		t.Errorf("status for people:\n%s", text)
	}
	if text, ok := edgehub(t, "models", "--config", b.config); !ok || !strings.Contains(text, "no models") {
		t.Errorf("models:\n%s", text)
	}
}

// Without this, what is in the way of a start would cost people a search: the message must name it and what to do.
func TestWhatIsInTheWayIsExplained(t *testing.T) {
	b := newTestBox(t)
	b.start()
	defer b.stop()
	second := newTestBox(t)
	file := filepath.Join(second.dir, "file")
	write(t, second.dir, "file", "", 0o600)
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"state in use", []string{"--state", b.state}, []string{"in use by process", "--state"}},
		{"HTTP port taken", []string{"--http-listen", b.http}, []string{"http.listen", "address already in use", "--http-listen"}},
		{"MQTT port taken", []string{"--broker-listen", b.broker}, []string{"broker.listen", b.broker}},
		{"state is a file", []string{"--state", file}, []string{"state folder", "not a directory"}},
		{"state path too long", []string{"--state", "/tmp/" + strings.Repeat("x", 120)}, []string{"choose a shorter one"}},
		{"no credential", []string{"--credential", filepath.Join(second.dir, "none")}, []string{"cloudhub edges enroll"}},
		{"no CA", []string{"--hub-ca", file}, []string{"hub.ca", "no PEM certificate"}},
	} {
		out, ok := edgehub(t, append([]string{"run", "--config", second.config}, c.args...)...)
		for _, want := range c.want {
			if ok || !strings.Contains(out, want) {
				t.Errorf("%s: succeeded %v, want %q in:\n%s", c.name, ok, want, out)
			}
		}
		if strings.Contains(out, "goroutine ") || strings.Contains(out, b.token) {
			t.Errorf("%s: a stack or the token in:\n%s", c.name, out)
		}
	}
	if out, ok := edgehub(t, "status", "--config", second.config); ok || !strings.Contains(out, "no agent runs") {
		t.Errorf("status without an agent:\n%s", out)
	}
	if out, ok := edgehub(t, "sttus"); ok || !strings.Contains(out, "unknown command") {
		t.Errorf("a typing error:\n%s", out)
	}
}

// Without this, people would learn only from a model's FetchFailed that their edge does not know where model files are.
func TestMissingFilesAddressIsToldAtTheStart(t *testing.T) {
	b := newTestBox(t)
	for files, want := range map[string]bool{"": true, "http://127.0.0.1:1": false} {
		t.Setenv("LONGSHORE_HUB_FILES", files)
		b.start()
		warned := strings.Contains(strings.Join(b.status().Warnings, "\n"), "hub.files is not set")
		b.stop()
		if warned != want {
			t.Errorf("with hub.files %q: warned %t", files, warned)
		}
	}
}

// Without this, the configuration of a cloud hub on the same machine would keep the edge hub from starting, and the other way
// round.
func TestConfigurationVariableIsTheEdgesOwn(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LONGSHORE_CONFIG", write(t, dir, "cloudhub.yaml", "mqtt: 127.0.0.1:1\n", 0o600))
	t.Setenv("LONGSHORE_CLOUDHUB_CONFIG", filepath.Join(dir, "cloudhub.yaml"))
	if out, ok := edgehub(t, "status", "--state", dir); ok || !strings.Contains(out, "no agent runs") {
		t.Errorf("with a cloud hub's file: %s", out)
	}
	t.Setenv("LONGSHORE_EDGEHUB_CONFIG", write(t, dir, "edgehub.yaml", "stat: x\n", 0o600))
	if out, ok := edgehub(t, "status", "--state", dir); ok || !strings.Contains(out, `unknown key "stat"`) {
		t.Errorf("with its own file: %s", out)
	}
}

// Without this, leaving could take files that are not the agent's, or telemetry that nobody was told of.
func TestLeave(t *testing.T) {
	b := newTestBox(t)
	if out, ok := edgehub(t, "leave", "--yes", "--state", b.dir); ok || !strings.Contains(out, "no state folder") {
		t.Errorf("a folder that is no state folder:\n%s", out)
	}
	b.start()
	b.publish("waits")
	if out, ok := edgehub(t, "leave", "--yes", "--config", b.config); ok || !strings.Contains(out, "stop it first") {
		t.Errorf("while the agent runs:\n%s", out)
	}
	b.stop()
	if out, ok := edgehub(t, "leave", "--config", b.config); ok || !strings.Contains(out, "1 telemetry records") || !strings.Contains(out, "--yes") {
		t.Errorf("without --yes:\n%s", out)
	}
	kept := write(t, b.state, "notes.txt", "mine", 0o600)
	if out, ok := edgehub(t, "leave", "--yes", "--config", b.config); !ok {
		t.Errorf("leave:\n%s", out)
	}
	left, err := os.ReadDir(b.state)
	if err != nil || len(left) != 1 || left[0].Name() != filepath.Base(kept) {
		t.Errorf("left over: %v, error %v", left, err)
	}
	b.start() // and the box can begin anew
	for _, o := range b.status().Outbox.Streams {
		if o.Accepted != 0 {
			t.Errorf("the new start remembers %+v", o)
		}
	}
	b.stop()
}

// Without this, people would have to choose between help and their secrets.
func TestSupportBundleHoldsNoSecret(t *testing.T) {
	b := newTestBox(t)
	b.start()
	running := filepath.Join(b.dir, "running.tar.gz")
	if out, ok := edgehub(t, "support-bundle", "--config", b.config, "-f", running); !ok {
		t.Fatal(out)
	}
	b.stop()
	stopped := filepath.Join(b.dir, "stopped.tar.gz")
	if out, ok := edgehub(t, "support-bundle", "--config", b.config, "-f", stopped); !ok {
		t.Fatal(out)
	}
	for file, want := range map[string][]string{
		running: {"status.json", "config.json", "log.txt", "goroutines.txt", "metrics.txt", "files.txt", "version.txt"},
		stopped: {"status.json.error", "config-on-disk.json", "files.txt"},
	} {
		got := untar(t, file)
		for _, name := range want {
			if len(got["longshore-support/"+name]) == 0 {
				t.Errorf("%s: %s is missing or empty", file, name)
			}
		}
		for name, text := range got {
			if strings.Contains(text, b.token) {
				t.Errorf("%s: %s holds the token", file, name)
			}
		}
	}
	if out, ok := edgehub(t, "support-bundle", "--config", b.config, "-f", running); ok || !strings.Contains(out, "exists") {
		t.Errorf("an older bundle was overwritten:\n%s", out)
	}
}

func untar(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(b)
	}
}

// Without this, an installer on site would not see at a glance what holds a box up.
func TestStatusForPeople(t *testing.T) {
	var out bytes.Buffer
	printStatus(&out, Status{
		Edge: "edge-1", Agent: AgentStatus{Version: "v1", UptimeSeconds: 61},
		Link:   LinkStatus{State: linkSuperseded, Hub: "wss://hub/mqtt", Error: "another agent"},
		List:   ListStatus{Committed: strings.Repeat("ab", 32), Target: strings.Repeat("cd", 32), HaveBytes: 512, WantBytes: 1024},
		Models: []ModelStatus{{Namespace: "plant", Name: "bearing", DesiredVersion: "3", ServingVersion: "2", State: "Downloading", BytesDone: 30, BytesTotal: 100}},
		Pods:   []PodStatus{{Namespace: "plant", Name: "app", Phase: "Pending", Reason: "NoRuntime"}},
		Outbox: OutboxStatus{Streams: []StreamStatus{{Stream: "vibration", Accepted: 10, Acked: 7, Held: 3, Dropped: 0}}},
	})
	for _, want := range []string{
		"superseded", "another agent", "abababababab, not confirmed", "fetching cdcdcdcdcdcd [#####.....] 50% of 1.0 KiB",
		"Downloading [###.......] 30% of 100 B", "NoRuntime", "vibration  10",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

// Without this, one client that never ends its request would keep the agent from stopping until systemd kills it.
func TestServeHTTPEndsWithContext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	hold := make(chan struct{})
	defer close(hold)
	done := make(chan error, 1)
	began := make(chan struct{})
	go func() {
		done <- serveHTTP(ctx, l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(began)
			select {
			case <-hold:
			case <-r.Context().Done():
			}
		}), newLogger(LogConfig{}, io.Discard))
	}()
	go func() {
		resp, err := http.Get("http://" + l.Addr().String())
		if err == nil {
			resp.Body.Close()
		}
	}()
	<-began
	cancel() // a request that does not end must not hold the agent up
	if err := <-done; err != nil {
		t.Error(err)
	}
}
