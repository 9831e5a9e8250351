package kube

import (
	"maps"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// Values of EdgeStatus.Link.
const (
	linkOnline  = "Online"
	linkOffline = "Offline"
)

const (
	// contactEvery is how often an Edge's status is written when nothing but numbers and times changed.
	contactEvery = time.Minute
	// drainedAfter is how soon after the last write it is told that an edge's backlog is gone.
	drainedAfter = 5 * time.Second
	// manyRecords is a backlog that does not have to reach zero to be gone: where readings go on, some are always under way.
	manyRecords = 1000
	// staleAfter is when a status that says Online is no longer believed: its hub is gone.
	staleAfter = 3 * contactEvery
	// flapAfter is how long a link must be away before Kubernetes hears of it: one that comes back sooner, to the same hub, costs
	// no request.
	flapAfter = 10 * time.Second
	// minStatusPause is the least time between two writes of one Edge's status.
	minStatusPause = time.Second
	// maxMessage bounds texts from edges that are written to Kubernetes.
	maxMessage = 1024
)

// owns says whether a hub may write an Edge's status from a state: nobody holds a newer session that is alive, and the end of
// a session is told only by the hub that told its beginning, or that of an earlier one (writeAfter).
func owns(status *v1alpha1.EdgeStatus, state *mirror.EdgeState, hub string, now time.Time) bool {
	if state == nil {
		return false
	}
	if !state.Online {
		same := status.Session == int64(state.Session) && status.Instance == state.Instance
		return status.Hub == hub && (same || status.Session < int64(state.Session))
	}
	if status.Hub == hub || status.Link != linkOnline || stale(status, now) || status.Session < int64(state.Session) {
		return true
	}
	// On a tie the instance that stands there stays.
	return status.Session == int64(state.Session) && status.Instance == state.Instance
}

func stale(status *v1alpha1.EdgeStatus, now time.Time) bool {
	return status.LastContact == nil || now.Sub(status.LastContact.Time) > staleAfter
}

// edgeStatus returns what an Edge's status should be. conflict says that a Node of the edge's name is somebody else's.
func edgeStatus(edge *v1alpha1.Edge, state *mirror.EdgeState, hub string, mine, conflict bool, now time.Time) *v1alpha1.EdgeStatus {
	next := edge.Status.DeepCopy()
	switch {
	case mine:
		fill(next, state, hub, now)
	case next.Link == linkOnline && stale(next, now):
		next.Link, next.Synced = linkOffline, false
	}
	if next.Link != "" {
		connected := metav1.Condition{
			Type: "Connected", Status: metav1.ConditionTrue, Reason: "EdgeConnected", ObservedGeneration: edge.Generation,
			Message: "The edge is connected to a hub.",
		}
		if next.Link != linkOnline {
			connected.Status, connected.Reason = metav1.ConditionFalse, "EdgeOffline"
			connected.Message = "The edge is not connected; it goes on with what it holds."
		}
		meta.SetStatusCondition(&next.Conditions, connected)
	}
	if conflict {
		meta.SetStatusCondition(&next.Conditions, metav1.Condition{
			Type: "NodeConflict", Status: metav1.ConditionTrue, Reason: "NodeExists", ObservedGeneration: edge.Generation,
			Message: "A Node of this name exists that is not the edge's; rename the Edge or delete the Node.",
		})
	} else {
		meta.RemoveStatusCondition(&next.Conditions, "NodeConflict")
	}
	return next
}

func fill(next *v1alpha1.EdgeStatus, state *mirror.EdgeState, hub string, now time.Time) {
	next.Link = linkOffline
	contact := state.LastContact
	if state.Online {
		next.Link, contact = linkOnline, now
	}
	next.Hub, next.Session, next.Instance = hub, int64(state.Session), state.Instance
	next.Sequence, next.Synced = int64(state.Sequence), state.Online && state.Synced
	next.LastContact = &metav1.Time{Time: contact.Truncate(time.Second)}
	if state.AgentVersion != "" {
		next.AgentVersion = shorten(state.AgentVersion)
	}
	if n := state.Node; n != nil {
		next.Architecture, next.BacklogRecords = n.Architecture, int64(n.BacklogRecords)
	}
	if !state.Complete {
		return
	}
	next.Models = nil
	for _, key := range slices.Sorted(maps.Keys(state.Models)) {
		m := state.Models[key]
		next.Models = append(next.Models, v1alpha1.EdgeModelStatus{
			Namespace: m.Namespace, Name: m.Name, DesiredVersion: m.DesiredVersion, ServingVersion: m.ServingVersion,
			State: modelState(m.State), Reason: shorten(m.Reason), Message: shorten(m.Message),
		})
	}
}

func modelState(s longshorepb.ModelState) string {
	switch s {
	case longshorepb.ModelState_MODEL_STATE_DOWNLOADING:
		return stateDownloading
	case longshorepb.ModelState_MODEL_STATE_STAGED:
		return stateStaged
	case longshorepb.ModelState_MODEL_STATE_SERVING:
		return stateServing
	case longshorepb.ModelState_MODEL_STATE_FAILED:
		return stateFailed
	}
	return statePending
}

// writeAfter returns after what time next is due in place of now's status: 0 for at once, negative for never. Numbers and
// times alone wait until the last contact that is written is a minute old; only that a backlog is gone, which people wait
// for, is told within seconds.
//
// The end of a link waits too, and a newer session of the same agent on the same hub is a number: other hubs lose nothing. What
// stands there already names this hub; whoever gets a newer session writes it, and one that is older than this hub's own, but newer
// than what stands there, is put right as soon as this hub sees it.
func writeAfter(have, next *v1alpha1.EdgeStatus, now time.Time) time.Duration {
	if equality.Semantic.DeepEqual(have, next) {
		if next.Link == linkOnline {
			return contactEvery
		}
		return -1
	}
	if have.Link == linkOnline && next.Link == linkOffline {
		return max(0, next.LastContact.Add(flapAfter).Sub(now))
	}
	quiet := next.DeepCopy()
	if have.Hub == next.Hub && have.Instance == next.Instance && have.Session < next.Session {
		quiet.Session = have.Session
	}
	quiet.Sequence, quiet.LastContact, quiet.BacklogRecords = have.Sequence, have.LastContact, have.BacklogRecords
	if have.LastContact == nil || !equality.Semantic.DeepEqual(have, quiet) {
		return 0
	}
	every := contactEvery
	if drained(have.BacklogRecords, next.BacklogRecords) {
		every = drainedAfter
	}
	return max(0, have.LastContact.Add(every).Sub(now))
}

// drained reports whether a backlog is gone: nothing is left, or a tenth of many records.
func drained(was, is int64) bool {
	return was > 0 && is == 0 || was >= manyRecords && is <= was/10
}

// shorten cuts a text from an edge at a character's boundary.
func shorten(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage], "")
}
