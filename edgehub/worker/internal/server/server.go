// Package server serves one model by the Open Inference Protocol v2.
package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync/atomic"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// Config of a Server.
type Config struct {
	Logger *slog.Logger
	// Name and Version of the model, as clients spell them.
	Name, Version string
	// MaxRequest bounds the body of a request, in bytes.
	MaxRequest int64
	// MaxConcurrent bounds the requests under way; one more is answered 503 at once.
	MaxConcurrent int
	// WorkerVersion is what GET /v2 tells.
	WorkerVersion string
}

// Server is an http.Handler. Until SetSession it is live and not ready.
type Server struct {
	cfg    Config
	mux    *http.ServeMux
	slots  chan struct{}
	loaded atomic.Pointer[loaded]
}

type loaded struct {
	session engine.Session
	meta    oip.Metadata
}

// New makes a server without a model.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, mux: http.NewServeMux(), slots: make(chan struct{}, cfg.MaxConcurrent)}
	s.mux.HandleFunc("GET /v2", s.server)
	s.mux.HandleFunc("GET /v2/health/live", s.live)
	s.mux.HandleFunc("GET /v2/health/ready", s.ready)
	for _, model := range []string{"/v2/models/{model}", "/v2/models/{model}/versions/{version}"} {
		s.mux.HandleFunc("GET "+model, s.named(s.metadata))
		s.mux.HandleFunc("GET "+model+"/ready", s.named(s.modelReady))
		s.mux.HandleFunc("POST "+model+"/infer", s.named(s.infer))
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, fmt.Errorf("there is no %s %s in the Open Inference Protocol v2", r.Method, r.URL.Path))
	})
	return s
}

// Metadata describes a session as clients see it.
func (s *Server) Metadata(session engine.Session) oip.Metadata {
	return oip.Metadata{Name: s.cfg.Name, Versions: []string{s.cfg.Version}, Platform: "onnx_onnxv1",
		Inputs: session.Inputs(), Outputs: session.Outputs()}
}

// SetSession makes the server ready. Only the first call counts.
func (s *Server) SetSession(session engine.Session) {
	s.loaded.CompareAndSwap(nil, &loaded{session: session, meta: s.Metadata(session)})
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

func (s *Server) server(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, oip.ServerMetadata{Name: "longshore-worker", Version: s.cfg.WorkerVersion, Extensions: []string{oip.BinaryExtension}})
}

func (s *Server) live(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, map[string]bool{"live": true})
}

func (s *Server) ready(w http.ResponseWriter, _ *http.Request) {
	ready := s.loaded.Load() != nil
	reply(w, readyStatus(ready), map[string]bool{"live": true, "ready": ready})
}

func (s *Server) modelReady(w http.ResponseWriter, _ *http.Request) {
	ready := s.loaded.Load() != nil
	reply(w, readyStatus(ready), map[string]any{"name": s.cfg.Name, "ready": ready})
}

func readyStatus(ready bool) int {
	if ready {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}

// named lets through only requests for the model served here.
func (s *Server) named(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if name := r.PathValue("model"); name != s.cfg.Name {
			fail(w, http.StatusNotFound, fmt.Errorf("there is no model %q here, only %q", name, s.cfg.Name))
			return
		}
		if v := r.PathValue("version"); v != "" && v != s.cfg.Version {
			fail(w, http.StatusNotFound, fmt.Errorf("model %q has no version %q here, only %q", s.cfg.Name, v, s.cfg.Version))
			return
		}
		next(w, r)
	}
}

var errLoading = errors.New("the model is still being loaded")

func (s *Server) metadata(w http.ResponseWriter, _ *http.Request) {
	l := s.loaded.Load()
	if l == nil {
		fail(w, http.StatusServiceUnavailable, errLoading)
		return
	}
	reply(w, http.StatusOK, l.meta)
}

func (s *Server) infer(w http.ResponseWriter, r *http.Request) {
	l := s.loaded.Load()
	if l == nil {
		fail(w, http.StatusServiceUnavailable, errLoading)
		return
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, fmt.Errorf("%d requests are under way already; try again later", s.cfg.MaxConcurrent))
		return
	}
	body, err := readBody(w, r, s.cfg.MaxRequest)
	if err != nil {
		status := http.StatusBadRequest
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			status, err = http.StatusRequestEntityTooLarge, fmt.Errorf("the request is larger than %d bytes", s.cfg.MaxRequest)
		}
		fail(w, status, err)
		return
	}
	request, err := oip.DecodeRequest(body, r.Header.Get(oip.HeaderLength))
	if err == nil {
		err = l.meta.Check(request)
	}
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	response := &oip.InferResponse{ModelName: s.cfg.Name, ModelVersion: s.cfg.Version, ID: request.ID}
	if response.Outputs, err = l.session.Run(request.Inputs, outputNames(request, &l.meta)); err != nil {
		status := http.StatusInternalServerError
		if _, ok := errors.AsType[*engine.InputError](err); ok {
			status = http.StatusBadRequest
		} else {
			s.cfg.Logger.Error("inference failed", "error", err)
		}
		fail(w, status, err)
		return
	}
	out, header, err := response.Encode(request)
	if err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if header != "" {
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set(oip.HeaderLength, header)
	}
	// A client that went away needs no answer.
	_, _ = w.Write(out)
}

// readBody reads at most limit bytes, in one piece where the client told the length.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength > limit {
		return nil, &http.MaxBytesError{Limit: limit}
	}
	if r.ContentLength >= 0 {
		body := make([]byte, r.ContentLength)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	return io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
}

func outputNames(r *oip.InferRequest, meta *oip.Metadata) []string {
	var names []string
	for _, o := range r.Outputs {
		names = append(names, o.Name)
	}
	if len(names) == 0 {
		for _, o := range meta.Outputs {
			names = append(names, o.Name)
		}
	}
	return names
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// A client that went away needs no answer.
	_ = json.NewEncoder(w).Encode(v)
}

func fail(w http.ResponseWriter, status int, err error) {
	reply(w, status, oip.Error{Error: err.Error()})
}
