package main

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/sync/outbox"
)

func write(t *testing.T, dir, name, text string, mode os.FileMode) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return file
}

func noEnv(string) (string, bool) { return "", false }

// Without this, what an installer wrote in one place would be silently overruled by another.
func TestFlagsWinOverEnvironmentOverFile(t *testing.T) {
	file := write(t, t.TempDir(), "edgehub.yaml", `
state: /from/file
credential: /from/file
hub: {url: "tcp://file:1"}
models: {diskQuota: 10MiB, ortLibrary: /lib/ort.so}
telemetry: {backlogRate: 64KiB}
streams:
  - {name: vibration, topics: ["sensors/+/vibration"], maxBytes: 1MiB, maxAge: 7d, policy: refuse}
`, 0o600)
	env := map[string]string{"LONGSHORE_STATE": "/from/env", "LONGSHORE_CREDENTIAL": "/from/env", "LONGSHORE_MODELS_ORT_LIBRARY": "/env/ort.so",
		"LONGSHORE_BROKER_MAX_CONNECTIONS": "200"}
	c, err := loadConfig(file, func(k string) (string, bool) { v, ok := env[k]; return v, ok }, map[string]string{"state": "/from/flag", "models-memory-limit": "1GiB"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.validate(); err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(c.State, c.Credential, c.Hub.URL, int64(c.Models.DiskQuota), c.Models.ORTLibrary, int64(c.Models.MemoryLimit),
		int64(c.Telemetry.BacklogRate), c.Broker.Listen, int(c.Broker.MaxConnections), c.HTTP.Listen)
	want := fmt.Sprint("/from/flag", "/from/env", "tcp://file:1", 10<<20, "/env/ort.so", 1<<30, 64<<10, "127.0.0.1:1883", 200, "127.0.0.1:8090")
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if q := c.quotas()["vibration"]; q.MaxBytes != 1<<20 || q.MaxAge != 7*24*time.Hour || q.Policy != outbox.Refuse {
		t.Errorf("quota %+v", q)
	}
}

// Without this, one wrong key of a file would leave people with an agent that does not start, or does not do what they wrote,
// and no line to look at.
func TestBadConfigurationSaysWhereAndWhat(t *testing.T) {
	const ok = "credential: c\nhub: {url: \"tcp://hub:1883\"}\n"
	for _, c := range []struct{ text, want string }{
		{"state: [", "line 1"},
		{ok + "hubb: {}", `line 3: unknown key "hubb"`},
		{ok + "broker: {listen: \"127.0.0.1:1\", port: 3}", `line 3: unknown key "port"`},
		{ok + "models:\n  diskQuota: many", `line 4: "many" is not a size`},
		{ok + "streams:\n  - name: a\n    maxAge: soon", `line 5: "soon" is not a duration`},
		{ok + "streams:\n  - name: a\n    topic: x", `line 5: unknown key "topic" of a stream`},
		{ok + "streams:\n  - name: a\n    topics: [\"a/#/b\"]", `line 4: stream "a": topic filter "a/#/b"`},
		{ok + "streams:\n  - name: a\n    topics: [\"longshore/v1/#\"]", "not for devices"},
		{ok + "streams:\n  - name: a\n    policy: keep", `policy "keep"`},
		{ok + "streams:\n  - name: a\n  - name: a", `line 5: stream "a" is already there in line 4`},
		{ok + "streams:\n  - topics: [a]", "stream name"},
		{"hub: {url: \"tcp://hub:1883\"}", "cloudhub edges enroll"},
		{"credential: c", "hub.url is not set"},
		{"credential: c\nhub: {url: hub}", "hub.url"},
		{"credential: c\nhub: {url: \"http://hub\"}", "none of tcp, tls, ws and wss"},
		{"credential: c\nhub: {url: \"tcp://a:b@hub:1\"}", "must not contain a user"},
		{ok + "broker: {listen: \"1883\"}", "not host:port"},
		{ok + "broker: {listen: \"0.0.0.0:1883\"}", "broker.allowAnonymous"},
		{ok + "broker: {maxConnections: 0}", "broker.maxConnections: 0 lets no device in"},
		{ok + "broker: {maxConnections: lots}", `line 3: "lots" is not a whole number`},
		{ok + "http: {listen: \"0.0.0.0:8090\"}", "http.allowAnonymous to true (--http-allow-anonymous)"},
		{ok + "http: {listen: \":8090\"}", "http.listen: :8090 is beyond this machine"},
		{ok + "log: {format: xml}", "neither text nor json"},
		{ok + "log: {level: loud}", "none of debug"},
	} {
		file := write(t, t.TempDir(), "edgehub.yaml", c.text, 0o600)
		cfg, err := loadConfig(file, noEnv, nil)
		if err == nil {
			err = cfg.validate()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q\n got %v\nwant %s", c.text, err, c.want)
		}
	}
	if _, err := loadConfig("/no/such/file", noEnv, nil); err == nil {
		t.Error("a configuration file that was named and is not there is no error")
	}
	if _, err := loadConfig("", noEnv, map[string]string{"models-disk-quota": "x"}); err == nil || !strings.Contains(err.Error(), "--models-disk-quota") {
		t.Errorf("a bad flag: %v", err)
	}
}

// Without this, a box whose network is its own could not be asked from beside it.
func TestDoorsOpenForAllWhenToldTo(t *testing.T) {
	c, err := loadConfig(write(t, t.TempDir(), "edgehub.yaml", `
credential: c
hub: {url: "tcp://hub:1883"}
broker: {listen: "0.0.0.0:1883", allowAnonymous: true}
http: {listen: "[::]:8090"}
`, 0o600), noEnv, map[string]string{"http-allow-anonymous": "true"})
	if err == nil {
		err = c.validate()
	}
	if err != nil {
		t.Error(err)
	}
}

// Without this, most people would have to find out by themselves where model files come from.
func TestFilesAddressFollowsFromWebSocket(t *testing.T) {
	for url, want := range map[string]string{"wss://hub/mqtt": "https://hub", "ws://hub:8080/mqtt": "http://hub:8080", "tcp://hub:1883": ""} {
		c := defaults()
		c.Credential, c.Hub.URL = "c", url
		if err := c.validate(); err != nil || c.Hub.Files != want {
			t.Errorf("%s gives %q, error %v; want %q", url, c.Hub.Files, err, want)
		}
	}
}

// testCredential writes a credential file and returns it with its token.
func testCredential(t *testing.T, dir string) (file, token string) {
	t.Helper()
	secret, key := make([]byte, 32), make([]byte, 32)
	for _, b := range [][]byte{secret, key} {
		if _, err := rand.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	token = base64.RawURLEncoding.EncodeToString(secret)
	text := fmt.Sprintf("edge: edge-1\ntoken: %s\nhubKeys: [%s]\n", token, base64.StdEncoding.EncodeToString(key))
	return write(t, dir, "credential.yaml", text, 0o600), token
}

// Without this, a credential cut by a copy or readable by everybody would show as a dead network, or not at all.
func TestBadCredentialSaysWhatToDo(t *testing.T) {
	dir := t.TempDir()
	good, token := testCredential(t, dir)
	text, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := readCredential(good); err != nil || c.Edge != "edge-1" || len(c.Key) != 32 || len(c.HubKeys) != 1 {
		t.Fatalf("good credential: %+v, %v", c, err)
	}
	for _, c := range []struct{ name, text, want string }{
		{"short token", strings.Replace(string(text), token, token[:20], 1), "instead of 32"},
		{"no keys", "edge: edge-1\ntoken: " + token + "\n", "hubKeys is empty"},
		{"short key", "edge: edge-1\ntoken: " + token + "\nhubKeys: [AAAA]\n", "3 bytes instead of 32"},
		{"bad name", strings.Replace(string(text), "edge-1", "Edge_1", 1), "edge name"},
		{"unknown key", string(text) + "extra: 1\n", `line 4: unknown key "extra"`},
		{"not YAML", "\x00\x01", "cloudhub edges enroll"},
	} {
		_, err := readCredential(write(t, dir, "bad.yaml", c.text, 0o600))
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), token) {
			t.Errorf("%s: got %v, want %q and no token", c.name, err, c.want)
		}
	}
	if err := os.Chmod(good, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readCredential(good); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("readable by everybody: %v", err)
	}
	if _, err := readCredential(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "cloudhub edges enroll") {
		t.Errorf("missing: %v", err)
	}
}

// Without this, the log lines of a support bundle would be cut in the middle, or fill the memory.
func TestLogRingKeepsNewestWholeLines(t *testing.T) {
	r := &logRing{}
	line := strings.Repeat("x", 99) + "\n"
	for i := range 10_000 {
		if _, err := fmt.Fprintf(r, "%06d %s", i, line); err != nil {
			t.Fatal(err)
		}
	}
	got := string(r.Bytes())
	if len(got) > logKeep || len(got) < logKeep/4 || !strings.HasSuffix(got, "009999 "+line) || !strings.HasPrefix(got[6:], " x") {
		t.Errorf("%d bytes kept, beginning %.20q", len(got), got)
	}
}
