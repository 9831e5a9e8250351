package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"maps"

	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/types"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	reports "github.com/longshore-edge/longshore/sync/account"
)

// What an edge may say of itself; more is not believed.
const (
	maxReportedPods   = 1024
	maxReportedModels = 1024
	maxStatusBytes    = 64 << 10
	maxReportedText   = 4 << 10
	// maxKept bounds what is kept of an edge that is not connected, in bytes. Above it the edge tells everything again.
	maxKept = 1 << 20
)

// account is what an edge reported of itself up to one session, merged, as it was reported: also what is not the edge's (any
// more). It is a plain value: its owner serializes access.
type account struct {
	session, sequence uint64
	list              []byte
	node              *longshorepb.NodeReport
	// full: pods and models are a full account, of this session or of an earlier one. complete: they are up to date, since a
	// full account arrived in this session or the edge said that the one before still stands.
	full, complete bool
	// named: the account is the one that the Hello of this session names.
	named  bool
	pods   map[types.UID]*longshorepb.PodReport
	models map[string]*longshorepb.ModelReport
	// While a full account arrives, it is collected here; the earlier one stands until it is complete.
	arriving *account
}

// follow begins the account of the session that hello opens; what was known before stands until the session's first account is
// complete. If it is what the edge says it reported, it is complete at once.
func follow(before account, hello *longshorepb.Hello) account {
	a := before.clone()
	a.session, a.sequence, a.list, a.arriving = hello.GetSession(), 0, nil, nil
	a.named = before.full && len(hello.GetAccount()) > 0 && bytes.Equal(hello.GetAccount(), reports.Digest(a.pods, a.models, a.node))
	a.complete = a.named
	return a
}

// clone returns a copy whose maps are its own; the messages in them are never changed.
func (a *account) clone() account {
	c := *a
	c.pods, c.models = maps.Clone(a.pods), maps.Clone(a.models)
	return c
}

// kept returns what is kept of the account when its connection has ended.
func (a *account) kept() account {
	size := 0
	for _, p := range a.pods {
		size += proto.Size(p)
	}
	for _, m := range a.models {
		size += proto.Size(m)
	}
	if size > maxKept {
		return account{node: a.node}
	}
	k := a.clone()
	k.arriving = nil
	return k
}

// merge takes a report. It returns how many parts of it were absurd and left out; an error says that the whole report is
// not of this session or out of order, and nothing changed.
func (a *account) merge(r *longshorepb.Reported) (absurd int, err error) {
	if r.Session != a.session {
		return 0, fmt.Errorf("report of session %d on a connection of session %d", r.Session, a.session)
	}
	if r.Sequence <= a.sequence {
		return 0, fmt.Errorf("report %d after report %d", r.Sequence, a.sequence)
	}
	if len(r.List) != 0 && len(r.List) != 32 {
		return 0, errors.New("report with a list digest that is not 32 bytes")
	}
	a.sequence, a.list = r.Sequence, r.List
	if r.GetReset_() {
		a.arriving = &account{}
	}
	to := a
	if a.arriving != nil {
		to = a.arriving
	}
	absurd = to.take(r)
	if r.Node != nil {
		if soundNode(r.Node) {
			a.node = r.Node
		} else {
			absurd++
		}
	}
	if r.Complete {
		if a.arriving != nil {
			a.pods, a.models, a.arriving = a.arriving.pods, a.arriving.models, nil
		}
		a.full, a.complete = true, true
	}
	return absurd, nil
}

func (a *account) take(r *longshorepb.Reported) (absurd int) {
	if a.pods == nil {
		a.pods = map[types.UID]*longshorepb.PodReport{}
	}
	if a.models == nil {
		a.models = map[string]*longshorepb.ModelReport{}
	}
	for _, p := range r.Pods {
		uid := types.UID(p.GetUid())
		if _, known := a.pods[uid]; !soundPod(p) || !known && len(a.pods) >= maxReportedPods {
			absurd++
			continue
		}
		a.pods[uid] = p
	}
	for _, uid := range r.GonePods {
		delete(a.pods, types.UID(uid))
	}
	for _, m := range r.Models {
		key := m.GetNamespace() + "/" + m.GetName()
		if _, known := a.models[key]; !soundModel(m) || !known && len(a.models) >= maxReportedModels {
			absurd++
			continue
		}
		a.models[key] = m
	}
	return absurd
}

func soundPod(p *longshorepb.PodReport) bool {
	return p.GetUid() != "" && len(p.Uid) <= 253 && len(p.Namespace) <= 253 && len(p.Name) <= 253 &&
		(len(p.Digest) == 0 || len(p.Digest) == 32) && len(p.Status) <= maxStatusBytes
}

func soundModel(m *longshorepb.ModelReport) bool {
	_, state := longshorepb.ModelState_name[int32(m.GetState())]
	return state && m.GetName() != "" && len(m.Namespace) <= 253 && len(m.Name) <= 253 && len(m.DesiredVersion) <= 253 &&
		len(m.ServingVersion) <= 253 && len(m.Reason) <= 253 && len(m.Message) <= maxReportedText && len(m.Variant) <= 253 &&
		len(m.Engine) <= 253
}

func soundNode(n *longshorepb.NodeReport) bool {
	for _, s := range []string{n.Hostname, n.Os, n.Architecture, n.Kernel, n.OsImage, n.MachineId, n.BootId, n.AgentVersion, n.Runtime} {
		if len(s) > 253 {
			return false
		}
	}
	const exa = 1 << 60
	return n.CpuMillis <= 100_000_000 && n.MemoryBytes <= exa && n.MaxPods <= 100_000 && n.DiskBytes <= exa &&
		n.DiskFreeBytes <= exa && n.BacklogRecords <= 1<<62 && n.BacklogBytes <= exa
}
