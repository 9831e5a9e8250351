package mirror

import (
	"crypto/sha256"
	"maps"
	"slices"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/plain"
	"github.com/longshore-edge/longshore/sync/topic"
)

// plainRound bounds the payloads of plain messages sent in one round, in bytes.
const plainRound = 32 << 10

// plainState is what a connection's sender knows of the plain topics it serves. Only fingerprints are kept between rounds.
type plainState struct {
	// filters are not answered yet.
	filters []string
	// list is what documents and sent are about.
	list *desired.List
	// documents by topic; nil when nothing waits to be sent.
	documents map[string][]byte
	// sent holds the fingerprint of what the client has, by topic.
	sent map[string][sha256.Size]byte
	// waiting holds the topics still to be sent; true marks an answer to a subscribe, which carries the retain flag.
	waiting map[string]bool
}

// sendPlain answers new filters as a broker answers with retained messages, and tells changes of the topics that are
// subscribed. Of several changes of one topic only the last is sent. A topic that is gone is told with an empty payload.
//
// What is sent is this hub's view, also while it cannot be proved: a plain device states no position that it could fall
// behind of.
func (s *sender) sendPlain(filters []string) (busy bool, err error) {
	p := &s.plain
	p.filters = append(p.filters, filters...)
	subscribed := s.c.plainFilters()
	if len(subscribed) == 0 {
		s.plain = plainState{}
		return false, nil
	}
	if s.snap.List == nil {
		return false, nil // the filters wait for the first list
	}
	if len(p.filters) > 0 || p.list != s.snap.List {
		if err := s.plan(subscribed); err != nil {
			return false, err
		}
	}
	left := plainRound
	for _, name := range slices.Sorted(maps.Keys(p.waiting)) {
		payload := p.documents[name]
		if left -= len(payload); left < 0 && left+len(payload) < plainRound {
			return true, nil
		}
		retain := p.waiting[name]
		delete(p.waiting, name)
		if err := s.send(name, payload, retain); err != nil {
			return false, err
		}
		if payload == nil {
			delete(p.sent, name)
		} else {
			p.sent[name] = sha256.Sum256(payload)
		}
	}
	p.documents = nil
	return false, nil
}

// plan computes what is to be sent.
func (s *sender) plan(subscribed []string) error {
	p := &s.plain
	documents, err := s.view.plainDocuments(s.snap.List)
	if err != nil {
		return err
	}
	p.documents, p.list = documents, s.snap.List
	if p.sent == nil {
		p.sent, p.waiting = map[string][sha256.Size]byte{}, map[string]bool{}
	}
	for name, payload := range documents {
		old, known := p.sent[name]
		switch {
		case matchAny(p.filters, name):
			p.waiting[name] = true
		case matchAny(subscribed, name) && (!known || old != sha256.Sum256(payload)):
			if _, there := p.waiting[name]; !there {
				p.waiting[name] = false
			}
		}
	}
	for name := range p.waiting {
		if _, known := p.sent[name]; documents[name] == nil && !known {
			delete(p.waiting, name) // came and went before it was sent
		}
	}
	for name := range p.sent {
		if documents[name] != nil {
			continue
		}
		if matchAny(subscribed, name) {
			p.waiting[name] = false
		} else {
			delete(p.sent, name)
		}
	}
	p.filters = nil
	return nil
}

func matchAny(filters []string, name string) bool {
	return slices.ContainsFunc(filters, func(f string) bool { return topic.Match(f, name) })
}

// plainDocuments returns the plain messages of a list by topic. An object that changed meanwhile is left out: the change
// brings a new list. Of two pods with one name, the one that is not being deleted counts.
func (v *View) plainDocuments(l *desired.List) (map[string][]byte, error) {
	documents := map[string][]byte{
		topic.Topic{Kind: topic.PlainIndex, Edge: v.edge}.String(): plain.NewIndex(v.edge, l).JSON(),
	}
	for _, e := range l.Entries {
		if e.Absent || e.Kind != longshorepb.Kind_KIND_POD && e.Kind != longshorepb.Kind_KIND_MODEL {
			continue
		}
		object, ok := v.Object(desired.Digest(e.Digest))
		if !ok {
			continue
		}
		t := topic.Topic{Kind: topic.PlainPod, Edge: v.edge, Namespace: e.Namespace, Name: e.Name}
		if e.Kind == longshorepb.Kind_KIND_MODEL {
			t.Kind = topic.PlainModel
			m, err := object.Model()
			if err != nil {
				return nil, err
			}
			documents[t.String()] = plain.FromModel(m, object.Digest).JSON()
			continue
		}
		p, err := object.Pod()
		if err != nil {
			return nil, err
		}
		if documents[t.String()] == nil || p.DeletionTimestamp == nil {
			documents[t.String()] = plain.FromPod(p, object.Digest).JSON()
		}
	}
	return documents, nil
}
