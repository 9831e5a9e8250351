package enrol

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/sync/topic"
)

// FuzzTokens: a token file that people edit says who may connect. It must be read as it stands or refused as a whole, and
// enrolling one more edge must change nothing for the others.
func FuzzTokens(f *testing.F) {
	hash := strings.Repeat("ab", sha256.Size)
	for _, s := range []string{
		"", "# a comment\n\nbox-1 " + hash + "\n", "box-1 " + hash + "\r\nbox-2\t" + strings.ToUpper(hash), "box-1 " + hash + "\nbox-1 " + hash,
		"box-1 " + hash + " # since May", "BOX " + hash, "box-1 abc", "\ufeffbox-1 " + hash, "box-1\u2028" + hash,
	} {
		f.Add(s)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, content string) {
		keys, err := parseTokens([]byte(content))
		if err != nil {
			return
		}
		for edge, key := range keys {
			if topic.ValidEdge(edge) != nil {
				t.Fatalf("edge %q was let in", edge)
			}
			if !strings.Contains(strings.ToLower(content), hex.EncodeToString(key[:])) {
				t.Fatalf("the key of %s is not in the file", edge)
			}
		}
		path := filepath.Join(dir, "tokens")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Enroll(path, "newcomer", true); err != nil {
			t.Fatalf("nobody can be enrolled: %v", err)
		}
		after, err := readTokens(path)
		if err != nil {
			t.Fatalf("enrolling broke the file: %v", err)
		}
		if _, ok := after["newcomer"]; !ok {
			t.Fatal("the newcomer is not in the file")
		}
		delete(after, "newcomer")
		delete(keys, "newcomer")
		for edge, key := range keys {
			if after[edge] != key {
				t.Fatalf("%s has another key than before", edge)
			}
		}
		if len(after) != len(keys) {
			t.Fatalf("%d edges were enrolled, now there are %d besides the newcomer", len(keys), len(after))
		}
	})
}

// FuzzSigningKey: a signing key file that is damaged must be an error, never another key.
func FuzzSigningKey(f *testing.F) {
	path := filepath.Join(f.TempDir(), "key.pem")
	key, err := makeKey(path)
	if err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:40])
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		read, err := readKey(path)
		if err == nil && len(read) != len(key) {
			t.Fatalf("a key of %d bytes", len(read))
		}
	})
}
