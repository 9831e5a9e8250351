package mirror

import (
	"strings"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/sync/topic"
)

// access is what an edge may do on a cloud hub's broker.
type access struct{ edge string }

// Access returns the rights of an edge: to publish its own hello, reports and telemetry, and to read what a hub says to it.
// Wildcards are granted only below its own plain/. Which objects and models it may read is judged by its list.
func Access(edge string) broker.Access { return access{edge} }

func (a access) Publish(name string) bool {
	t, err := topic.Parse(name)
	if err != nil || t.Edge != a.edge {
		return false
	}
	return t.Kind == topic.Hello || t.Kind == topic.Reported || t.Kind == topic.Telemetry
}

func (a access) Subscribe(filter string) bool {
	if topic.ValidFilter(filter) != nil {
		return false
	}
	if strings.ContainsAny(filter, "+#") {
		return isPlain(a.edge, filter)
	}
	t, err := topic.Parse(filter)
	if err != nil {
		return false
	}
	switch t.Kind {
	case topic.Models:
		return true
	case topic.Index, topic.Objects, topic.Push, topic.Ack, topic.PlainIndex, topic.PlainModel, topic.PlainPod:
		return t.Edge == a.edge
	}
	return false
}

// isPlain reports whether a valid filter is about an edge's plain topics alone.
func isPlain(edge, filter string) bool {
	return strings.HasPrefix(filter, topic.Root+"nodes/"+edge+"/plain/")
}
