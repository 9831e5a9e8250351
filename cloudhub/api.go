package main

import (
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/inbox"
)

const (
	// standardRecords is the limit of an answer that names none, maxRecords the highest.
	standardRecords = 1000
	maxRecords      = 1_000_000
	// trailerAfter is there if the limit cut the answer off: what to ask for with after= to go on.
	trailerAfter = "Longshore-After"
)

// handler is everything behind the HTTP door.
func (h *hub) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", h.readyz)
	mux.Handle("GET /metrics", promhttp.HandlerFor(h.registry(), promhttp.HandlerOpts{}))
	mux.Handle("GET /api/v1/edges", h.api(h.edges))
	mux.Handle("GET /api/v1/telemetry", h.api(h.telemetry))
	mux.Handle("GET /api/v1/ledger", h.api(h.ledger))
	mux.Handle("/models/", h.files.Handler(h.mayRead))
	mux.Handle("/mqtt", h.broker.WebSocket())
	return mux
}

func (h *hub) readyz(w http.ResponseWriter, _ *http.Request) {
	if err := errors.Join(h.source.Ready(), h.mirror.Ready()); err != nil {
		http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

// api guards an endpoint with the API token, if there is one. Without one the door is on loopback.
func (h *hub) api(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if h.token != "" && subtle.ConstantTimeCompare([]byte(got), []byte(h.token)) != 1 {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "the API wants the token of --api-token-file as bearer token", http.StatusUnauthorized)
			return
		}
		next(w, r)
	})
}

// mayRead lets an edge read the model files that its own Models name.
func (h *hub) mayRead(r *http.Request, digest string) error {
	id, err := h.tokens.Bearer(r)
	if err != nil {
		return err
	}
	if !h.cache.MayRead(id.Name, digest) {
		return fmt.Errorf("no Model of edge %s names this file", id.Name)
	}
	return nil
}

// edgeJSON is one line of GET /api/v1/edges.
type edgeJSON struct {
	Name string `json:"name"`
	// Link is Online, Offline or Superseded.
	Link string `json:"link"`
	// Hub holds, or last held, the connection.
	Hub            string      `json:"hub,omitempty"`
	Session        uint64      `json:"session,omitempty"`
	Instance       string      `json:"instance,omitempty"`
	Synced         bool        `json:"synced"`
	LastContact    *time.Time  `json:"lastContact,omitempty"`
	AgentVersion   string      `json:"agentVersion,omitempty"`
	BacklogRecords uint64      `json:"backlogRecords"`
	BacklogBytes   uint64      `json:"backlogBytes"`
	Pods           []podJSON   `json:"pods"`
	Models         []modelJSON `json:"models"`
}

type podJSON struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Phase     string `json:"phase,omitempty"`
	// Waiting says what a container waits for, such as NoRuntime.
	Waiting  string `json:"waiting,omitempty"`
	Finished bool   `json:"finished,omitempty"`
}

type modelJSON struct {
	Namespace      string `json:"namespace"`
	Name           string `json:"name"`
	DesiredVersion string `json:"desiredVersion,omitempty"`
	ServingVersion string `json:"servingVersion,omitempty"`
	State          string `json:"state"`
	Reason         string `json:"reason,omitempty"`
	Message        string `json:"message,omitempty"`
	Engine         string `json:"engine,omitempty"`
	BytesDone      uint64 `json:"bytesDone,omitempty"`
	BytesTotal     uint64 `json:"bytesTotal,omitempty"`
}

func (h *hub) edges(w http.ResponseWriter, _ *http.Request) {
	elsewhere := map[string]string{}
	for _, e := range h.cache.Edges() {
		if e.Status.Hub != "" && e.Status.Hub != h.cfg.HubName {
			elsewhere[e.Name] = e.Status.Link
		}
	}
	all := []edgeJSON{}
	for _, s := range h.mirror.Edges() {
		e := newEdgeJSON(s)
		if e.Link == "Online" {
			e.Hub = h.cfg.HubName
		}
		all = append(all, e)
	}
	for _, e := range h.cache.Edges() {
		i := slices.IndexFunc(all, func(a edgeJSON) bool { return a.Name == e.Name })
		if link := elsewhere[e.Name]; i >= 0 && all[i].Link == "Offline" && link != "" {
			all[i].Link, all[i].Hub, all[i].Synced = link, e.Status.Hub, e.Status.Synced
		}
	}
	writeJSON(w, all)
}

func newEdgeJSON(s mirror.EdgeState) edgeJSON {
	e := edgeJSON{
		Name: s.Edge, Link: "Offline", Session: s.Session, Instance: s.Instance, Synced: s.Synced, AgentVersion: s.AgentVersion,
		BacklogRecords: s.Node.GetBacklogRecords(), BacklogBytes: s.Node.GetBacklogBytes(), Pods: []podJSON{}, Models: []modelJSON{},
	}
	switch {
	case s.Superseded:
		e.Link = "Superseded"
	case s.Online:
		e.Link = "Online"
	}
	if !s.LastContact.IsZero() {
		e.LastContact = &s.LastContact
	}
	for _, p := range s.Pods {
		e.Pods = append(e.Pods, newPodJSON(p))
	}
	slices.SortFunc(e.Pods, func(a, b podJSON) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	for _, m := range s.Models {
		e.Models = append(e.Models, modelJSON{
			Namespace: m.Namespace, Name: m.Name, DesiredVersion: m.DesiredVersion, ServingVersion: m.ServingVersion,
			State: enumName(m.State.String(), "MODEL_STATE_"), Reason: m.Reason, Message: m.Message, Engine: m.Engine,
			BytesDone: m.BytesDone, BytesTotal: m.BytesTotal,
		})
	}
	slices.SortFunc(e.Models, func(a, b modelJSON) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return e
}

func newPodJSON(p *longshorepb.PodReport) podJSON {
	j := podJSON{Namespace: p.Namespace, Name: p.Name, UID: p.Uid, Finished: p.Finished}
	var status corev1.PodStatus
	if status.Unmarshal(p.Status) != nil {
		return j
	}
	j.Phase = string(status.Phase)
	for _, c := range status.ContainerStatuses {
		if c.State.Waiting != nil {
			j.Waiting = c.State.Waiting.Reason
			break
		}
	}
	return j
}

// enumName turns MODEL_STATE_SERVING into Serving.
func enumName(s, prefix string) string {
	s = strings.ToLower(strings.TrimPrefix(s, prefix))
	return strings.ToUpper(s[:1]) + s[1:]
}

// query reads edge, stream, from, to (RFC 3339) and limit, and what else there is.
func query(r *http.Request, more ...string) (intake.Query, error) {
	v := r.URL.Query()
	q := intake.Query{Edge: v.Get("edge"), Stream: v.Get("stream"), Limit: standardRecords}
	known := append([]string{"edge", "stream", "from", "to", "limit"}, more...)
	for key := range v {
		if !slices.Contains(known, key) {
			return q, fmt.Errorf("unknown parameter %q: there are %s", key, strings.Join(known, ", "))
		}
	}
	for key, to := range map[string]*time.Time{"from": &q.From, "to": &q.To} {
		if v.Get(key) == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, v.Get(key))
		if err != nil {
			return q, fmt.Errorf("%s=%q: want a time such as 2026-01-31T08:00:00Z", key, v.Get(key))
		}
		*to = t
	}
	if limit := v.Get("limit"); limit != "" {
		n, err := strconv.Atoi(limit)
		if err != nil || n < 1 || n > maxRecords {
			return q, fmt.Errorf("limit=%q: want 1 to %d", limit, maxRecords)
		}
		q.Limit = n
	}
	return q, nil
}

// recordJSON is one line of GET /api/v1/telemetry.
type recordJSON struct {
	Edge   string `json:"edge"`
	Stream string `json:"stream"`
	// Epoch and Sequence name the record within edge and stream.
	Epoch    string    `json:"epoch"`
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
	// Clock says how good Time is: Synced, Plausible or Unset.
	Clock string `json:"clock"`
	// Historical: it waited on the edge for a link.
	Historical bool   `json:"historical,omitempty"`
	Topic      string `json:"topic,omitempty"`
	// Payload if it is UTF-8, PayloadBase64 if not.
	Payload       *string `json:"payload,omitempty"`
	PayloadBase64 []byte  `json:"payloadBase64,omitempty"`
}

func newRecordJSON(r inbox.Record) recordJSON {
	j := recordJSON{
		Edge: r.Edge, Stream: r.Stream, Epoch: hex.EncodeToString(r.Epoch[:]), Sequence: r.Seq,
		Time: time.Unix(0, r.WallNs).UTC(), Clock: enumName(r.Quality.String(), "CLOCK_QUALITY_"), Historical: r.Historical, Topic: r.Topic,
	}
	if utf8.Valid(r.Payload) {
		text := string(r.Payload)
		j.Payload = &text
	} else {
		j.PayloadBase64 = r.Payload
	}
	return j
}

// position writes a record's identity as after= takes it: edge/stream/epoch/sequence.
func position(id inbox.ID) string {
	return fmt.Sprintf("%s/%s/%x/%d", id.Edge, id.Stream, id.Epoch, id.Seq)
}

func parsePosition(s string) (id inbox.ID, err error) {
	parts := strings.Split(s, "/")
	if len(parts) != 4 {
		return id, fmt.Errorf("after=%q: want edge/stream/epoch/sequence of a record", s)
	}
	id.Edge, id.Stream = parts[0], parts[1]
	epoch, err := hex.DecodeString(parts[2])
	if err != nil || len(epoch) != len(id.Epoch) {
		return id, fmt.Errorf("after=%q: the epoch is not 32 hexadecimal digits", s)
	}
	id.Epoch = [16]byte(epoch)
	if id.Seq, err = strconv.ParseUint(parts[3], 10, 64); err != nil {
		return id, fmt.Errorf("after=%q: the sequence is no number", s)
	}
	return id, nil
}

func parseTail(v url.Values) (n int, err error) {
	n, err = strconv.Atoi(v.Get("tail"))
	switch {
	case err != nil || n < 1 || n > maxRecords:
		return n, fmt.Errorf("tail=%q: want 1 to %d", v.Get("tail"), maxRecords)
	case v.Has("limit") || v.Has("after"):
		return n, errors.New("tail does not go with limit or after")
	}
	return n, nil
}

// errMore says that there is a record beyond the limit.
var errMore = errors.New("limit reached")

func (h *hub) telemetry(w http.ResponseWriter, r *http.Request) {
	q, err := query(r, "after", "tail")
	v, tail := r.URL.Query(), 0
	if after := v.Get("after"); after != "" && err == nil {
		q.After, err = parsePosition(after)
	}
	if v.Has("tail") && err == nil {
		tail, err = parseTail(v)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Trailer", trailerAfter)
	lines := json.NewEncoder(w)
	write := func(rec inbox.Record) error { return lines.Encode(newRecordJSON(rec)) }
	var last inbox.ID
	if tail > 0 {
		err = h.intake.Tail(r.Context(), q, tail, write)
	} else {
		limit, n := q.Limit, 0
		q.Limit = 0
		err = h.intake.Records(r.Context(), q, func(rec inbox.Record) error {
			if n++; n > limit {
				return errMore
			}
			last = rec.ID
			return write(rec)
		})
	}
	switch {
	case errors.Is(err, errMore):
		w.Header().Set(trailerAfter, position(last))
	case errors.Is(err, intake.ErrNoPosition):
		w.Header().Del("Trailer")
		http.Error(w, err.Error()+": give what a line or the trailer "+trailerAfter+" said, and the same edge and stream", http.StatusBadRequest)
	case err != nil && !errors.Is(err, context.Canceled):
		// Part of the answer may be on its way: cut it off, so that nobody takes it for the whole.
		h.log.Warn("telemetry query failed", "err", err)
		panic(http.ErrAbortHandler)
	}
}

// ledgerJSON is GET /api/v1/ledger: accepted = delivered + ledgered, once an edge's backlog is empty.
type ledgerJSON struct {
	Sums    []sumJSON  `json:"sums"`
	Entries []lossJSON `json:"entries"`
}

type sumJSON struct {
	Edge       string `json:"edge"`
	Stream     string `json:"stream"`
	Accepted   uint64 `json:"accepted"`
	Delivered  uint64 `json:"delivered"`
	Ledgered   uint64 `json:"ledgered"`
	Duplicates uint64 `json:"duplicates"`
	Resent     uint64 `json:"resent"`
	Conflicts  uint64 `json:"conflicts"`
}

type lossJSON struct {
	Edge   string    `json:"edge"`
	Stream string    `json:"stream"`
	Epoch  string    `json:"epoch"`
	First  uint64    `json:"first"`
	Last   uint64    `json:"last"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

func (h *hub) ledger(w http.ResponseWriter, r *http.Request) {
	q, err := query(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	sums, entries, err := h.intake.Ledger(r.Context(), q)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	out := ledgerJSON{Sums: []sumJSON{}, Entries: []lossJSON{}}
	for _, s := range sums {
		out.Sums = append(out.Sums, sumJSON(s))
	}
	for _, e := range entries {
		out.Entries = append(out.Entries, lossJSON{
			Edge: e.Edge, Stream: e.Stream, Epoch: hex.EncodeToString(e.Epoch[:]), First: e.First, Last: e.Last, Reason: e.Reason, At: e.At.UTC(),
		})
	}
	writeJSON(w, out)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone if this fails
}
