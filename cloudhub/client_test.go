package main

import (
	"bytes"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// runCommandLine runs a command in this process and returns what it printed.
func runCommandLine(t *testing.T, args ...string) (out string, err error) {
	t.Helper()
	var b bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&b)
	root.SetErr(&b)
	err = root.ExecuteContext(t.Context())
	return b.String(), err
}

// Without it, a hub whose certificate is of a private authority could not be asked from anywhere.
func TestClientTrustsANamedAuthority(t *testing.T) {
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, []edgeJSON{{Name: "box-1"}}) }))
	defer api.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := runCommandLine(t, "edges", "--api", api.URL, "--ca", ca); err != nil || !strings.Contains(out, "box-1") {
		t.Errorf("with --ca: %v\n%s", err, out)
	}
	if _, err := runCommandLine(t, "edges", "--api", api.URL); err == nil || !strings.Contains(err.Error(), "--ca FILE") {
		t.Errorf("without --ca: %v", err)
	}
	if _, err := runCommandLine(t, "edges", "--api", api.URL, "--ca", os.DevNull); err == nil || !strings.Contains(err.Error(), "no PEM certificate") {
		t.Errorf("with an empty file: %v", err)
	}
	t.Setenv("LONGSHORE_CA", ca)
	if out, err := runCommandLine(t, "edges", "--api", api.URL); err != nil || !strings.Contains(out, "box-1") {
		t.Errorf("with LONGSHORE_CA: %v\n%s", err, out)
	}
}
