package topic

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

var digest32 = bytes.Repeat([]byte{0xab}, 32)

const hexDigest = "abababababababababababababababababababababababababababababababab"

// Both hubs must mean the same by a name, or an edge waits for ever for what was sent elsewhere.
func TestNamesAndTopicsAreTheSame(t *testing.T) {
	for name, topic := range map[string]Topic{
		"nodes/dock-1/hello":                           {Kind: Hello, Edge: "dock-1"},
		"nodes/dock-1/index":                           {Kind: Index, Edge: "dock-1"},
		"nodes/dock-1/push":                            {Kind: Push, Edge: "dock-1"},
		"nodes/dock-1/reported":                        {Kind: Reported, Edge: "dock-1"},
		"nodes/dock-1/telemetry":                       {Kind: Telemetry, Edge: "dock-1"},
		"nodes/dock-1/ack":                             {Kind: Ack, Edge: "dock-1"},
		"nodes/a.b/objects/" + hexDigest:               {Kind: Objects, Edge: "a.b", Digest: digest32},
		"nodes/a/objects/" + hexDigest + "/32768":      {Kind: Objects, Edge: "a", Digest: digest32, Offset: 32768},
		"models/" + hexDigest:                          {Kind: Models, Digest: digest32},
		"models/" + hexDigest + "/1":                   {Kind: Models, Digest: digest32, Offset: 1},
		"nodes/a/plain/index":                          {Kind: PlainIndex, Edge: "a"},
		"nodes/a/plain/pods/default.web.v1":            {Kind: PlainPod, Edge: "a", Namespace: "default", Name: "web.v1"},
		"nodes/a/plain/models/plant.bearing":           {Kind: PlainModel, Edge: "a", Namespace: "plant", Name: "bearing"},
		"nodes/" + strings.Repeat("a", 253) + "/hello": {Kind: Hello, Edge: strings.Repeat("a", 253)},
	} {
		got, err := Parse(Root + name)
		if err != nil || !reflect.DeepEqual(got, topic) {
			t.Errorf("Parse(%q) = %+v, %v; want %+v", name, got, err, topic)
		}
		if s := topic.String(); s != Root+name {
			t.Errorf("String of %+v = %q, want %q", topic, s, Root+name)
		}
	}
}

// A hostile name must be refused, not taken for another edge's.
func TestHostileNamesAreRefused(t *testing.T) {
	for _, name := range []string{
		"", "nodes", "nodes/", "nodes/a", "nodes//hello", "nodes/a/hello/", "nodes/a/hello/x", "nodes/A/hello", "nodes/../hello", "nodes/a..b/hello",
		"nodes/-a/hello", "nodes/a-/hello", "nodes/a.-b/hello", "nodes/+/hello", "nodes/#", "nodes/a\x00/hello", "nodes/a b/hello", "nodes/é/hello",
		"nodes/" + strings.Repeat("a", 254) + "/hello", "nodes/a/objects", "nodes/a/objects/", "nodes/a/objects/ab", "nodes/a/objects/" + strings.ToUpper(hexDigest),
		"nodes/a/objects/" + hexDigest + "/0", "nodes/a/objects/" + hexDigest + "/01", "nodes/a/objects/" + hexDigest + "/-1", "nodes/a/objects/" + hexDigest + "/+1",
		"nodes/a/objects/" + hexDigest + "/1/2", "nodes/a/objects/" + hexDigest + "/9223372036854775808", "models", "models/x", "nodes/a/plain", "nodes/a/plain/x",
		"nodes/a/plain/pods", "nodes/a/plain/pods/x", "nodes/a/plain/pods/.x", "nodes/a/plain/pods/x.", "nodes/a/plain/index/x", "nodes/a/unknown", "other/a/hello",
	} {
		if got, err := Parse(Root + name); err == nil {
			t.Errorf("Parse(%q) = %+v, want an error", name, got)
		}
	}
	for _, name := range []string{"", "a/b", "longshore/v2/nodes/a/hello", "/longshore/v1/nodes/a/hello"} {
		if _, err := Parse(name); !errors.Is(err, ErrForeign) {
			t.Errorf("Parse(%q): %v, want ErrForeign", name, err)
		}
	}
}

// A filter that matches too much gives a device what is not its own; one that matches too little loses readings.
func TestMatch(t *testing.T) {
	for _, c := range []struct {
		filter, name string
		want         bool
	}{
		{"a/b", "a/b", true}, {"a/b", "a/b/c", false}, {"a/b/c", "a/b", false}, {"a/+", "a/b", true}, {"a/+", "a", false}, {"a/+", "a/", true},
		{"+", "a", true}, {"+", "/a", false}, {"+/+", "/a", true}, {"/+", "/a", true}, {"a/#", "a", true}, {"a/#", "a/b/c", true}, {"a/#", "ab", false},
		{"#", "a/b", true}, {"#", "$SYS/x", false}, {"+/x", "$SYS/x", false}, {"$SYS/#", "$SYS/x", true}, {"a/+/c", "a/b/c", true}, {"a/+/c", "a/b/d", false},
		{"a/+/#", "a", false}, {"a/+/#", "a/b", true}, {"a/b/#", "a", false},
	} {
		if got := Match(c.filter, c.name); got != c.want {
			t.Errorf("Match(%q, %q) = %t", c.filter, c.name, got)
		}
	}
	for filter, ok := range map[string]bool{"a/+/#": true, "#": true, "": false, "a#": false, "a/#/b": false, "a/b+": false, "+a": false, "a\x00": false, "\xff": false} {
		if err := ValidFilter(filter); (err == nil) != ok {
			t.Errorf("ValidFilter(%q) = %v", filter, err)
		}
	}
	if ValidName("a/+") == nil || ValidName("a/b") != nil {
		t.Error("ValidName takes wildcards, or refuses a plain name")
	}
}

// Whatever a client calls its topic, it is parsed to what gives the same name again, or refused.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"nodes/a/hello", "models/" + hexDigest, "nodes/a/objects/" + hexDigest + "/5", "nodes/a/plain/pods/b.c"} {
		f.Add(Root + s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if topic, err := Parse(name); err == nil && topic.String() != name {
			t.Errorf("Parse(%q).String() = %q", name, topic.String())
		}
	})
}

// Match must agree with the plain reading of the specification, level by level.
func FuzzMatch(f *testing.F) {
	f.Add("a/+/#", "a/b/c")
	f.Add("$x/#", "$x")
	f.Fuzz(func(t *testing.T, filter, name string) {
		if ValidFilter(filter) != nil || ValidName(name) != nil {
			return
		}
		if got, want := Match(filter, name), byLevels(strings.Split(filter, "/"), strings.Split(name, "/"), true); got != want {
			t.Errorf("Match(%q, %q) = %t, want %t", filter, name, got, want)
		}
	})
}

func byLevels(filter, name []string, first bool) bool {
	switch {
	case len(filter) == 0:
		return len(name) == 0
	case first && strings.HasPrefix(name[0], "$") && (filter[0] == "+" || filter[0] == "#"):
		return false
	case filter[0] == "#":
		return true
	case len(name) == 0:
		return false
	case filter[0] != "+" && filter[0] != name[0]:
		return false
	}
	return byLevels(filter[1:], name[1:], false)
}
