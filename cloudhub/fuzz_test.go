package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/sync/inbox"
)

// FuzzConfig: whatever stands in the configuration, it is refused with a reason or describes a hub whose API is not open to
// everybody.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		"", "mqtt: 127.0.0.1:1883\nhub-name: h\n", "mqtt: [a]\n", "mqtt: a\nmqtt: b\n", "http: 0.0.0.0:80\nhub-name: h\n", "? [a]\n: b\n", "a: &a [*a]",
		"retention-bytes: 1e99Gi\n", "retention-age: -1h\n", "- a\n", "unknown: 1\n", "mqtt: ~\n", "http: \"localhost:x\"\nhub-name: h\napi-token-file: f\n",
	} {
		f.Add([]byte(s))
	}
	path := filepath.Join(f.TempDir(), "cloudhub.yaml")
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		c := &config{}
		settings := c.flags()
		if err := fill(settings, path, func(string) (string, bool) { return "", false }); err != nil {
			if !strings.Contains(err.Error(), path) {
				t.Fatalf("the error does not name the file: %v", err)
			}
			return
		}
		if c.validate() != nil {
			return
		}
		for _, address := range []string{c.MQTT, c.HTTP} {
			if _, _, err := net.SplitHostPort(address); err != nil {
				t.Fatalf("address %q is taken", address)
			}
		}
		if c.APITokenFile == "" && !loopback(c.HTTP) || c.RetentionAge <= 0 || c.RetentionBytes <= 0 || c.ModelCacheBytes <= 0 || c.Data == "" {
			t.Fatalf("taken: %+v", c)
		}
	})
}

// FuzzPosition: a client that pages through telemetry must go on where it was, or hear that it can't.
func FuzzPosition(f *testing.F) {
	f.Add(position(inbox.ID{Edge: "box-1", Stream: "s", Seq: 7}))
	f.Add("a/b/c/d")
	f.Add("box-1/s/00000000000000000000000000000000/18446744073709551615")
	f.Add("box-1/s/000000000000000000000000000000AB/+7")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := parsePosition(s)
		if err != nil {
			return
		}
		if again, err := parsePosition(position(id)); err != nil || again != id {
			t.Fatalf("%q is %+v, which is written %q", s, id, position(id))
		}
	})
}
