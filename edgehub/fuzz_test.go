package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/longshore-edge/longshore/sync/topic"
)

// FuzzCredential: a credential file was carried to the box by hand. What is cut or altered must be refused; what is taken must
// be a whole identity.
func FuzzCredential(f *testing.F) {
	secret, key := bytes.Repeat([]byte{7}, 32), bytes.Repeat([]byte{9}, 32)
	token, hub := base64.RawURLEncoding.EncodeToString(secret), base64.StdEncoding.EncodeToString(key)
	f.Add("edge: box-1\ntoken: " + token + "\nhubKeys: [" + hub + "]\n")
	f.Add("edge: box-1\ntoken: " + token + "=\nhubKeys: []\n")
	f.Add("edge: &a box-1\ntoken: *a\nhubKeys: [*a]\n")
	f.Add("{edge: 1, token: [], hubKeys: {}}")
	f.Add("edge: a\n---\nedge: b\n")
	file := filepath.Join(f.TempDir(), "credential.yaml")
	read := func(t *testing.T, text []byte) (credential, error) {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return readCredential(file)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := read(t, []byte(text))
		if err != nil {
			return
		}
		raw, err := base64.RawURLEncoding.DecodeString(c.Token)
		sum := sha256.Sum256(raw)
		if err != nil || topic.ValidEdge(c.Edge) != nil || len(raw) != 32 || !bytes.Equal(c.Key, sum[:]) || len(c.HubKeys) == 0 {
			t.Fatalf("taken: %+v (%v)", c, err)
		}
		again := map[string]any{"edge": c.Edge, "token": c.Token}
		var keys []string
		for _, k := range c.HubKeys {
			if len(k) != 32 {
				t.Fatalf("a hub key of %d bytes", len(k))
			}
			keys = append(keys, base64.StdEncoding.EncodeToString(k))
		}
		again["hubKeys"] = keys
		b, err := yaml.Marshal(again)
		if err != nil {
			t.Fatal(err)
		}
		if same, err := read(t, b); err != nil || same.Edge != c.Edge || !bytes.Equal(same.Key, c.Key) || len(same.HubKeys) != len(c.HubKeys) {
			t.Fatalf("written out and read again: %+v, %v; want %+v", same, err, c)
		}
	})
}

// FuzzConfig: whatever stands in the configuration, it is refused with a reason or describes an agent that can be built and
// opens no door beyond the machine that nobody asked for.
func FuzzConfig(f *testing.F) {
	const ok = "credential: c\nhub: {url: \"tcp://hub:1883\"}\n"
	for _, s := range []string{
		ok, ok + "streams:\n- {name: s, topics: [\"a/+/#\"], maxBytes: 1MiB, maxAge: 7d, policy: refuse}\n", ok + "streams: [&a {name: a}, *a]\n",
		ok + "http: {listen: \"0.0.0.0:80\", allowAnonymous: true}\n", ok + "http: {listen: \":80\"}\n", ok + "memory: {limit: 1e300GB, gcPercent: -1}\n",
		ok + "models: {diskQuota: -1, downloadRate: \"\"}\n", "hub: {url: \"wss://u:p@h/\"}\ncredential: c\n", "a: &a [*a]", "? {a: b}\n: c",
		ok + "streams:\n- <<: {name: a}\n", ok + "streams: [~]\n", ok + "streams: {a: b}\n", ok + "log: {level: \"info+9999999999999999999\"}\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c := defaults()
		if err := decodeYAML(text, &c); err != nil {
			if err.Error() == "" {
				t.Fatal("refused without a reason")
			}
			return
		}
		if c.validate() != nil {
			return
		}
		if !filepath.IsAbs(c.State) || !loopback(c.HTTP.Listen) && !bool(c.HTTP.AllowAnonymous) || !loopback(c.Broker.Listen) && !bool(c.Broker.AllowAnonymous) {
			t.Fatalf("taken: %+v", c)
		}
		for _, size := range []Bytes{c.Models.DiskQuota, c.Models.DownloadRate, c.Models.MemoryLimit, c.Telemetry.BacklogRate, c.Memory.Limit} {
			if size < 0 {
				t.Fatalf("a size below zero is taken: %+v", c)
			}
		}
		for _, s := range c.Streams {
			if err := s.validate(); err != nil || s.MaxBytes < 0 || time.Duration(s.MaxAge) < 0 {
				t.Fatalf("stream %+v is taken: %v", s, err)
			}
		}
		if len(c.quotas()) != len(c.Streams) {
			t.Fatalf("%d quotas of %d streams", len(c.quotas()), len(c.Streams))
		}
		if err := c.validate(); err != nil {
			t.Fatalf("valid once and not twice: %v", err)
		}
	})
}
