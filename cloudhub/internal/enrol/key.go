package enrol

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"sigs.k8s.io/yaml"

	"github.com/longshore-edge/longshore/sync/durable"
)

// SigningKey reads the hub's Ed25519 key from a PEM file (PKCS #8), or makes one there. Edges believe only heads signed by a
// key that their credential names: with the key lost, every edge needs a new credential.
func SigningKey(path string) (ed25519.PrivateKey, error) {
	key, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	unlock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, fmt.Errorf("lock signing key: %w", err)
	}
	defer unlock()
	if key, err = readKey(path); !errors.Is(err, fs.ErrNotExist) {
		return key, err // another process was faster
	}
	return makeKey(path)
}

func readKey(path string) (ed25519.PrivateKey, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read signing key: %w", err)
	}
	// A key that Kubernetes mounts is readable by its group, so only others count.
	if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("signing key %s may be used by anyone on this machine (mode %#o): run chmod 600 %[1]s", path, st.Mode().Perm())
	}
	block, _ := pem.Decode(content)
	if block == nil {
		return nil, fmt.Errorf("signing key %s is not a PEM file: restore it from a backup, or remove it and enrol every edge again", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("signing key %s: %w", path, err)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("signing key %s is a %T, want Ed25519", path, key)
	}
	return private, nil
}

func makeKey(path string) (ed25519.PrivateKey, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make signing key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("make signing key: %w", err)
	}
	if err := durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return nil, fmt.Errorf("write signing key: %w", err)
	}
	return private, nil
}

// Credential is what an edge is given: its name, its token, and the keys of the hubs it believes.
type Credential struct {
	Edge  string `json:"edge"`
	Token string `json:"token"`
	// HubKeys are base64 Ed25519 public keys.
	HubKeys []string `json:"hubKeys"`
}

// NewCredential puts a credential together.
func NewCredential(edge, token string, keys ...ed25519.PrivateKey) Credential {
	c := Credential{Edge: edge, Token: token}
	for _, k := range keys {
		c.HubKeys = append(c.HubKeys, base64.StdEncoding.EncodeToString(k.Public().(ed25519.PublicKey)))
	}
	return c
}

// YAML is the content of a credential file.
func (c Credential) YAML() ([]byte, error) {
	b, err := yaml.Marshal(c)
	return append([]byte("# Credential of one Longshore edge. Who has it is that edge: keep it secret.\n"), b...), err
}
