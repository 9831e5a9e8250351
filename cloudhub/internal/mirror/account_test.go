package mirror_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
)

// fullReport is what a box reports of itself, and named the digest of that.
func fullReport(message string) (full *longshorepb.Reported, named []byte) {
	full = &longshorepb.Reported{
		Pods: []*longshorepb.PodReport{
			{Namespace: "default", Name: "web", Uid: "uid-web", Status: []byte(message)},
			{Namespace: "default", Name: "zweb", Uid: "uid-zweb", Status: []byte("same")},
		},
		Models: []*longshorepb.ModelReport{{Namespace: "default", Name: "bearing", State: longshorepb.ModelState_MODEL_STATE_SERVING}},
		Node:   &longshorepb.NodeReport{Hostname: "box", DiskFreeBytes: 7},
	}
	return full, digestOf(full)
}

func digestOf(full *longshorepb.Reported) []byte {
	pods, models := map[string]*longshorepb.PodReport{}, map[string]*longshorepb.ModelReport{}
	for _, p := range full.GetPods() {
		pods[p.GetUid()] = p
	}
	for _, m := range full.GetModels() {
		models[m.GetNamespace()+"/"+m.GetName()] = m
	}
	return account.Digest(pods, models, full.GetNode())
}

// Without it, every reconnect of an edge with pods would cost kilobytes, or, worse, a hub would show an account that the edge
// never gave.
func TestAccountIsAskedForOnlyIfItIsAnother(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub-a", newCache("e1"), &source{}, nil)
	other := f.hub(t, "hub-b", newCache("e1"), &source{}, nil)
	for _, c := range []*hub{h, other} {
		c.cache.SetPod(pod("e1", "web", "web:1"))
		c.cache.SetPod(pod("e1", "zweb", "web:1"))
		c.cache.SetModel(model("bearing", "1", nil))
	}
	b := f.box(t, "e1")
	full, named := fullReport("up")
	told, asked := 0, 0
	// session connects, waits until the hub shows as many pods with web's status, and ends again.
	session := func(at *hub, what string, held bool, pods int, status string) {
		t.Helper()
		if held {
			told++
		} else {
			asked++
		}
		before := b.links.Load()
		cut := b.connect(at.address)
		eventually(t, what+": the hub shows what the edge reported", func() bool {
			s := at.source.state("e1")
			return b.links.Load() > before && s.Online && s.Complete && s.Synced && len(s.Pods) == pods && string(s.Pods["uid-web"].GetStatus()) == status &&
				len(s.Models) == 1 && s.Node.GetHostname() == "box"
		})
		cut()
		if gotTold, gotAsked := b.introduced(); gotTold != told || gotAsked != asked {
			t.Fatalf("%s: the hub held the account in %d sessions and asked for it in %d, want %d and %d", what, gotTold, gotAsked, told, asked)
		}
		eventually(t, what+": the end is reported", func() bool { return !at.source.state("e1").Online })
	}
	b.become(full, nil)
	session(h, "an agent that started", false, 2, "up")
	b.become(full, named)
	session(h, "nothing changed", true, 2, "up")
	session(other, "another hub", false, 2, "up")
	session(h, "back at the first, with the same account", true, 2, "up")
	b.become(full, nil)
	session(h, "the agent started again", false, 2, "up")

	changed, changedName := fullReport("down")
	b.become(changed, changedName)
	session(other, "an account that this hub never got", false, 2, "down")
	session(h, "and the hub that holds an older one", false, 2, "down")

	h.cache.DeletePod("default", "zweb", "uid-zweb")
	session(h, "a pod that is not the edge's any more", true, 1, "down")
	full = proto.CloneOf(changed)
	full.Pods = full.Pods[:1]
	b.become(full, digestOf(full))
	session(h, "a pod that only the edge dropped", false, 1, "down")

	restarted := f.hub(t, "hub-a", h.cache, &source{}, nil)
	session(restarted, "a hub that restarted", false, 1, "down")
}
