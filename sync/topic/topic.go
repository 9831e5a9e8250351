package topic

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Root is the prefix of every topic of Longshore's own.
const Root = "longshore/v1/"

// Kind names what a topic carries.
type Kind uint8

// The kinds of topics; sync/README.md says what each carries.
const (
	Unknown Kind = iota
	Hello
	Index
	Objects
	Models
	Push
	Reported
	Telemetry
	Ack
	PlainIndex
	PlainModel
	PlainPod
)

// perEdge maps the last level of nodes/<edge>/<level> to its kind.
var perEdge = map[string]Kind{
	"hello": Hello, "index": Index, "push": Push, "reported": Reported, "telemetry": Telemetry, "ack": Ack,
}

// Topic is a parsed topic name of Longshore's own.
type Topic struct {
	Kind Kind
	// Edge is empty for Models.
	Edge string
	// Digest is set for Objects and Models: 32 bytes.
	Digest []byte
	// Offset is the byte of the encoded object from which Objects and Models are asked for.
	Offset uint64
	// Namespace and Name are set for PlainModel and PlainPod.
	Namespace, Name string
}

// ErrForeign says that a name is not one of Longshore's own topics.
var ErrForeign = errors.New("not a topic of longshore/v1")

// String returns the topic name; Parse(t.String()) gives t back.
func (t Topic) String() string {
	switch t.Kind {
	case Models:
		return Root + "models/" + digest(t.Digest, t.Offset)
	case Objects:
		return Root + "nodes/" + t.Edge + "/objects/" + digest(t.Digest, t.Offset)
	case PlainIndex:
		return Root + "nodes/" + t.Edge + "/plain/index"
	case PlainModel:
		return Root + "nodes/" + t.Edge + "/plain/models/" + t.Namespace + "." + t.Name
	case PlainPod:
		return Root + "nodes/" + t.Edge + "/plain/pods/" + t.Namespace + "." + t.Name
	}
	for level, k := range perEdge {
		if k == t.Kind {
			return Root + "nodes/" + t.Edge + "/" + level
		}
	}
	return ""
}

func digest(d []byte, offset uint64) string {
	s := hex.EncodeToString(d)
	if offset > 0 {
		s += "/" + strconv.FormatUint(offset, 10)
	}
	return s
}

// Parse reads a topic name without wildcards. It fails with ErrForeign for names outside longshore/v1 and with a
// reason for names inside it that no peer of this wire sends.
func Parse(name string) (Topic, error) {
	rest, ok := strings.CutPrefix(name, Root)
	if !ok {
		return Topic{}, ErrForeign
	}
	if err := ValidName(name); err != nil {
		return Topic{}, err
	}
	l := strings.Split(rest, "/")
	if l[0] == "models" && len(l) >= 2 {
		return parseDigest(Topic{Kind: Models}, l[1:])
	}
	if l[0] != "nodes" || len(l) < 3 {
		return Topic{}, fmt.Errorf("unknown topic %q", name)
	}
	t := Topic{Edge: l[1]}
	if err := ValidEdge(t.Edge); err != nil {
		return Topic{}, err
	}
	if l[2] == "objects" && len(l) >= 4 {
		t.Kind = Objects
		return parseDigest(t, l[3:])
	}
	if l[2] == "plain" {
		return parsePlain(t, l[3:])
	}
	t.Kind = perEdge[l[2]]
	if t.Kind == Unknown || len(l) != 3 {
		return Topic{}, fmt.Errorf("unknown topic %q", name)
	}
	return t, nil
}

func parseDigest(t Topic, l []string) (Topic, error) {
	d, err := hex.DecodeString(l[0])
	if err != nil || len(d) != 32 || l[0] != strings.ToLower(l[0]) {
		return Topic{}, fmt.Errorf("digest %q is not 64 lower-case hexadecimal digits", l[0])
	}
	t.Digest = d
	if len(l) == 1 {
		return t, nil
	}
	t.Offset, err = strconv.ParseUint(l[1], 10, 63)
	if err != nil || len(l) > 2 || t.Offset == 0 || l[1][0] == '0' || l[1][0] == '+' {
		return Topic{}, fmt.Errorf("offset %q is not a positive number", strings.Join(l[1:], "/"))
	}
	return t, nil
}

func parsePlain(t Topic, l []string) (Topic, error) {
	if len(l) == 1 && l[0] == "index" {
		t.Kind = PlainIndex
		return t, nil
	}
	if len(l) == 2 {
		switch l[0] {
		case "models":
			t.Kind = PlainModel
		case "pods":
			t.Kind = PlainPod
		}
		var ok bool
		t.Namespace, t.Name, ok = strings.Cut(l[1], ".")
		if t.Kind != Unknown && ok && t.Namespace != "" && t.Name != "" {
			return t, nil
		}
	}
	return Topic{}, fmt.Errorf("unknown plain topic %q", strings.Join(l, "/"))
}

// ValidEdge checks an edge's name: a DNS subdomain as Kubernetes takes for nodes (RFC 1123), at most 253 characters.
func ValidEdge(s string) error {
	bad := len(s) == 0 || len(s) > 253
	prev := byte('.')
	for i := 0; i < len(s) && !bad; i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		bad = !alnum && (c != '-' && c != '.' || prev == '.' || c == '.' && prev == '-')
		prev = c
	}
	if bad || prev == '-' || prev == '.' {
		return fmt.Errorf("edge name %q is not a DNS subdomain (lower-case letters, digits, '-' and '.', at most 253)", s)
	}
	return nil
}

// ValidName checks a topic name as MQTT 3.1.1 section 4.7 has it, to which one publishes: no wildcards, valid UTF-8, no
// U+0000, 1 to 65,535 bytes.
func ValidName(s string) error {
	if strings.ContainsAny(s, "+#") {
		return fmt.Errorf("topic %q contains a wildcard", s)
	}
	return validText(s)
}

// ValidFilter checks a topic filter as MQTT 3.1.1 section 4.7 has it: '+' fills a level, '#' is the last level.
func ValidFilter(s string) error {
	if err := validText(s); err != nil {
		return err
	}
	levels := strings.Split(s, "/")
	for i, l := range levels {
		if strings.Contains(l, "#") && (l != "#" || i != len(levels)-1) {
			return fmt.Errorf("topic filter %q: '#' may only be the last level", s)
		}
		if strings.Contains(l, "+") && l != "+" {
			return fmt.Errorf("topic filter %q: '+' must fill a whole level", s)
		}
	}
	return nil
}

func validText(s string) error {
	if len(s) == 0 || len(s) > 65535 {
		return fmt.Errorf("topic of %d bytes: must be 1 to 65535", len(s))
	}
	if !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
		return fmt.Errorf("topic %q is not valid UTF-8 without U+0000", s)
	}
	return nil
}

// Match reports whether filter matches name, as MQTT 3.1.1 section 4.7 has it: "a/#" matches "a", and a filter that
// begins with a wildcard does not match a name that begins with '$'. Both must be valid.
func Match(filter, name string) bool {
	if name[0] == '$' && (filter[0] == '+' || filter[0] == '#') {
		return false
	}
	for {
		f, frest, fmore := strings.Cut(filter, "/")
		if f == "#" {
			return true
		}
		n, nrest, nmore := strings.Cut(name, "/")
		if f != "+" && f != n {
			return false
		}
		if !fmore || !nmore {
			return fmore == nmore || fmore && frest == "#"
		}
		filter, name = frest, nrest
	}
}
