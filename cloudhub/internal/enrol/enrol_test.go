package enrol_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/cloudhub/internal/enrol"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

func login(edge, token string) broker.Login {
	return broker.Login{Username: edge, Password: []byte(token)}
}

// Without it, an edge enrolled while the hub runs would be refused, or one that was removed could go on.
func TestRunningHubFollowsTheTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	tokens, err := enrol.OpenTokens(path, slog.New(slog.DiscardHandler), mirror.Access)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tokens.Authenticate(t.Context(), login("box-1", "x")); err == nil {
		t.Error("a stranger was let in")
	}
	token, err := enrol.Enroll(path, "box-1", false)
	if err != nil {
		t.Fatal(err)
	}
	id, err := tokens.Authenticate(t.Context(), login("box-1", token))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := base64.RawURLEncoding.DecodeString(token)
	if want := sha256.Sum256(raw); id.Name != "box-1" || !bytes.Equal(id.Key, want[:]) || !id.Access.Publish("longshore/v1/nodes/box-1/hello") {
		t.Errorf("identity %+v", id)
	}
	replaced, err := enrol.Enroll(path, "box-1", true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tokens.Authenticate(t.Context(), login("box-1", token)); err == nil {
		t.Error("a replaced token still opens")
	}
	if _, err := tokens.Authenticate(t.Context(), login("box-1", replaced)); err != nil {
		t.Error(err)
	}
	// A file that somebody broke keeps the edges that were known; one that is gone enrols nobody.
	if err := os.WriteFile(path, []byte("box-1 and more\nrubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tokens.Authenticate(t.Context(), login("box-1", replaced)); err != nil {
		t.Errorf("with a broken file: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := tokens.Authenticate(t.Context(), login("box-1", replaced)); err == nil {
		t.Error("a removed edge was let in")
	}
}

// G5: without it, an edge could fetch files or connect as another one.
func TestG5TokensAreOfOneEdge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	token, err := enrol.Enroll(path, "box-1", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := enrol.Enroll(path, "box-2", false); err != nil {
		t.Fatal(err)
	}
	tokens, err := enrol.OpenTokens(path, slog.New(slog.DiscardHandler), mirror.Access)
	if err != nil {
		t.Fatal(err)
	}
	for header, want := range map[string]bool{
		"Bearer box-1:" + token: true, "Bearer box-2:" + token: false, "Bearer box-1:" + token[1:]: false, "Bearer box-1:": false,
		"Bearer " + token: false, "Basic box-1:" + token: false, "": false, "Bearer :" + token: false, "Bearer box-1:" + token + "A": false,
	} {
		r := &http.Request{Header: http.Header{"Authorization": {header}}}
		if id, err := tokens.Bearer(r); (err == nil) != want {
			t.Errorf("%q: %+v %v, want %v", header, id, err, want)
		} else if err != nil && strings.Contains(err.Error(), token) {
			t.Errorf("the error tells the token: %v", err)
		}
	}
}

// Without it, enrolling several edges at once, as a script does, would lose some.
func TestEnrollingAtOnceLosesNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			if _, err := enrol.Enroll(path, fmt.Sprint("box-", i), false); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if content, err := os.ReadFile(path); err != nil || bytes.Count(content, []byte("\n")) != 20 {
		t.Errorf("%d lines (%v), want 20", bytes.Count(content, []byte("\n")), err)
	}
	if _, err := enrol.Enroll(path, "box-7", false); !errors.Is(err, enrol.ErrEnrolled) {
		t.Errorf("a second token: %v", err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", st.Mode())
	}
}

// Without it, a broken token file would shut out the fleet without saying where it is broken.
func TestBrokenTokenFilesNameTheLine(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	for content, want := range map[string]string{
		"# fleet\n\nbox-1 " + hash + "\nbox-2\n":       "line 4",
		"Box_1 " + hash:                                "DNS subdomain",
		"box-1 " + hash[1:]:                            "64 hexadecimal digits",
		"box-1 " + hash + "\nbox-1 " + hash:            "twice",
		"box-1 " + strings.Repeat("z", 64) + " \nbox-": "line 1",
	} {
		path := filepath.Join(t.TempDir(), "tokens")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := enrol.OpenTokens(path, slog.New(slog.DiscardHandler), mirror.Access); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", content, err, want)
		}
	}
}

// Without it, two processes that start at once would sign with two keys, and edges would believe one of them only.
func TestSigningKeyIsMadeOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	keys := make(chan ed25519.PrivateKey, 8)
	var all sync.WaitGroup
	for range cap(keys) {
		all.Go(func() {
			k, err := enrol.SigningKey(path)
			if err != nil {
				t.Error(err)
			}
			keys <- k
		})
	}
	all.Wait()
	first := <-keys
	for range cap(keys) - 1 {
		if k := <-keys; !first.Equal(k) {
			t.Fatal("two keys were made")
		}
	}
	text, err := enrol.NewCredential("box-1", "token", first).YAML()
	if err != nil {
		t.Fatal(err)
	}
	var c enrol.Credential
	if err := yaml.UnmarshalStrict(text, &c); err != nil {
		t.Fatal(err)
	}
	public, err := base64.StdEncoding.DecodeString(c.HubKeys[0])
	if err != nil || !first.Public().(ed25519.PublicKey).Equal(ed25519.PublicKey(public)) {
		t.Errorf("credential %s does not hold the public key (%v)", text, err)
	}
}
