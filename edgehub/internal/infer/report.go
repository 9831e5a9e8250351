package infer

import (
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// maxMessage bounds the text of a report in bytes, so that reports of many models fit into messages.
const maxMessage = 512

// setReport says how far the wanted spec is: f is what keeps it back, r the runner that has it, u its chosen variant (zero
// if none fits).
func (s *model) setReport(want *want, u unit, f *failure, r *runner) {
	report := &longshorepb.ModelReport{
		Namespace: s.namespace, Name: s.name, DesiredVersion: want.spec.GetVersion(), Variant: u.variant,
	}
	if u.digest != "" {
		report.BytesTotal = uint64(u.size)
		report.BytesDone = uint64(min(s.m.files.have(u.digest), u.size))
	}
	switch {
	case r != nil:
		f = s.describe(report, r)
	case f == nil:
		report.State = longshorepb.ModelState_MODEL_STATE_DOWNLOADING
	case f.reason == reasonFetchFailed && report.BytesDone > 0:
		report.State = longshorepb.ModelState_MODEL_STATE_DOWNLOADING
	case f.reason == reasonFetchFailed:
		report.State = longshorepb.ModelState_MODEL_STATE_PENDING
	default:
		report.State = longshorepb.ModelState_MODEL_STATE_FAILED
	}
	if s.storeErr != nil && f == nil {
		f = &failure{reasonStore, s.storeErr.Error()}
	}
	if f != nil {
		report.Reason = f.reason
		report.Message = strings.ToValidUTF8(f.message[:min(len(f.message), maxMessage)], "")
	}
	s.next = report
}

// describe fills in the state of a spec that a runner has.
func (s *model) describe(report *longshorepb.ModelReport, r *runner) *failure {
	st := r.state()
	switch {
	case st.worker != nil && r == s.serving:
		report.State = longshorepb.ModelState_MODEL_STATE_SERVING
		return nil
	case st.failures >= s.m.tune.failures:
		report.State = longshorepb.ModelState_MODEL_STATE_FAILED
		return st.last
	case st.failures > 0:
		report.State = longshorepb.ModelState_MODEL_STATE_STAGED
		return &failure{reasonRestarting, st.last.Error()}
	}
	report.State = longshorepb.ModelState_MODEL_STATE_STAGED
	return &failure{reason: reasonLoading}
}

// tell publishes the report with what serves now, and signals if anything changed.
func (s *model) tell() {
	if s.next == nil { // a step that leads to another one at once
		return
	}
	r := proto.Clone(s.next).(*longshorepb.ModelReport)
	s.mu.Lock()
	if s.serving != nil {
		if w := s.serving.state().worker; w != nil {
			r.ServingVersion, r.Engine = s.serving.u.version, w.engine
		}
	}
	changed := !proto.Equal(r, s.report)
	s.report = r
	s.mu.Unlock()
	if changed {
		signal(s.m.changed)
	}
}
