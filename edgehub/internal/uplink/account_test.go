package uplink

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
)

// books are what a hub makes of an edge's reports, in the simplest way: each as it comes, full accounts only when complete.
type books struct {
	pods, arriving map[string]*longshorepb.PodReport
	node           *longshorepb.NodeReport
}

// hold reports whether the books hold the account that a hello names; a new session begins.
func (b *books) hold(named []byte) bool {
	b.arriving = nil
	return len(named) > 0 && b.pods != nil && bytes.Equal(named, account.Digest(b.pods, nil, b.node))
}

func (b *books) take(r *longshorepb.Reported) {
	if r.GetReset_() {
		b.arriving = map[string]*longshorepb.PodReport{}
	}
	to := b.pods
	if b.arriving != nil {
		to = b.arriving
	}
	for _, p := range r.GetPods() {
		to[p.GetUid()] = p
	}
	for _, uid := range r.GetGonePods() {
		delete(to, uid)
	}
	if r.GetNode() != nil {
		b.node = r.GetNode()
	}
	if r.GetComplete() {
		b.pods, b.arriving = b.arriving, nil
	}
}

// status reads the books: how many pods, and what the status of one says.
func (h *hub) status(uid string) (pods int, status string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.books.pods), string(h.books.pods[uid].GetStatus())
}

func (a *Account) setPod(i int, status string) {
	for len(a.Pods) <= i {
		n := len(a.Pods)
		a.Pods = append(a.Pods, &longshorepb.PodReport{Namespace: "n", Name: fmt.Sprint(n), Uid: fmt.Sprint(n)})
	}
	p := proto.CloneOf(a.Pods[i])
	p.Status = []byte(status)
	a.Pods = append(append(a.Pods[:i:i], p), a.Pods[i+1:]...)
}

// Without this, every reconnect would cost kilobytes for the statuses of all pods; or a hub would go on showing what was true
// before the link broke.
func TestReconnectTellsOnlyWhatDiffers(t *testing.T) {
	checkLeaks(t)
	h := newHub(t)
	h.hold("1")
	dir := t.TempDir()
	e := newEdge(t, h, dir)
	e.report(func(a *Account) { a.setPod(9, "up") })
	shows := func(pods int, status string) {
		t.Helper()
		eventually(t, fmt.Sprintf("the hub shows %d pods, the first says %q", pods, status), func() bool {
			n, s := h.status("0")
			return h.inSync() && n == pods && s == status
		})
	}
	// session lets one begin after something happened without a link; it returns the session's reports once there is one.
	session := func(what string, meanwhile func()) []*longshorepb.Reported {
		t.Helper()
		h.stop()
		eventually(t, what+": the edge sees the cut", func() bool { return !e.Status().Link.Connected })
		h.mu.Lock()
		before := len(h.reports)
		h.mu.Unlock()
		meanwhile()
		h.start()
		eventually(t, what+": a report comes", func() bool { return h.inSync() && look(h, func() int { return len(h.reports) }) > before })
		return look(h, func() []*longshorepb.Reported { return h.reports[before:] })
	}
	full := func(what string, want bool, reports []*longshorepb.Reported) {
		t.Helper()
		if reports[0].GetReset_() != want {
			t.Fatalf("%s: a full account is %t, want %t: %v", what, reports[0].GetReset_(), want, reports[0])
		}
	}
	e.report(func(a *Account) { a.setPod(0, "up") })
	shows(10, "up")

	same := session("nothing changed", func() {})
	full("nothing changed", false, same)
	if r := same[0]; len(r.GetPods()) != 0 || r.GetNode() != nil || len(r.GetList()) == 0 {
		t.Errorf("nothing changed: the first report is %v, want the list alone", r)
	}
	full("a change without a link", false, session("a change without a link", func() {
		e.report(func(a *Account) { a.setPod(0, "down"); a.Pods = a.Pods[:9] })
	}))
	shows(9, "down")
	full("a hub without memory", true, session("a hub without memory", func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.books = books{}
	}))
	shows(9, "down")
	full("a hub that lacks the last report", true, session("a hub that lacks the last report", func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.books.pods["0"] = &longshorepb.PodReport{Namespace: "n", Name: "0", Uid: "0", Status: []byte("up")}
	}))
	shows(9, "down")
	full("an agent that started", true, session("an agent that started", func() {
		e.stop()
		last := e.account
		e = newEdge(t, h, dir, func(*Config) {})
		e.report(func(a *Account) { *a = last })
	}))
	shows(9, "down")
}

// Without this, a link that never lasts as long as a large account takes would have the edge begin anew for ever, though the hub
// holds the account before.
func TestBrokenFullAccountLeavesTheOneBefore(t *testing.T) {
	earlier := reported{pods: map[string]*longshorepb.PodReport{"a": {Uid: "a"}}}
	w := &writer{reporter: newReporter(2), earlier: earlier}
	if got := w.told(); !bytes.Equal(got.digest(), earlier.digest()) {
		t.Error("a session without a head made another account")
	}
	var a Account
	for i := range 100 {
		a.setPod(i, strings.Repeat(fmt.Sprint(rand.Uint64()), 30))
	}
	look := func() Account { return a }
	var err error
	if w.reports, _, err = w.reporter.next(look, w.reporter.last.Add(reportPause)); err != nil || len(w.reports) < 3 {
		t.Fatalf("%d reports, error %v", len(w.reports), err)
	}
	w.reports = w.reports[1:]
	if got := w.told(); !bytes.Equal(got.digest(), earlier.digest()) {
		t.Error("a part of an account counts as told")
	}
	w.reports = nil
	if got := w.told(); len(got.pods) != 100 {
		t.Errorf("%d pods were told, want 100", len(got.pods))
	}
}
