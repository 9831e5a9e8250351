package infer

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
)

// Handler serves the Open Inference Protocol v2: /v2, /v2/health/live, /v2/health/ready, /v2/models/{name}[/versions/{v}]
// [/ready|/infer]. {name} is "name" where it is unique and "namespace.name" always. Everything that goes to a model is passed
// on to its worker; while a new version takes over, each request is answered by one of the two.
func (m *Manager) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusOK, oip.ServerMetadata{Name: "longshore", Extensions: []string{oip.BinaryExtension}})
	})
	mux.HandleFunc("GET /v2/health/live", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusOK, map[string]bool{"live": true})
	})
	mux.HandleFunc("GET /v2/health/ready", m.allReady)
	mux.HandleFunc("GET /v2/models/{name}", m.pass(""))
	mux.HandleFunc("GET /v2/models/{name}/versions/{version}", m.pass(""))
	mux.HandleFunc("POST /v2/models/{name}/infer", m.pass("/infer"))
	mux.HandleFunc("POST /v2/models/{name}/versions/{version}/infer", m.pass("/infer"))
	mux.HandleFunc("GET /v2/models/{name}/ready", m.modelReady)
	mux.HandleFunc("GET /v2/models/{name}/versions/{version}/ready", m.modelReady)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, http.StatusNotFound, fmt.Sprintf("%s %s is not part of the Open Inference Protocol", r.Method, r.URL.Path))
	})
	return mux
}

// allReady answers 200 if every desired model serves.
func (m *Manager) allReady(w http.ResponseWriter, r *http.Request) {
	var lacking []string
	for _, s := range m.all() {
		if s.wanted() == nil {
			continue
		}
		worker, err := s.take()
		if err != nil {
			lacking = append(lacking, err.Error())
			continue
		}
		worker.release()
	}
	if len(lacking) > 0 {
		writeError(w, http.StatusServiceUnavailable, strings.Join(lacking, "; "))
		return
	}
	writeJSON(w, http.StatusOK, map[string]bool{"ready": true})
}

func (m *Manager) modelReady(w http.ResponseWriter, r *http.Request) {
	worker, ok := m.takeFor(w, r)
	if !ok {
		return
	}
	worker.release()
	writeJSON(w, http.StatusOK, map[string]any{"name": r.PathValue("name"), "ready": true})
}

// pass hands a request on to the worker of its model, under the name by which the worker knows it.
func (m *Manager) pass(suffix string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		worker, ok := m.takeFor(w, r)
		if !ok {
			return
		}
		defer worker.release()
		worker.relay.serve(w, r, suffix)
	}
}

// takeFor acquires the worker that a request names, or answers why there is none.
func (m *Manager) takeFor(w http.ResponseWriter, r *http.Request) (*worker, bool) {
	s, err := m.find(r.PathValue("name"))
	if err != nil {
		writeError(w, http.StatusNotFound, err.Error())
		return nil, false
	}
	worker, err := s.take()
	if err != nil {
		w.Header().Set("Retry-After", "1")
		writeError(w, http.StatusServiceUnavailable, err.Error())
		return nil, false
	}
	if v := r.PathValue("version"); v != "" && v != worker.unit.version {
		worker.release()
		writeError(w, http.StatusNotFound, fmt.Sprintf("version %q of model %s/%s is not served here, version %q is", v, s.namespace, s.name, worker.unit.version))
		return nil, false
	}
	return worker, true
}

// find returns the wanted model of a name in a path.
func (m *Manager) find(name string) (*model, error) {
	var found []*model
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.models {
		if s.wanted() == nil {
			continue
		}
		if s.namespace+"."+s.name == name {
			return s, nil
		}
		if s.name == name {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no model %q on this edge", name)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("several namespaces have a model %q; write NAMESPACE.%s", name, name)
}

// take acquires the serving worker; release it. The error says why there is none.
func (s *model) take() (*worker, error) {
	s.mu.Lock()
	r := s.serving
	s.mu.Unlock()
	if r != nil {
		if w := r.state().worker; w != nil && w.acquire() {
			return w, nil
		}
		// The version was replaced between the two steps: the next one is there already.
		s.mu.Lock()
		next := s.serving
		s.mu.Unlock()
		if next != nil && next != r {
			if w := next.state().worker; w != nil && w.acquire() {
				return w, nil
			}
		}
	}
	report := s.currentReport()
	state := strings.ToLower(strings.TrimPrefix(report.GetState().String(), "MODEL_STATE_"))
	text := fmt.Sprintf("model %s/%s is not ready: version %s is %s", s.namespace, s.name, report.GetDesiredVersion(), state)
	if report.GetReason() != "" {
		text += ", " + report.GetReason()
	}
	if report.GetMessage() != "" {
		text += ": " + report.GetMessage()
	}
	return nil, errors.New(text)
}

func writeError(w http.ResponseWriter, code int, text string) {
	writeJSON(w, code, oip.Error{Error: text})
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that is gone can't be told.
	_, _ = w.Write(append(b, '\n'))
}
