package broker

import (
	"testing"
	"time"
)

// A command that waits for a device over a long weekend must still be there on Tuesday: nothing expires by itself.
func TestNothingExpiresByItself(t *testing.T) {
	s := newSession("k")
	s.window = 1
	m := &message{topic: "t", payload: []byte("p"), qos: 1}
	if taken, _ := s.offer(delivery{m: m, qos: 1}, 10, 1<<20); !taken {
		t.Fatal("not queued")
	}
	if _, ok, expired := s.take(time.Now().Add(100 * 24 * time.Hour)); !ok || expired != 0 {
		t.Errorf("taken %v, expired %d", ok, expired)
	}
}

// A device subscribed to its filter must get the retained messages of exactly that filter.
func TestMatches(t *testing.T) {
	for _, c := range []struct {
		filter []string
		name   string
		want   bool
	}{
		{[]string{"#"}, "a/b", true},
		{[]string{"a", "#"}, "a", true},
		{[]string{"a", "#"}, "a/b/c", true},
		{[]string{"a", "#"}, "ab", false},
		{[]string{"a", "+"}, "a", false},
		{[]string{"a", "+"}, "a/", true},
		{[]string{"a", "+"}, "a/b/c", false},
		{[]string{"+", "b"}, "a/b", true},
		{[]string{"+", "+"}, "/x", true},
		{[]string{"a", "b"}, "a/b/c", false},
		{[]string{"#"}, "$SYS/x", false},
		{[]string{"+", "x"}, "$SYS/x", false},
		{[]string{"a", "+", "#"}, "a/b", true},
		{[]string{"a", "+", "#"}, "a", false},
	} {
		if got := matches(c.filter, c.name); got != c.want {
			t.Errorf("matches(%q, %q) = %v", c.filter, c.name, got)
		}
	}
}
