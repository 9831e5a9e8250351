package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/longshore-edge/longshore/edgehub/internal/infer"
)

// shutdownGrace bounds the wait for requests under way when the agent stops.
const shutdownGrace = 2 * time.Second

// fetcher lets models download through the uplink, which is made after them.
type fetcher struct{ a *agent }

var _ infer.Fetcher = fetcher{}

// Fetch implements infer.Fetcher.
func (f fetcher) Fetch(ctx context.Context, digest string, offset int64) (io.ReadCloser, error) {
	return f.a.uplink.Fetch(ctx, digest, offset)
}

// publicDoor is the HTTP door of the box: inference, health, metrics and status. None of it shows a secret.
func (a *agent) publicDoor() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/v2", a.models.Handler())
	mux.Handle("/v2/", a.models.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", a.serveReady)
	mux.HandleFunc("GET /status", a.serveStatus)
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics(), promhttp.HandlerOpts{}))
	return mux
}

// controlDoor is what the commands ask over the Unix socket, which only the agent's user may open.
func (a *agent) controlDoor() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics(), promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /status", a.serveStatus)
	mux.HandleFunc("GET /config", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, a.cfg) })
	mux.HandleFunc("GET /logs", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(a.logs.Bytes()) })
	mux.HandleFunc("GET /goroutines", func(w http.ResponseWriter, _ *http.Request) {
		_ = pprof.Lookup("goroutine").WriteTo(w, 1) // the other end may be gone
	})
	return mux
}

// serveReady answers 200 when the edge does its work on this box: its state folder is there, desired state can be read, and the disk
// takes telemetry. A missing link is no reason not to be ready: working on without one is what the agent is for.
func (a *agent) serveReady(w http.ResponseWriter, _ *http.Request) {
	if err := stateDir(a.cfg.State).held(a.lock); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	if err := a.outbox.Failing(); err != nil {
		http.Error(w, "telemetry: "+explainDisk(err).Error(), http.StatusServiceUnavailable)
		return
	}
	if _, err := a.store.Get("ready"); err != nil {
		http.Error(w, "desired state: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

func (a *agent) serveStatus(w http.ResponseWriter, _ *http.Request) { writeJSON(w, a.status()) }

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // the other end may be gone
}

// serveHTTP serves until ctx ends.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	// ctx is over already: the grace has a time of its own.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if err := s.Shutdown(grace); err != nil {
		_ = s.Close() // cuts what is left
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
