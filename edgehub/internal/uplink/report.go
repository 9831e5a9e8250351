package uplink

import (
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
)

const (
	// reportPause is the least time between two rounds of reports, so that progress of a download does not fill the link.
	// A committed list does not wait for it.
	reportPause = time.Second
	// figuresPause is the least time between two reports because of nothing but a figure (free disk, backlog). A backlog
	// that is gone does not wait for it.
	figuresPause = time.Minute
	// manyRecords is a backlog that does not have to reach zero to be gone: where readings go on, some are always under way.
	manyRecords = 1000
	// reportRoom is kept free in a report for all that is not a list of pods or models.
	reportRoom = 4 << 10
)

// reported is what was reported so far. It is a value: maps and messages in it are not changed. The zero value is nothing.
type reported struct {
	pods   map[string]*longshorepb.PodReport   // by UID; nil before the first report
	models map[string]*longshorepb.ModelReport // by namespace/name
	node   *longshorepb.NodeReport
	nodeAt time.Time // of the last report of the node
}

// digest names a full account; nil if there is none.
func (r reported) digest() []byte {
	if r.pods == nil {
		return nil
	}
	return account.Digest(r.pods, r.models, r.node)
}

// reporter turns accounts into reports: the first of a session in full, unless the hub holds that of an earlier session, later
// ones what changed.
type reporter struct {
	session uint64

	mu      sync.Mutex
	list    []byte   // guarded by mu: digest of the committed list, nil if none
	urgent  bool     // guarded by mu: list changed
	dirty   bool     // guarded by mu: the account changed
	earlier reported // guarded by mu: what the hub holds of earlier sessions

	sequence uint64
	last     time.Time
	reported
}

func newReporter(session uint64) *reporter { return &reporter{session: session, urgent: true} }

// resume says that the hub holds what was reported in an earlier session; call it before the first report.
func (r *reporter) resume(earlier reported) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.earlier = earlier
}

func (r *reporter) resumed() reported {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.earlier
}

func (r *reporter) setList(d desired.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list, r.urgent = nil, true
	if d != (desired.Digest{}) {
		r.list = d[:]
	}
}

func (r *reporter) changed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirty = true
}

// due reports whether to look at the account now, or else when.
func (r *reporter) due(now time.Time) (list []byte, urgent bool, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pause := r.quietPause()
	if r.dirty {
		pause = reportPause
	}
	if wait = r.last.Add(pause).Sub(now); wait > 0 && !r.urgent {
		return nil, false, wait
	}
	urgent = r.urgent
	r.urgent, r.dirty = false, false
	return r.list, urgent, 0
}

// quietPause is how long an account is not looked at that nobody called changed. Nothing tells when a backlog goes.
func (r *reporter) quietPause() time.Duration {
	if r.node.GetBacklogRecords() > 0 {
		return reportPause
	}
	return figuresPause
}

// next returns the serialized reports to send now, none above 16 KiB, or how long to wait before asking again.
func (r *reporter) next(look func() Account, now time.Time) (messages [][]byte, wait time.Duration, err error) {
	list, urgent, wait := r.due(now)
	if wait > 0 {
		return nil, wait, nil
	}
	if r.pods == nil {
		r.reported = r.resumed()
	}
	first := r.pods == nil
	parts := r.split(r.diff(look(), now, first))
	r.last = now
	if !urgent && len(parts) == 1 && proto.Size(parts[0]) == 0 {
		return nil, r.quietPause(), nil
	}
	parts[0].Reset_ = first
	parts[len(parts)-1].Complete = first
	for _, p := range parts {
		r.sequence++
		p.Session, p.Sequence, p.List = r.session, r.sequence, list
		b, err := account.Encode(p)
		if err != nil {
			return nil, 0, err
		}
		messages = append(messages, b)
	}
	return messages, 0, nil
}

// diff returns what differs from what was reported, and notes it as reported.
func (r *reporter) diff(a Account, now time.Time, first bool) *longshorepb.Reported {
	d := &longshorepb.Reported{}
	pods := make(map[string]*longshorepb.PodReport, len(a.Pods))
	for _, p := range a.Pods {
		p = fit(p)
		if !proto.Equal(r.pods[p.GetUid()], p) {
			d.Pods = append(d.Pods, p)
		}
		pods[p.GetUid()] = p
	}
	for uid := range r.pods {
		if pods[uid] == nil {
			d.GonePods = append(d.GonePods, uid)
		}
	}
	models := make(map[string]*longshorepb.ModelReport, len(a.Models))
	for _, m := range a.Models {
		m = fitModel(m)
		key := m.GetNamespace() + "/" + m.GetName()
		if !proto.Equal(r.models[key], m) {
			d.Models = append(d.Models, m)
		}
		models[key] = m
	}
	r.pods, r.models = pods, models
	if first || now.Sub(r.nodeAt) >= figuresPause && !proto.Equal(r.node, a.Node) || !proto.Equal(account.Facts(r.node), account.Facts(a.Node)) ||
		drained(r.node, a.Node) {
		d.Node, r.node, r.nodeAt = a.Node, a.Node, now
	}
	return d
}

// drained reports whether a backlog is gone: nothing is left, or a tenth of many records. As it has to be reported to be seen
// going, and grows unreported for figuresPause, records under way do not make it chatter.
func drained(reported, now *longshorepb.NodeReport) bool {
	was, is := reported.GetBacklogRecords(), now.GetBacklogRecords()
	return was > 0 && is == 0 || was >= manyRecords && is <= was/10
}

// fit replaces a status that would not fit a message.
func fit(p *longshorepb.PodReport) *longshorepb.PodReport {
	if proto.Size(p) <= maxMessage-reportRoom {
		return p
	}
	var full corev1.PodStatus
	short := corev1.PodStatus{Message: "the status is too large to report"}
	if err := full.Unmarshal(p.GetStatus()); err == nil {
		short.Phase, short.Reason = full.Phase, full.Reason
	}
	p = proto.CloneOf(p)
	p.Status, _ = short.Marshal() // a status made here always encodes
	return p
}

// fitModel cuts a model's message to 1 KiB.
func fitModel(m *longshorepb.ModelReport) *longshorepb.ModelReport {
	const most = 1 << 10
	if len(m.GetMessage()) <= most {
		return m
	}
	m = proto.CloneOf(m)
	m.Message = strings.ToValidUTF8(m.Message[:most], "") + "..."
	return m
}

// split returns at least one report, each small enough for a message.
func (r *reporter) split(d *longshorepb.Reported) []*longshorepb.Reported {
	part := &longshorepb.Reported{Node: d.GetNode()}
	parts := []*longshorepb.Reported{part}
	size := 0
	room := func(n int) *longshorepb.Reported {
		if size += n + 4; size > maxMessage-reportRoom {
			part = &longshorepb.Reported{}
			parts = append(parts, part)
			size = n + 4
		}
		return part
	}
	for _, p := range d.GetPods() {
		q := room(proto.Size(p))
		q.Pods = append(q.Pods, p)
	}
	for _, m := range d.GetModels() {
		q := room(proto.Size(m))
		q.Models = append(q.Models, m)
	}
	for _, uid := range d.GetGonePods() {
		q := room(len(uid))
		q.GonePods = append(q.GonePods, uid)
	}
	return parts
}
