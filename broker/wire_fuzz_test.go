package broker

import (
	"bytes"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/sync/topic"
)

// FuzzConnectHeader: before anybody has proved who they are, a few bytes must not make the broker allocate or read more than
// its limit, and what is read ahead must be exactly what was sent.
func FuzzConnectHeader(f *testing.F) {
	f.Add([]byte{0x10, 12, 0, 4}, 16<<10)
	f.Add([]byte{0x10, 0xff, 0xff, 0xff, 0x7f}, 16<<10)
	f.Add([]byte{0x10, 0x80, 0x80, 0x80, 0x80, 0x01}, 16<<10)
	f.Add([]byte{0x30, 1}, 100)
	f.Fuzz(func(t *testing.T, sent []byte, limit int) {
		limit = min(max(limit, 0), 1<<28)
		r := bytes.NewReader(sent)
		head, err := readConnectHeader(r, limit)
		if read := len(sent) - r.Len(); read > 5 {
			t.Fatalf("%d bytes were read for a header", read)
		}
		if err != nil {
			return
		}
		if !bytes.Equal(head, sent[:len(sent)-r.Len()]) || head[0]>>4 != 1 {
			t.Fatalf("% x is read as % x", sent, head)
		}
		length := 0
		for i, b := range head[1:] {
			length += int(b&0x7f) << (7 * i)
		}
		if length > limit || head[len(head)-1]&0x80 != 0 {
			t.Fatalf("header % x of %d bytes is above the limit %d, or has no end", head, length, limit)
		}
	})
}

// FuzzMatches: retained messages must go to whom the specification says: what is replayed is judged as what is sent live.
func FuzzMatches(f *testing.F) {
	f.Add("a/+/#", "a/b/c")
	f.Add("a/#", "a")
	f.Add("+/#", "$SYS/x")
	f.Fuzz(func(t *testing.T, filter, name string) {
		if topic.ValidFilter(filter) != nil || topic.ValidName(name) != nil {
			return
		}
		if got, want := matches(strings.Split(filter, "/"), name), topic.Match(filter, name); got != want {
			t.Errorf("%q matches %q: %t, live %t", filter, name, got, want)
		}
	})
}
