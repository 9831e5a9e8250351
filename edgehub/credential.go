package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/longshore-edge/longshore/sync/topic"
)

// credential is what makes a box an edge.
type credential struct {
	Edge  string
	Token string
	// Key identifies the credential: SHA-256 of the token's bytes.
	Key     []byte
	HubKeys []ed25519.PublicKey
}

const enrollAgain = "get a new file on the hub with `cloudhub edges enroll NAME -o FILE`"

// readCredential reads and checks a credential file.
func readCredential(file string) (credential, error) {
	var c credential
	info, err := os.Stat(file)
	if err != nil {
		return c, wrapCredential(err)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return c, fmt.Errorf("credential %s can be read by everybody on this machine (mode %#o): run chmod 600 %s", file, info.Mode().Perm(), file)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return c, wrapCredential(err)
	}
	var raw struct {
		Edge    string   `yaml:"edge"`
		Token   string   `yaml:"token"`
		HubKeys []string `yaml:"hubKeys"`
	}
	if err := decodeYAML(b, &raw); err != nil {
		return c, fmt.Errorf("credential %s: %w: %s", file, err, enrollAgain)
	}
	if err := topic.ValidEdge(raw.Edge); err != nil {
		return c, fmt.Errorf("credential %s: edge: %w: %s", file, err, enrollAgain)
	}
	secret, err := base64.RawURLEncoding.DecodeString(raw.Token)
	if err != nil || len(secret) != 32 {
		return c, fmt.Errorf("credential %s: token has %d bytes instead of 32, so it is cut or altered: %s", file, len(secret), enrollAgain)
	}
	key := sha256.Sum256(secret)
	c = credential{Edge: raw.Edge, Token: raw.Token, Key: key[:]}
	for _, k := range raw.HubKeys {
		pub, err := base64.StdEncoding.DecodeString(k)
		if err != nil || len(pub) != ed25519.PublicKeySize {
			return c, fmt.Errorf("credential %s: hubKeys: one has %d bytes instead of %d, so it is cut or altered: %s", file, len(pub), ed25519.PublicKeySize, enrollAgain)
		}
		c.HubKeys = append(c.HubKeys, pub)
	}
	if len(c.HubKeys) == 0 {
		return c, fmt.Errorf("credential %s: hubKeys is empty, so no hub could be believed: %s", file, enrollAgain)
	}
	return c, nil
}

func wrapCredential(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read credential: %w: %s and bring it here", err, enrollAgain)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("read credential: %w: run the agent as the file's owner, or chown the file to the agent's user", err)
	}
	return fmt.Errorf("read credential: %w", err)
}
