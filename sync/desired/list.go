package desired

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

// List is what one edge should hold: sorted entries and their digest. It is not changed after it was made.
type List struct {
	Entries []*longshorepb.Entry
	Digest  Digest
	body    []byte // nil: encoded when asked for
}

// Body is the canonical encoding that Digest is about. A hub has a list for every edge and needs its encoding once, so it is not
// kept.
func (l *List) Body() []byte {
	if l.body != nil {
		return l.body
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(&longshorepb.List{Entries: l.Entries})
	if err != nil {
		// Only a string that is not UTF-8 fails; the API server and the folder source let none through.
		panic(fmt.Sprintf("encode list: %v", err))
	}
	return body
}

// NewList sorts a copy of the entries by kind, namespace, name and uid, keeps the first of those equal in all four, and
// computes the digest.
func NewList(entries []*longshorepb.Entry) *List {
	e := slices.Clone(entries)
	slices.SortStableFunc(e, compareEntries)
	e = slices.CompactFunc(e, func(a, b *longshorepb.Entry) bool { return compareEntries(a, b) == 0 })
	l := &List{Entries: e}
	l.Digest = digestOf(longshorepb.Kind_KIND_LIST, l.Body(), [32]byte{})
	return l
}

// AbsentEntry names an object that a pod names and the hub does not have. reason is for people.
func AbsentEntry(kind longshorepb.Kind, namespace, name, reason string) *longshorepb.Entry {
	return &longshorepb.Entry{Kind: kind, Namespace: namespace, Name: name, Absent: true, Reason: reason}
}

// Names reports whether an entry of l has the digest d.
func (l *List) Names(d Digest) bool {
	_, ok := l.entry(d)
	return ok
}

func (l *List) entry(d Digest) (*longshorepb.Entry, bool) {
	for _, e := range l.Entries {
		if string(e.GetDigest()) == string(d[:]) {
			return e, true
		}
	}
	return nil, false
}

func compareEntries(a, b *longshorepb.Entry) int {
	return cmp.Or(
		cmp.Compare(a.GetKind(), b.GetKind()),
		strings.Compare(a.GetNamespace(), b.GetNamespace()),
		strings.Compare(a.GetName(), b.GetName()),
		strings.Compare(a.GetUid(), b.GetUid()),
	)
}

// parseList decodes a list and refuses what no honest hub makes: names become paths and topics on the edge.
func parseList(body []byte, maxObject uint64) (*List, error) {
	var m longshorepb.List
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("decode list: %w", err)
	}
	seen := make(map[string]struct{}, len(m.GetEntries()))
	for i, e := range m.GetEntries() {
		if i > 0 && compareEntries(m.Entries[i-1], e) >= 0 {
			return nil, fmt.Errorf("list entry %d (%q/%q) is not in order", i, e.GetNamespace(), e.GetName())
		}
		if err := checkEntry(e, maxObject); err != nil {
			return nil, fmt.Errorf("list entry %d (%q/%q): %w", i, e.GetNamespace(), e.GetName(), err)
		}
		if e.GetAbsent() {
			continue
		}
		if _, twice := seen[string(e.GetDigest())]; twice {
			return nil, fmt.Errorf("list entry %d (%q/%q) repeats a digest", i, e.GetNamespace(), e.GetName())
		}
		seen[string(e.GetDigest())] = struct{}{}
	}
	return &List{Entries: m.GetEntries(), Digest: digestOf(longshorepb.Kind_KIND_LIST, body, [32]byte{}), body: body}, nil
}

func checkEntry(e *longshorepb.Entry, maxObject uint64) error {
	switch e.GetKind() {
	case longshorepb.Kind_KIND_POD, longshorepb.Kind_KIND_MODEL, longshorepb.Kind_KIND_CONFIG_MAP, longshorepb.Kind_KIND_SECRET:
	default:
		return fmt.Errorf("a list holds no %s", kindName(e.GetKind()))
	}
	// The names of all four kinds are DNS subdomains in Kubernetes (RFC 1123), as edge names are.
	if topic.ValidEdge(e.GetName()) != nil {
		return errors.New("the name is not a DNS subdomain")
	}
	if topic.ValidEdge(e.GetNamespace()) != nil || strings.Contains(e.GetNamespace(), ".") || len(e.GetNamespace()) > 63 {
		return errors.New("the namespace is not a DNS label")
	}
	if err := checkUID(e.GetUid()); err != nil {
		return err
	}
	if e.GetUid() == "" && e.GetKind() == longshorepb.Kind_KIND_POD {
		return errors.New("a pod without uid")
	}
	if e.GetAbsent() {
		if len(e.GetDigest()) != 0 || e.GetSize() != 0 {
			return errors.New("absent, but with a digest or size")
		}
		return nil
	}
	if _, err := toDigest(e.GetDigest()); err != nil {
		return err
	}
	if e.GetSize() > maxObject {
		return fmt.Errorf("%w: %d bytes, at most %d fit here", ErrTooLarge, e.GetSize(), maxObject)
	}
	return nil
}

func checkUID(uid string) error {
	if len(uid) > 128 {
		return errors.New("uid longer than 128 bytes")
	}
	for i := range len(uid) {
		c := uid[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("uid %q has characters other than letters, digits and '-'", uid)
		}
	}
	return nil
}
