package main

import (
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
)

// Without it, a slip of the pen in the token file would stop enrolling and revoking without anybody knowing, or shut out the
// fleet.
func TestBrokenTokenFileIsToldAndChangesNothing(t *testing.T) {
	h, j := serving(t, twoEdges)
	link := device(t, h, "box-1", newToken(t, h, "box-1", false), true)
	good, err := os.ReadFile(h.cfg.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	broken := func() bool {
		res, err := http.Get("http://" + h.door.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(text), "\nlongshore_token_file_broken 1\n")
	}
	if broken() {
		t.Error("the good file is called broken")
	}
	since := link().Since
	if err := os.WriteFile(h.cfg.TokenFile, []byte("# fleet\nbox-2 rubbish\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "the metric tells", broken)
	const message = "the token file is broken"
	until(t, "the log tells", func() bool { return j.count(message) > 0 })
	if j.count(h.cfg.TokenFile+": line 2: ") == 0 {
		t.Error("the log does not name file and line")
	}
	h.mirror.Revoke()
	for range 20 {
		if _, err := h.tokens.Bearer(&http.Request{Header: http.Header{"Authorization": {"Bearer box-1:" + strings.Repeat("A", 43)}}}); err == nil {
			t.Error("a wrong token was taken")
		}
	}
	if n := j.count(message); n != 1 {
		t.Errorf("told %d times, want once", n)
	}
	if s := link(); !s.Connected || !s.Since.Equal(since) {
		t.Errorf("the edge that was enrolled: %+v, was connected since %v", s, since)
	}
	if err := os.WriteFile(h.cfg.TokenFile, good, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "the metric tells that it is mended", func() bool { return !broken() })
}
