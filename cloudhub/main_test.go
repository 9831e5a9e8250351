package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// The scripts and the tests below run this test binary as the command.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cloudhub": main})
}

// Without it, a newcomer's mistakes would be answered with riddles, or not at all.
func TestCommands(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			door, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			e.Defer(func() { door.Close() })
			e.Setenv("TAKEN", door.Addr().String())
			return nil
		},
	})
}

// process is a hub as a user runs it.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	dir  string
	log  *os.File
	http string
}

// start runs a hub in dir and waits until it is ready.
func start(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	for _, d := range []string{"manifests", "models"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := &process{t: t, dir: dir, http: freeAddress(t)}
	var err error
	if p.log, err = os.CreateTemp(t.TempDir(), "log"); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(exe, append([]string{"run", "--data", "data", "--models", "models", "--mqtt", "127.0.0.1:0", "--http", p.http}, args...)...)
	// testscript's Main runs the command whose name the binary is called by.
	p.cmd.Args[0] = "cloudhub"
	p.cmd.Dir, p.cmd.Stderr = dir, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
		if t.Failed() {
			t.Log(p.text())
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; <-time.After(10 * time.Millisecond) {
		if code, _ := p.get("/readyz", ""); code == http.StatusOK {
			return p
		}
		if time.Now().After(deadline) {
			t.Fatalf("not ready; its log:\n%s", p.text())
		}
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (p *process) text() string {
	b, _ := os.ReadFile(p.log.Name())
	return string(b)
}

func (p *process) get(path, token string) (int, string) {
	req, err := http.NewRequest(http.MethodGet, "http://"+p.http+path, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// stop asks for an orderly end and returns the exit code.
func (p *process) stop() int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = p.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		p.t.Fatalf("still running after SIGTERM; its log:\n%s", p.text())
	}
	return p.cmd.ProcessState.ExitCode()
}

const twoEdges = `apiVersion: longshore.dev/v1alpha1
kind: Edge
metadata: {name: box-1}
---
apiVersion: longshore.dev/v1alpha1
kind: Edge
metadata: {name: box-2}
spec: {plain: true}
`

// Without it, the interfaces that scripts and dashboards are built on could break unseen, and a hub could take a kill to end.
func TestHubServesItsDoorsAndEnds(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "manifests", "edges.yaml"), []byte(twoEdges), 0o644); err != nil {
		t.Fatal(err)
	}
	var edges []edgeJSON
	for deadline := time.Now().Add(30 * time.Second); len(edges) != 2; <-time.After(10 * time.Millisecond) {
		_, body := p.get("/api/v1/edges", "")
		if err := json.Unmarshal([]byte(body), &edges); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("edges %s, want box-1 and box-2", body)
		}
	}
	if edges[0].Name != "box-1" || edges[0].Link != "Offline" || edges[0].Synced {
		t.Errorf("edges %+v, want box-1 offline first", edges)
	}
	for path, want := range map[string]int{
		"/healthz": 200, "/metrics": 200, "/api/v1/telemetry": 200, "/api/v1/ledger?edge=box-1": 200,
		"/api/v1/telemetry?limit=0": 400, "/api/v1/telemetry?from=yesterday": 400, "/api/v1/telemetry?egde=box-1": 400,
		"/models/sha256:" + strings.Repeat("0", 64): 403, "/models/../tokens": 404, "/": 404, "/mqtt": 400,
	} {
		code, body := p.get(path, "")
		refused := want == 403 && code == 401 || want == 400 && path == "/mqtt" && code/100 == 4
		if code != want && !refused {
			t.Errorf("%s: %d %s, want %d", path, code, body, want)
		}
	}
	_, metrics := p.get("/metrics", "")
	for _, line := range []string{"longshore_sessions 0", "longshore_telemetry_blocked 0", `longshore_telemetry_records_total{state="duplicate"} 0`} {
		if !strings.Contains(metrics, line) {
			t.Errorf("/metrics lacks %q", line)
		}
	}
	if code := p.stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM; log:\n%s", code, p.text())
	}
	// The same folder is free again.
	if code := start(t, dir).stop(); code != 0 {
		t.Errorf("exit code %d of the second run", code)
	}
}

// Without it, anyone on the network could read the fleet's telemetry.
func TestAPITokenGuardsTheAPI(t *testing.T) {
	dir := t.TempDir()
	token := strings.Repeat("s", 32)
	if err := os.WriteFile(filepath.Join(dir, "api-token"), []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, dir, "--api-token-file", "api-token")
	for _, path := range []string{"/api/v1/edges", "/api/v1/telemetry", "/api/v1/ledger"} {
		for given, want := range map[string]int{"": 401, "wrong": 401, token: 200} {
			if code, _ := p.get(path, given); code != want {
				t.Errorf("%s with token %q: %d, want %d", path, given, code, want)
			}
		}
	}
}

// Without it, two hubs on one data folder would corrupt each other's telemetry.
func TestDataFolderHasOneHub(t *testing.T) {
	dir := t.TempDir()
	start(t, dir)
	cfg := testConfig(dir)
	if _, err := newHub(cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another cloudhub uses the data folder") {
		t.Errorf("a second hub on the same folder: %v", err)
	}
}

// Without it, a hub whose door is taken would leave the folder locked, or hide which door.
func TestTakenDoorsAreNamed(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "manifests"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{"--mqtt", "--http"} {
		cfg := testConfig(dir)
		if flag == "--mqtt" {
			cfg.MQTT = taken.Addr().String()
		} else {
			cfg.HTTP = taken.Addr().String()
		}
		if _, err := newHub(cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), flag) || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("%s taken: %v", flag, err)
		}
	}
	h, err := newHub(testConfig(dir), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("the folder is not free again: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.run(ctx); err != nil {
		t.Error(err)
	}
	h.close()
}

func testConfig(dir string) config {
	var cfg config
	cfg.flags()
	cfg.Data, cfg.Manifests, cfg.MQTT, cfg.HTTP = filepath.Join(dir, "data"), filepath.Join(dir, "manifests"), "127.0.0.1:0", "127.0.0.1:0"
	cfg.tokenFile()
	return cfg
}

// Without it, people could not tell which of three places a setting came from.
func TestConfigurationPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(file, []byte("log-level: debug\nhub-name: from-file\nmqtt: 127.0.0.1:1\nretention-bytes: 1Gi\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var cfg config
	settings := cfg.flags()
	if err := settings.Parse([]string{"--mqtt", "127.0.0.1:2"}); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"LONGSHORE_HUB_NAME": "from-env", "LONGSHORE_MQTT": "127.0.0.1:3"}
	err := fill(settings, file, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	got := []string{cfg.MQTT, cfg.HubName, cfg.LogLevel, fmt.Sprint(int64(cfg.RetentionBytes)), cfg.Source}
	if want := []string{"127.0.0.1:2", "from-env", "debug", "1073741824", "folder"}; !slices.Equal(got, want) {
		t.Errorf("configuration %v, want %v", got, want)
	}
}
