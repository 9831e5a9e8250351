package kube

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// Who may write an Edge's status. A wrong yes shows an edge where it is not; a wrong no shows a connected edge as away for ever.
func TestOwns(t *testing.T) {
	now := time.Now()
	stands := func(hub, instance string, session int64, link string, age time.Duration) *v1alpha1.EdgeStatus {
		return &v1alpha1.EdgeStatus{Hub: hub, Instance: instance, Session: session, Link: link, LastContact: &metav1.Time{Time: now.Add(-age)}}
	}
	state := func(session uint64, online bool) *mirror.EdgeState {
		return &mirror.EdgeState{Session: session, Instance: "i", Online: online}
	}
	for _, c := range []struct {
		name   string
		status *v1alpha1.EdgeStatus
		state  *mirror.EdgeState
		want   bool
	}{
		{"nothing heard", &v1alpha1.EdgeStatus{}, nil, false},
		{"first contact", &v1alpha1.EdgeStatus{}, state(1, true), true},
		{"own session goes on", stands("me", "i", 5, linkOnline, 0), state(5, true), true},
		{"newer session here", stands("you", "i", 4, linkOnline, 0), state(5, true), true},
		{"newer session elsewhere", stands("you", "i", 6, linkOnline, 0), state(5, true), false},
		{"newer session elsewhere is over", stands("you", "i", 6, linkOffline, 0), state(5, true), true},
		{"newer session elsewhere, but its hub is gone", stands("you", "i", 6, linkOnline, 2*staleAfter), state(5, true), true},
		{"a clone with the same number", stands("you", "other", 5, linkOnline, 0), state(5, true), false},
		{"the end of the session that stands there", stands("me", "i", 5, linkOnline, 0), state(5, false), true},
		{"the end of a session whose beginning was not told", stands("me", "i", 4, linkOnline, 0), state(5, false), true},
		{"the end of an agent whose beginning was not told", stands("me", "other", 4, linkOnline, 0), state(5, false), true},
		{"the end of a clone with the same number", stands("me", "other", 5, linkOnline, 0), state(5, false), false},
		{"the end of a session of another hub", stands("you", "i", 5, linkOnline, 0), state(5, false), false},
		{"the end of an older session", stands("me", "i", 6, linkOnline, 0), state(5, false), false},
	} {
		if got := owns(c.status, c.state, "me", now); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}

// A hub that is gone for good leaves its edges Online; another one says after three minutes that they are not.
func TestStaleStatusGoesOffline(t *testing.T) {
	now := time.Now()
	e := &v1alpha1.Edge{Status: v1alpha1.EdgeStatus{Link: linkOnline, Hub: "gone", Session: 3, Synced: true, LastContact: &metav1.Time{Time: now.Add(-staleAfter - time.Second)}}}
	next := edgeStatus(e, nil, "me", false, false, now)
	if next.Link != linkOffline || next.Synced || next.Hub != "gone" || next.Session != 3 || writeAfter(&e.Status, next, now) != 0 {
		t.Fatalf("%+v", next)
	}
	e.Status.LastContact = &metav1.Time{Time: now.Add(-staleAfter + time.Second)}
	if next = edgeStatus(e, nil, "me", false, false, now); next.Link != linkOnline {
		t.Fatalf("%+v", next)
	}
}

// G7: what must be written at once, what may wait a minute, and what never.
func TestWriteAfter(t *testing.T) {
	now := time.Now()
	have := v1alpha1.EdgeStatus{Link: linkOnline, LastContact: &metav1.Time{Time: now.Add(-20 * time.Second)}}
	offline := v1alpha1.EdgeStatus{Link: linkOffline, LastContact: have.LastContact}
	numbers, synced := have, have
	behind := have
	behind.BacklogRecords = 9
	far := have
	far.BacklogRecords = 40_000
	numbers.Sequence, numbers.BacklogRecords = 7, 7
	held := v1alpha1.EdgeStatus{Link: linkOnline, Hub: "me", Instance: "i", Session: 5, LastContact: have.LastContact}
	broke, back, started, elsewhere, again := held, held, held, held, held
	broke.Link, broke.LastContact = linkOffline, &metav1.Time{Time: now.Add(-4 * time.Second)}
	back.Session = 6
	started.Session, started.Instance = 6, "j"
	elsewhere.Session, elsewhere.Hub = 6, "you"
	again.Session = 1
	synced.Synced = true
	for name, c := range map[string]struct {
		have, next v1alpha1.EdgeStatus
		want       time.Duration
	}{
		"a change":                 {have, synced, 0},
		"numbers":                  {have, numbers, 40 * time.Second},
		"the backlog is gone":      {behind, v1alpha1.EdgeStatus{Link: linkOnline, Sequence: 8, LastContact: &metav1.Time{Time: now}}, 0},
		"fewer are under way":      {behind, numbers, 40 * time.Second},
		"some are under way still": {far, numbers, 0},
		"the link broke":           {held, broke, 6 * time.Second},
		"it came back":             {held, back, 40 * time.Second},
		"the agent started":        {held, started, 0},
		"another hub has it":       {held, elsewhere, 0},
		"installed anew":           {held, again, 0},
		"nothing, online":          {have, have, contactEvery},
		"nothing, offline":         {offline, offline, -1},
		"first contact":            {v1alpha1.EdgeStatus{}, have, 0},
		"numbers after long quiet": {v1alpha1.EdgeStatus{Link: linkOnline, LastContact: &metav1.Time{Time: now.Add(-time.Hour)}}, have, 0},
	} {
		if got := writeAfter(&c.have, &c.next, now); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// A flapping link must not rewrite every pod of the edge each time: the Node follows half a minute later, and a hub that has not
// heard from an edge leaves its Node as it is.
func TestNodeReadinessIsDebounced(t *testing.T) {
	now := time.Now()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
	state := online("n", 1)
	nodeStatus(node, &state, true, now)
	if err := nodeReady(node, corev1.ConditionTrue); err != nil {
		t.Fatal(err)
	}
	state.Online, state.LastContact = false, now
	if again := nodeStatus(node, &state, true, now.Add(10*time.Second)); again != offlineAfter-10*time.Second || nodeReady(node, corev1.ConditionTrue) != nil {
		t.Fatalf("after 10 s: again in %s, %v", again, node.Status.Conditions)
	}
	nodeStatus(node, nil, false, now)
	if err := nodeReady(node, corev1.ConditionTrue); err != nil {
		t.Fatalf("a hub that knows nothing: %v", err)
	}
	nodeStatus(node, &state, true, now.Add(offlineAfter))
	if err := nodeReady(node, corev1.ConditionUnknown); err != nil {
		t.Fatal(err)
	}
}

// A hub that starts does not know the box yet when it comes back: its Node must not look like the smallest there is meanwhile.
func TestNodeKeepsWhatABoxSaid(t *testing.T) {
	now := time.Now()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
	state := online("n", 1)
	nodeStatus(node, &state, true, now)
	state.Node = nil
	after := node.DeepCopy()
	nodeStatus(after, &state, true, now)
	if !equality.Semantic.DeepEqual(node.Status, after.Status) {
		t.Fatalf("%+v, was %+v", after.Status, node.Status)
	}
	fresh := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
	if nodeStatus(fresh, &state, true, now); fresh.Status.Capacity.Pods().Value() != defaultPods {
		t.Fatalf("%+v", fresh.Status)
	}
}

// An edge says how its containers are; what other controllers wrote into the status stays, and a pod that has ended stays ended.
func TestMergeStatus(t *testing.T) {
	at := metav1.NewTime(time.Now().Add(-time.Hour).Truncate(time.Second))
	have := &corev1.PodStatus{
		Phase: corev1.PodPending, QOSClass: corev1.PodQOSBurstable,
		Conditions: []corev1.PodCondition{
			{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: at},
			{Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: at},
		},
	}
	next := running()
	if !mergeStatus(have, &next) {
		t.Fatal("no change")
	}
	if len(next.Conditions) != 3 || next.QOSClass != corev1.PodQOSBurstable {
		t.Fatalf("%+v", next)
	}
	for _, c := range next.Conditions {
		if kept := c.LastTransitionTime.Equal(&at); kept != (c.Type == corev1.PodScheduled) {
			t.Errorf("condition %+v", c)
		}
	}
	again := running()
	again.ContainerStatuses = next.ContainerStatuses
	if mergeStatus(&next, &again) {
		t.Errorf("the same report again is a change: %+v, have %+v", again, next)
	}
	ended := &corev1.PodStatus{Phase: corev1.PodSucceeded}
	late := running()
	if mergeStatus(ended, &late) {
		t.Error("a pod that succeeded runs again")
	}
}

// Edge names may be longer than a label's value; two of them must not share a zone.
func TestLabelValue(t *testing.T) {
	long := strings.Repeat("a", 200)
	a, b := labelValue(long+".a"), labelValue(long+".b")
	if len(a) > 63 || a == b {
		t.Fatalf("%q, %q", a, b)
	}
	if got := labelValue("edge-1"); got != "edge-1" {
		t.Fatal(got)
	}
}

// Labels of an Edge are what pods select Nodes by: they come and go with the Edge, and those of others stay.
func TestDress(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"theirs": "1"}}}
	e := edgeWithPods("n", map[string]string{"site": "hall", "line": "1", "kubernetes.io/os": "plan9"})
	if !dress(node, e, nil) || dress(node, e, nil) {
		t.Fatal("a first dressing changes the node, a second does not")
	}
	state := online("n", 1)
	dress(node, e, &state)
	if dress(node, e, nil) || node.Labels[corev1.LabelArchStable] != "arm64" {
		t.Fatal("a hub that has not heard from the edge undoes what another wrote")
	}
	delete(e.Labels, "line")
	if !dress(node, e, nil) || node.Labels["line"] != "" || node.Labels["site"] != "hall" || node.Labels["theirs"] != "1" || node.Labels[corev1.LabelOSStable] != "linux" {
		t.Fatalf("labels %v", node.Labels)
	}
}
