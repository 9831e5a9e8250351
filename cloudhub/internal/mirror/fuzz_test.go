package mirror

import (
	"maps"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	reports "github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/topic"
)

// FuzzReport: an edge may say whatever it likes of itself. What the hub keeps of it is bounded and sound, reports out of order
// change nothing, and what stood before a full account stands until that is complete.
func FuzzReport(f *testing.F) {
	add := func(rs ...*longshorepb.Reported) {
		var payloads [3][]byte
		for i, r := range rs {
			b, err := reports.Encode(r)
			if err != nil {
				f.Fatal(err)
			}
			payloads[i] = b
		}
		f.Add(payloads[0], payloads[1], payloads[2])
	}
	pod, model := &longshorepb.PodReport{Uid: "u", Name: "p"}, &longshorepb.ModelReport{Namespace: "n", Name: "m"}
	add(
		&longshorepb.Reported{Session: 7, Sequence: 1, Reset_: true, Pods: []*longshorepb.PodReport{pod}},
		&longshorepb.Reported{Session: 7, Sequence: 2, Complete: true, Models: []*longshorepb.ModelReport{model}, List: make([]byte, 32)},
		&longshorepb.Reported{Session: 7, Sequence: 3, GonePods: []string{"u"}},
	)
	add(
		&longshorepb.Reported{Session: 7, Sequence: 9, Complete: true, Node: &longshorepb.NodeReport{Hostname: "h", CpuMillis: 1 << 60}},
		&longshorepb.Reported{Session: 7, Sequence: 9},
		&longshorepb.Reported{Session: 8, Sequence: 10, Reset_: true},
	)
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		before := account{
			pods:   map[types.UID]*longshorepb.PodReport{"old": {Uid: "old"}},
			models: map[string]*longshorepb.ModelReport{"n/old": {Namespace: "n", Name: "old"}},
		}
		k := &conn{greeting: &longshorepb.Hello{Session: 7}, account: follow(before, &longshorepb.Hello{Session: 7})}
		for _, payload := range [][]byte{a, b, c} {
			was := k.account
			was.pods, was.models = maps.Clone(was.pods), maps.Clone(was.models)
			_, err := k.report(payload)
			now := k.account
			if err != nil {
				if now.sequence != was.sequence || !maps.Equal(now.pods, was.pods) || !maps.Equal(now.models, was.models) || now.complete != was.complete {
					t.Fatalf("refused (%v), and %+v became %+v", err, was, now)
				}
				continue
			}
			if now.sequence <= was.sequence || len(now.list) != 0 && len(now.list) != 32 {
				t.Fatalf("%+v became %+v", was, now)
			}
			if !now.complete && now.arriving != nil && !maps.Equal(now.pods, was.pods) {
				t.Fatal("an account that is not complete is shown")
			}
		}
		s := k.state()
		if len(s.Pods) > maxReportedPods || len(s.Models) > maxReportedModels || s.Node != nil && !soundNode(s.Node) {
			t.Fatalf("%d pods, %d models, node %v", len(s.Pods), len(s.Models), s.Node)
		}
		for uid, p := range s.Pods {
			if string(uid) != p.GetUid() || !soundPod(p) {
				t.Fatalf("pod %q: %v", uid, p)
			}
		}
		for key, m := range s.Models {
			if key != m.GetNamespace()+"/"+m.GetName() || !soundModel(m) {
				t.Fatalf("model %q: %v", key, m)
			}
		}
		if len(before.pods) != 1 || len(before.models) != 1 {
			t.Fatal("a value that was handed out was changed")
		}
	})
}

// FuzzAccess: no filter that an edge may subscribe to matches a topic of another edge, no topic that it may publish to is
// another's, and what it subscribes to costs a bounded note.
func FuzzAccess(f *testing.F) {
	for _, s := range []string{
		"plain/#", "plain/+/x", "ack", "push", "objects/" + strings.Repeat("ab", 32) + "/5", "hello", "plain", "plain/../x", "+/plain/#", "#",
	} {
		f.Add(topic.Root+"nodes/e1/"+s, "e2")
		f.Add(topic.Root+"nodes/e2/"+s, "e1.e1")
	}
	f.Add(topic.Root+"models/"+strings.Repeat("ab", 32), "e2")
	f.Add("#", "e")
	f.Fuzz(func(t *testing.T, name, other string) {
		if topic.ValidEdge(other) != nil || other == "e1" {
			return
		}
		a := Access("e1")
		if a.Publish(name) && !strings.HasPrefix(name, topic.Root+"nodes/e1/") {
			t.Errorf("may publish to %q", name)
		}
		if !a.Subscribe(name) {
			return
		}
		digest := make([]byte, 32)
		for kind := topic.Hello; kind <= topic.PlainPod; kind++ {
			foreign := topic.Topic{Kind: kind, Edge: other, Digest: digest, Namespace: "n", Name: "x"}
			if kind != topic.Models && topic.Match(name, foreign.String()) {
				t.Errorf("may subscribe to %q, which matches %q", name, foreign)
			}
		}
		c := &conn{edge: "e1", greeting: &longshorepb.Hello{}}
		for range 3 {
			if err := c.subscribe(name); err != nil && len(name) <= maxFilterBytes {
				t.Errorf("granted %q, and then: %v", name, err)
			}
		}
		if in := c.take(); len(in.fetches) > 3 || len(in.filters) > 1 {
			t.Errorf("%q is noted as %+v", name, in)
		}
		c.unsubscribe([]string{name})
		if len(c.plainFilters()) > 0 {
			t.Errorf("unsubscribed from %q, and still %v", name, c.plainFilters())
		}
	})
}
