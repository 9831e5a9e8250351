package infer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/topic"
)

const (
	// errorSuffix and errorRoot name the topics of errors. Topics that look so are never inputs, so that an error can't
	// cause the next one.
	errorSuffix = "/error"
	errorRoot   = "longshore-error/"
)

// route sends messages of a topic filter to a model.
type route struct {
	s       *model
	binding *longshorepb.ModelBinding
}

// job is a message on its way through a model.
type job struct {
	binding *longshorepb.ModelBinding
	topic   string
	payload []byte
	at      time.Time
}

// result is the JSON that a binding publishes and appends to its stream.
type result struct {
	Model     string                     `json:"model"`
	Namespace string                     `json:"namespace"`
	Version   string                     `json:"version,omitempty"`
	ID        string                     `json:"id,omitempty"`
	Topic     string                     `json:"topic"` // of the input
	Time      time.Time                  `json:"time"`  // when the input arrived
	Outputs   map[string]json.RawMessage `json:"outputs,omitempty"`
	Error     string                     `json:"error,omitempty"`
}

// Message offers a device's message to the bindings; it returns at once. A full queue drops the message and counts it.
//
// What a binding makes of a message goes to its output topic and its stream. Where the model can't take a message, or
// fails at it, a JSON object with the field "error" goes to <output>/error, or <input>/error for a binding without an
// output, or longshore-error/<input> where that topic would be an input of the binding itself. Topics that end in /error or
// begin with longshore-error/ are never inputs.
func (m *Manager) Message(name string, payload []byte) {
	routes := m.routes.Load()
	if routes == nil || name == "" || strings.HasSuffix(name, errorSuffix) || strings.HasPrefix(name, errorRoot) {
		return
	}
	for _, r := range *routes {
		if !topic.Match(r.binding.GetInput(), name) {
			continue
		}
		select {
		case r.s.queue <- job{r.binding, name, bytes.Clone(payload), time.Now()}:
		default:
			r.s.count.drops.Add(1)
		}
	}
}

// updateRoutes gathers the bindings of what serves, or of what shall serve where nothing did yet.
func (m *Manager) updateRoutes() {
	m.routing.Lock()
	defer m.routing.Unlock()
	var routes []route
	for _, s := range m.all() {
		s.mu.Lock()
		spec := s.live
		switch {
		case s.want == nil:
			spec = nil
		case spec == nil:
			spec = s.want.spec
		}
		s.mu.Unlock()
		for _, b := range spec.GetBindings() {
			if err := topic.ValidFilter(b.GetInput()); err != nil {
				m.log.Warn("binding ignored", "model", s.key, "error", err)
				continue
			}
			routes = append(routes, route{s, b})
		}
	}
	m.routes.Store(&routes)
}

// consume takes messages one by one, so that results keep the order of their inputs. While no worker is ready they wait.
func (s *model) consume(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-s.queue:
			w := s.await(ctx)
			if w == nil {
				return
			}
			s.process(ctx, w, j)
			w.release()
		}
	}
}

// await returns an acquired worker; nil if ctx ended.
func (s *model) await(ctx context.Context) *worker {
	for {
		s.mu.Lock()
		served, r := s.served, s.serving
		s.mu.Unlock()
		if r != nil {
			if w := r.state().worker; w != nil && w.acquire() {
				return w
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-served:
		}
	}
}

func (s *model) process(ctx context.Context, w *worker, j job) {
	res := result{Model: s.name, Namespace: s.namespace, Version: w.unit.version, Topic: j.topic, Time: j.at}
	output, err := expand(j.binding, j.topic)
	if err == nil {
		var out *oip.DeviceResult
		if out, err = s.infer(ctx, w, j.payload); err == nil {
			res.ID, res.Outputs = out.ID, out.Outputs
		}
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		s.count.errors.Add(1)
		res.Error = err.Error()
		s.m.log.Debug("message not inferred", "model", s.key, "topic", j.topic, "error", err)
		if to := errorTopic(j.binding, output, j.topic); to != "" {
			s.publish(ctx, to, res)
		}
		return
	}
	s.count.inferences.Add(1)
	b, ok := s.publish(ctx, output, res)
	if ok && j.binding.GetStream() != "" && s.m.cfg.Append != nil {
		to := output
		if to == "" {
			to = j.topic
		}
		if err := s.m.cfg.Append(ctx, j.binding.GetStream(), to, b); err != nil && ctx.Err() == nil {
			s.count.errors.Add(1)
			s.m.log.Warn("result not in its stream", "model", s.key, "stream", j.binding.GetStream(), "error", err)
		}
	}
}

// publish encodes res and sends it to a topic, if there is one. ok is false only where res can't be encoded.
func (s *model) publish(ctx context.Context, to string, res result) (b []byte, ok bool) {
	b, err := json.Marshal(res)
	if err != nil {
		s.count.errors.Add(1)
		s.m.log.Error("encode a result", "model", s.key, "error", err)
		return nil, false
	}
	if to == "" || s.m.cfg.Publish == nil {
		return b, true
	}
	if err := s.m.cfg.Publish(ctx, to, b); err != nil && ctx.Err() == nil {
		s.count.errors.Add(1)
		s.m.log.Warn("publish a result", "model", s.key, "topic", to, "error", err)
	}
	return b, true
}

// infer asks the worker. A worker that does not answer in time counts as hung.
func (s *model) infer(ctx context.Context, w *worker, payload []byte) (*oip.DeviceResult, error) {
	req, err := oip.FromDevice(payload, w.meta)
	if err != nil {
		return nil, err
	}
	body, header, err := req.Encode()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.m.tune.inferTimeout)
	defer cancel()
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://worker/v2/models/"+w.unit.name+"/infer", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	hr.Header.Set("Content-Type", "application/octet-stream")
	hr.Header.Set(oip.HeaderLength, header)
	answer, header, err := w.do(hr)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			signal(w.hung)
		}
		return nil, err
	}
	resp, err := oip.DecodeResponse(answer, header)
	if err != nil {
		return nil, fmt.Errorf("the worker's answer: %w", err)
	}
	return oip.ToDevice(resp)
}

// expand returns the output topic for an input, "" if the binding has none. It refuses topics that are not for results.
func expand(b *longshorepb.ModelBinding, input string) (string, error) {
	if b.GetOutput() == "" {
		return "", nil
	}
	out, err := fill(b.GetOutput(), captures(b.GetInput(), input))
	if err != nil {
		return "", fmt.Errorf("output %q of the binding: %w", b.GetOutput(), err)
	}
	if err := topic.ValidName(out); err != nil {
		return "", fmt.Errorf("output of the binding: %w", err)
	}
	if out[0] == '$' || strings.HasPrefix(out, topic.Root) {
		return "", fmt.Errorf("output %q of the binding is not a topic for results", out)
	}
	if topic.Match(b.GetInput(), out) {
		return "", fmt.Errorf("output %q of the binding is one of its own inputs %q", out, b.GetInput())
	}
	return out, nil
}

// captures returns what each '+' of a filter matched in a name.
func captures(filter, name string) []string {
	var out []string
	levels := strings.Split(name, "/")
	for i, l := range strings.Split(filter, "/") {
		if l == "+" && i < len(levels) {
			out = append(out, levels[i])
		}
	}
	return out
}

// fill replaces {1}, {2}… by values; other braces stay as they are.
func fill(template string, values []string) (string, error) {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(template, "{")
		b.WriteString(before)
		if !ok {
			return b.String(), nil
		}
		digits, after, ok := strings.Cut(rest, "}")
		n, err := strconv.Atoi(digits)
		if !ok || err != nil {
			b.WriteByte('{')
			template = rest
			continue
		}
		if n < 1 || n > len(values) {
			return "", fmt.Errorf("{%d} stands for nothing: the input has %d '+'", n, len(values))
		}
		b.WriteString(values[n-1])
		template = after
	}
}

// errorTopic returns where errors go, "" if nowhere.
func errorTopic(b *longshorepb.ModelBinding, output, input string) string {
	first := output
	if first == "" {
		first = input
	}
	i := slices.IndexFunc([]string{first + errorSuffix, errorRoot + input}, func(t string) bool {
		return topic.ValidName(t) == nil && t[0] != '$' && !strings.HasPrefix(t, topic.Root) && !topic.Match(b.GetInput(), t)
	})
	switch i {
	case 0:
		return first + errorSuffix
	case 1:
		return errorRoot + input
	}
	return ""
}
