package main

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-edge/longshore/edgehub/internal/uplink"
	"github.com/longshore-edge/longshore/sync/desired"
)

// Status is everything the agent says of itself. It is what `edgehub status -o json` and /status show.
type Status struct {
	Edge     string        `json:"edge"`
	Agent    AgentStatus   `json:"agent"`
	Link     LinkStatus    `json:"link"`
	List     ListStatus    `json:"list"`
	Pods     []PodStatus   `json:"pods"`
	Models   []ModelStatus `json:"models"`
	Outbox   OutboxStatus  `json:"outbox"`
	Devices  DeviceStatus  `json:"devices"`
	HTTP     string        `json:"http"`
	Clock    ClockStatus   `json:"clock"`
	Disk     DiskStatus    `json:"disk"`
	Warnings []string      `json:"warnings"`
}

// AgentStatus is about the process.
type AgentStatus struct {
	Version       string    `json:"version"`
	Started       time.Time `json:"started"`
	UptimeSeconds int64     `json:"uptimeSeconds"`
	// MemoryBytes is what the process got from the system and did not give back.
	MemoryBytes uint64 `json:"memoryBytes"`
}

// The states of a link.
const (
	linkUp         = "up"
	linkDown       = "down"
	linkSuperseded = "superseded"
)

// LinkStatus is about the connection to the cloud hub.
type LinkStatus struct {
	Hub   string `json:"hub"`
	State string `json:"state"`
	// Since is when the state began.
	Since time.Time `json:"since,omitzero"`
	// Error is why the last attempt or connection ended, NextTry when the next attempt starts.
	Error   string    `json:"error,omitempty"`
	NextTry time.Time `json:"nextTry,omitzero"`
	Session uint64    `json:"session"`
	// BytesIn and BytesOut count since the agent started.
	BytesIn  uint64 `json:"bytesIn"`
	BytesOut uint64 `json:"bytesOut"`
	// TelemetryWindow bounds telemetry bytes not acknowledged, TelemetryOutstanding is what there is of them.
	TelemetryWindow      int `json:"telemetryWindow"`
	TelemetryOutstanding int `json:"telemetryOutstanding"`
	// Rejected counts messages of the hub that were not believed or not understood.
	Rejected       uint64 `json:"rejected"`
	RejectedReason string `json:"rejectedReason,omitempty"`
}

// ListStatus is about what the edge should hold.
type ListStatus struct {
	Cluster string `json:"cluster,omitempty"`
	// Committed is the digest of the list that holds, Target of the one being fetched.
	Committed string `json:"committed,omitempty"`
	Target    string `json:"target,omitempty"`
	// Synced: the hub named the committed list as the newest in this session.
	Synced    bool   `json:"synced"`
	HaveBytes uint64 `json:"haveBytes"`
	WantBytes uint64 `json:"wantBytes"`
	// Error is why what the hub sent could not be stored, or was refused.
	Error string `json:"error,omitempty"`
}

// PodStatus is one pod.
type PodStatus struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Phase     string `json:"phase"`
	Reason    string `json:"reason,omitempty"`
	Message   string `json:"message,omitempty"`
	Finished  bool   `json:"finished"`
}

// ModelStatus is one model.
type ModelStatus struct {
	Namespace      string `json:"namespace"`
	Name           string `json:"name"`
	DesiredVersion string `json:"desiredVersion"`
	ServingVersion string `json:"servingVersion,omitempty"`
	// State is Pending, Downloading, Staged, Serving or Failed.
	State      string `json:"state"`
	Reason     string `json:"reason,omitempty"`
	Message    string `json:"message,omitempty"`
	Variant    string `json:"variant,omitempty"`
	Engine     string `json:"engine,omitempty"`
	BytesDone  uint64 `json:"bytesDone"`
	BytesTotal uint64 `json:"bytesTotal"`
}

// OutboxStatus is about telemetry that waits.
type OutboxStatus struct {
	Streams   []StreamStatus `json:"streams"`
	DiskBytes int64          `json:"diskBytes"`
}

// StreamStatus counts records of one stream since the state folder was made (Refused: since the agent started).
type StreamStatus struct {
	Stream           string `json:"stream"`
	Accepted         uint64 `json:"accepted"`
	Acked            uint64 `json:"acked"`
	Held             uint64 `json:"held"`
	HeldBytes        int64  `json:"heldBytes"`
	Dropped          uint64 `json:"dropped"`
	Refused          uint64 `json:"refused"`
	OldestAgeSeconds int64  `json:"oldestAgeSeconds"`
}

// DeviceStatus is about the broker for devices.
type DeviceStatus struct {
	Listen      string `json:"listen"`
	Connections int64  `json:"connections"`
	MessagesIn  int64  `json:"messagesIn"`
	MessagesOut int64  `json:"messagesOut"`
	Dropped     int64  `json:"dropped"`
	// NotStored counts messages refused since the start because their stream or the disk was full.
	NotStored       uint64 `json:"notStored"`
	NotStoredReason string `json:"notStoredReason,omitempty"`
}

// ClockStatus says what the box's clock is worth.
type ClockStatus struct {
	Wall time.Time `json:"wall"`
	// Quality is unset, plausible or synced.
	Quality string `json:"quality"`
}

// DiskStatus is about the file system of the state folder.
type DiskStatus struct {
	State      string `json:"state"`
	SizeBytes  uint64 `json:"sizeBytes"`
	FreeBytes  uint64 `json:"freeBytes"`
	ModelBytes int64  `json:"modelBytes"`
	ModelQuota int64  `json:"modelQuota"`
}

// lowDisk is how much free space is worth a warning.
const lowDisk = 64 << 20

// status looks at every part now.
func (a *agent) status() Status {
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	dev := a.broker.Stats()
	clock := a.uplink.Clock()
	s := Status{
		Edge: a.cred.Edge,
		Agent: AgentStatus{
			Version: versionString(), Started: a.started, UptimeSeconds: int64(time.Since(a.started).Seconds()),
			MemoryBytes: mem.Sys - mem.HeapReleased,
		},
		Pods: []PodStatus{}, Models: []ModelStatus{}, Warnings: append([]string{}, a.warnings...),
		HTTP: a.http.Addr().String(),
		Devices: DeviceStatus{
			Listen: a.broker.Addr().String(), Connections: dev.Connections, MessagesIn: dev.MessagesIn,
			MessagesOut: dev.MessagesOut, Dropped: dev.Dropped,
		},
		Clock: ClockStatus{Wall: time.Now(), Quality: word(clock.GetQuality().String(), "CLOCK_QUALITY_")},
		Disk:  DiskStatus{State: a.cfg.State},
	}
	s.Disk.SizeBytes, s.Disk.FreeBytes = diskOf(a.cfg.State)
	if s.Disk.FreeBytes < lowDisk {
		s.Warnings = append(s.Warnings, "the disk is nearly full: soon the oldest telemetry is dropped (or refused, as the stream says) and no specs or models are taken; free some space")
	}
	if a.store.ReadOnly() {
		s.Warnings = append(s.Warnings, "the disk was full at the start: what was confirmed is served, but specs are not stored until there is room; free some space")
	}
	var why error
	if s.Devices.NotStored, why = a.broker.Unstored(); why != nil {
		s.Devices.NotStoredReason = why.Error()
	}
	s.Disk.ModelBytes, s.Disk.ModelQuota = a.models.DiskUsage()
	s.Link, s.List = linkStatus(a.cfg.Hub.URL, a.uplink.Status())
	for _, p := range a.reconcile.Pods() {
		ps := PodStatus{Namespace: p.GetNamespace(), Name: p.GetName(), UID: p.GetUid(), Finished: p.GetFinished()}
		var full corev1.PodStatus
		if err := full.Unmarshal(p.GetStatus()); err == nil {
			ps.Phase, ps.Reason, ps.Message = string(full.Phase), full.Reason, full.Message
			waitingFor(&ps, full)
		}
		s.Pods = append(s.Pods, ps)
	}
	for _, m := range a.models.Reports() {
		state := word(m.GetState().String(), "MODEL_STATE_")
		s.Models = append(s.Models, ModelStatus{
			Namespace: m.GetNamespace(), Name: m.GetName(), DesiredVersion: m.GetDesiredVersion(), ServingVersion: m.GetServingVersion(),
			State: strings.ToUpper(state[:1]) + state[1:], Reason: m.GetReason(), Message: m.GetMessage(),
			Variant: m.GetVariant(), Engine: m.GetEngine(), BytesDone: m.GetBytesDone(), BytesTotal: m.GetBytesTotal(),
		})
	}
	s.Outbox = a.outboxStatus()
	return s
}

func (a *agent) outboxStatus() OutboxStatus {
	o := OutboxStatus{Streams: []StreamStatus{}}
	streams, disk := a.outbox.Stats()
	o.DiskBytes = disk
	for _, t := range streams {
		if t.Held == 0 {
			t.HeldBytes = 0 // what is left of a file is nothing that waits
		}
		o.Streams = append(o.Streams, StreamStatus{
			Stream: t.Stream, Accepted: t.Accepted, Acked: t.Acked, Held: t.Held, HeldBytes: t.HeldBytes,
			Dropped: t.Dropped, Refused: t.Refused, OldestAgeSeconds: int64(t.OldestAge.Seconds()),
		})
	}
	slices.SortFunc(o.Streams, func(x, y StreamStatus) int { return cmp.Compare(x.Stream, y.Stream) })
	return o
}

func linkStatus(hub string, u uplink.Status) (LinkStatus, ListStatus) {
	l := LinkStatus{
		Hub: hub, State: linkDown, Since: u.Link.Since, NextTry: u.Link.NextTry, Session: u.Session, BytesIn: u.BytesIn, BytesOut: u.BytesOut,
		TelemetryWindow: u.Window, TelemetryOutstanding: u.Outstanding, Rejected: u.Rejected,
	}
	if u.Link.Connected {
		l.State = linkUp
	}
	if u.Link.Err != nil {
		l.Error = u.Link.Err.Error()
	}
	if u.Superseded {
		l.State, l.NextTry = linkSuperseded, time.Time{}
		l.Error = "another agent with the same identity took over; give each box its own credential, then restart this agent"
	}
	if u.RejectedErr != nil {
		l.RejectedReason = u.RejectedErr.Error()
	}
	digest := func(d desired.Digest) string {
		if d == (desired.Digest{}) {
			return ""
		}
		return hex.EncodeToString(d[:])
	}
	r := u.Replica
	list := ListStatus{
		Cluster: r.Cluster, Committed: digest(r.Committed), Target: digest(r.Target), Synced: r.Synced && u.Link.Connected,
		HaveBytes: r.Have, WantBytes: r.Want, Error: r.Problem,
	}
	if u.StoreErr != nil {
		list.Error = "cannot store what the hub sends: " + explainDisk(u.StoreErr).Error()
	}
	return l, list
}

// waitingFor adds why the first container waits, if the pod itself gives no reason.
func waitingFor(p *PodStatus, s corev1.PodStatus) {
	for _, c := range s.ContainerStatuses {
		if w := c.State.Waiting; w != nil && p.Reason == "" {
			p.Reason, p.Message = w.Reason, w.Message
		}
	}
	for _, c := range s.Conditions {
		if strings.HasPrefix(string(c.Type), "longshore.dev/") && c.Status == corev1.ConditionFalse {
			p.Message = strings.TrimPrefix(p.Message+"; "+c.Message, "; ")
		}
	}
}

// word turns a constant of the wire into a word.
func word(constant, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(constant, prefix))
}

// printStatus writes the status for people.
func printStatus(w io.Writer, s Status) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	line := func(key, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", key, fmt.Sprintf(format, args...)) }
	line("Edge:", "%s", s.Edge)
	line("Agent:", "%s, up %s, %s of memory", s.Agent.Version, time.Duration(s.Agent.UptimeSeconds)*time.Second, humanize.IBytes(s.Agent.MemoryBytes))
	line("Link:", "%s", linkLine(s.Link))
	if s.Link.Error != "" && s.Link.State != linkUp {
		line("", "%s", s.Link.Error)
	}
	if s.Link.Rejected > 0 {
		line("", "%d messages of the hub rejected, the newest because: %s", s.Link.Rejected, s.Link.RejectedReason)
	}
	line("List:", "%s", listLine(s.List))
	if s.List.Error != "" {
		line("", "%s", s.List.Error)
	}
	line("Devices:", "MQTT on %s, %d connected, %d messages in, %d out", s.Devices.Listen, s.Devices.Connections, s.Devices.MessagesIn, s.Devices.MessagesOut)
	if s.Devices.NotStored > 0 {
		line("", "%d messages refused, the newest because: %s", s.Devices.NotStored, s.Devices.NotStoredReason)
	}
	line("Inference:", "http://%s/v2", s.HTTP)
	line("Clock:", "%s (%s)", s.Clock.Wall.UTC().Format(time.RFC3339), s.Clock.Quality)
	line("Disk:", "%s free of %s at %s; models %s of %s, outbox %s", humanize.IBytes(s.Disk.FreeBytes), humanize.IBytes(s.Disk.SizeBytes),
		s.Disk.State, humanize.IBytes(uint64(s.Disk.ModelBytes)), humanize.IBytes(uint64(s.Disk.ModelQuota)), humanize.IBytes(uint64(s.Outbox.DiskBytes)))
	for _, m := range s.Warnings {
		line("Warning:", "%s", m)
	}
	_ = t.Flush() // standard output has nobody to tell

	fmt.Fprintf(w, "\nPods (%d)\n", len(s.Pods))
	if len(s.Pods) > 0 {
		t = tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
		fmt.Fprintln(t, "  NAMESPACE\tNAME\tPHASE\tREASON\tMESSAGE")
		for _, p := range s.Pods {
			fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\n", p.Namespace, p.Name, p.Phase, dash(p.Reason), p.Message)
		}
		_ = t.Flush()
	}
	fmt.Fprintf(w, "\nModels (%d)\n", len(s.Models))
	printModels(w, s.Models)
	fmt.Fprintf(w, "\nTelemetry (%d streams)\n", len(s.Outbox.Streams))
	if len(s.Outbox.Streams) > 0 {
		t = tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
		fmt.Fprintln(t, "  STREAM\tACCEPTED\tACKED\tHELD\tBYTES HELD\tOLDEST\tDROPPED\tREFUSED")
		for _, o := range s.Outbox.Streams {
			fmt.Fprintf(t, "  %s\t%d\t%d\t%d\t%s\t%s\t%d\t%d\n", o.Stream, o.Accepted, o.Acked, o.Held, humanize.IBytes(uint64(o.HeldBytes)),
				time.Duration(o.OldestAgeSeconds)*time.Second, o.Dropped, o.Refused)
		}
		_ = t.Flush()
	}
}

func linkLine(l LinkStatus) string {
	text := l.State
	if !l.Since.IsZero() {
		text += " for " + time.Since(l.Since).Round(time.Second).String()
	}
	text += " to " + l.Hub
	if !l.NextTry.IsZero() && l.State == linkDown {
		text += ", next try in " + max(time.Until(l.NextTry), 0).Round(time.Second).String()
	}
	return fmt.Sprintf("%s, session %d, %s in, %s out", text, l.Session, humanize.IBytes(l.BytesIn), humanize.IBytes(l.BytesOut))
}

func listLine(l ListStatus) string {
	text := "none yet"
	if l.Committed != "" {
		text = l.Committed[:min(12, len(l.Committed))]
		if l.Synced {
			text += ", up to date"
		} else {
			text += ", not confirmed by the hub now"
		}
	}
	if l.Target != "" {
		text += fmt.Sprintf("; fetching %s %s", l.Target[:min(12, len(l.Target))], progress(l.HaveBytes, l.WantBytes))
	}
	return text
}

func printModels(w io.Writer, models []ModelStatus) {
	if len(models) == 0 {
		return
	}
	t := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
	fmt.Fprintln(t, "  NAMESPACE\tNAME\tDESIRED\tSERVING\tSTATE\tENGINE\tREASON\tMESSAGE")
	for _, m := range models {
		state := m.State
		if m.BytesTotal > m.BytesDone && m.BytesDone > 0 || m.State == "Downloading" {
			state += " " + progress(m.BytesDone, m.BytesTotal)
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.Namespace, m.Name, m.DesiredVersion, dash(m.ServingVersion), state, dash(m.Engine), dash(m.Reason), m.Message)
	}
	_ = t.Flush()
}

// progress draws a bar of ten characters.
func progress(have, want uint64) string {
	if want == 0 {
		return ""
	}
	full := int(min(have, want) * 10 / want)
	return fmt.Sprintf("[%s%s] %d%% of %s", strings.Repeat("#", full), strings.Repeat(".", 10-full), min(have, want)*100/want, humanize.IBytes(want))
}

func dash(s string) string { return cmp.Or(s, "-") }
