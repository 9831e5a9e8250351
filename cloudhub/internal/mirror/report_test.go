package mirror

import (
	"testing"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	reports "github.com/longshore-edge/longshore/sync/account"
)

// sessions drives the account of one edge from one session to the next.
type sessions struct {
	t       *testing.T
	account account
	number  uint64
}

func (s *sessions) open(named []byte) {
	s.number++
	s.account = follow(s.account.kept(), &longshorepb.Hello{Session: s.number, Account: named})
}

func (s *sessions) report(r *longshorepb.Reported) {
	s.t.Helper()
	r.Session, r.Sequence = s.number, s.account.sequence+1
	if absurd, err := s.account.merge(r); absurd > 0 || err != nil {
		s.t.Fatalf("%d parts left out, error %v", absurd, err)
	}
}

func (s *sessions) digest() []byte {
	return reports.Digest(s.account.pods, s.account.models, s.account.node)
}

func podReport(uid, status string) *longshorepb.PodReport {
	return &longshorepb.PodReport{Namespace: "default", Name: uid, Uid: uid, Status: []byte(status)}
}

// Without it, a link that breaks in the middle of a report would leave a hub with an account that is part old and part new,
// and it would take it for the edge's.
func TestAccountThatStandsIsTheLastCompleteOne(t *testing.T) {
	s := &sessions{t: t}
	s.open(nil)
	s.report(&longshorepb.Reported{Reset_: true, Pods: []*longshorepb.PodReport{podReport("a", "1")}})
	part := s.digest()
	s.open(part)
	if s.account.named || s.account.complete {
		t.Fatal("a part of a first account stands for all of it")
	}
	s.report(&longshorepb.Reported{Reset_: true, Pods: []*longshorepb.PodReport{podReport("a", "1")}})
	s.report(&longshorepb.Reported{Complete: true, Pods: []*longshorepb.PodReport{podReport("b", "1")}})
	first := s.digest()

	s.open(nil)
	s.report(&longshorepb.Reported{Reset_: true, Pods: []*longshorepb.PodReport{podReport("c", "1")}})
	s.open(first)
	if !s.account.complete || len(s.account.pods) != 2 {
		t.Fatalf("after a full account that broke off: complete %t, pods %v, want the two reported before", s.account.complete, s.account.pods)
	}

	// Changes of a session in which nothing was asked for count as any other.
	s.report(&longshorepb.Reported{Pods: []*longshorepb.PodReport{podReport("a", "2")}, GonePods: []string{"b"}})
	second := s.digest()
	s.open(first)
	if s.account.complete {
		t.Fatal("the hub takes an older account for the newest")
	}
	s.open(second)
	if !s.account.complete || len(s.account.pods) != 1 || string(s.account.pods["a"].Status) != "2" {
		t.Fatalf("complete %t, pods %v", s.account.complete, s.account.pods)
	}
}

// What changes all the time must not make the account another one: each reconnect would tell everything again.
func TestFiguresAreNoPartOfTheAccount(t *testing.T) {
	s := &sessions{t: t}
	s.open(nil)
	s.report(&longshorepb.Reported{Reset_: true, Complete: true, Node: &longshorepb.NodeReport{Hostname: "box", DiskFreeBytes: 1, BacklogRecords: 2}})
	named := reports.Digest[string](nil, nil, &longshorepb.NodeReport{Hostname: "box", DiskFreeBytes: 8, BacklogBytes: 9})
	s.open(named)
	if !s.account.complete || s.account.node.GetBacklogRecords() != 2 {
		t.Fatalf("complete %t, node %v", s.account.complete, s.account.node)
	}
	s.open(reports.Digest[string](nil, nil, &longshorepb.NodeReport{Hostname: "box", MemoryBytes: 1}))
	if s.account.complete {
		t.Fatal("a box with other memory is taken for the same")
	}
}

// G4: a box that reports as much as it may costs the hub nothing once it is gone.
func TestG4LargeAccountIsNotKept(t *testing.T) {
	s := &sessions{t: t}
	s.open(nil)
	big := &longshorepb.Reported{Reset_: true, Complete: true}
	for _, uid := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q"} {
		big.Pods = append(big.Pods, podReport(uid, string(make([]byte, maxStatusBytes))))
	}
	s.report(big)
	if k := s.account.kept(); len(k.pods) != 0 || k.full {
		t.Fatalf("%d pods are kept", len(k.pods))
	}
}
