package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine/gomlx"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine/ort"
	"github.com/longshore-edge/longshore/edgehub/worker/internal/server"
)

// config is what the command line says.
type config struct {
	model, format, name, version, socket string
	engine, ortLibrary                   string
	memoryLimit, maxRequest              int64
	threads                              int
}

const (
	maxConcurrent = 16
	// stopGrace is how long requests under way may take after the worker was told to stop.
	stopGrace = 5 * time.Second
)

// failure is an end for a reason that the agent reports: one line of JSON on standard output, then exitFailed.
type failure struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (f *failure) Error() string { return f.Reason + ": " + f.Message }

// Reasons of a failure.
const (
	loadFailed  = "LoadFailed"
	noEngine    = "NoEngine"
	outOfMemory = "OutOfMemory"
)

// readiness is the line on standard output that says that the model serves.
type readiness struct {
	Ready         bool   `json:"ready"`
	Engine        string `json:"engine"`
	EngineVersion string `json:"engineVersion"`
}

// run serves the model until ctx ends. report gets the lines meant for the agent.
func run(ctx context.Context, cfg config, log *slog.Logger, report io.Writer) error {
	listener, err := listen(cfg.socket)
	if err != nil {
		return err
	}
	handler := server.New(server.Config{Logger: log, Name: cfg.name, Version: cfg.version, MaxRequest: cfg.maxRequest,
		MaxConcurrent: maxConcurrent, WorkerVersion: buildVersion()})
	front := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn)}

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := front.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", cfg.socket, err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
		defer cancel()
		if err := front.Shutdown(grace); err != nil {
			return front.Close()
		}
		return nil
	})
	group.Go(func() error { return asFailure(watchMemory(ctx, cfg.memoryLimit)) })
	group.Go(func() error { return serveModel(ctx, cfg, log, handler, report) })
	return group.Wait()
}

// listen opens the socket; one left behind by a worker that was killed is replaced.
func listen(socket string) (net.Listener, error) {
	if info, err := os.Lstat(socket); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(socket); err != nil {
			return nil, fmt.Errorf("remove old socket: %w", err)
		}
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

// serveModel loads the model, tries it, and serves it until ctx ends. An engine can't be interrupted while it loads: if
// ctx ends meanwhile, that goroutine is left behind, and the process ends.
func serveModel(ctx context.Context, cfg config, log *slog.Logger, handler *server.Server, report io.Writer) error {
	began := time.Now()
	type result struct {
		engine  engine.Engine
		session engine.Session
		err     error
	}
	done := make(chan result, 1)
	go func() {
		e, session, err := load(cfg, log)
		if err == nil {
			err = engine.WarmUp(session)
		}
		done <- result{e, session, err}
	}()
	var r result
	select {
	case <-ctx.Done():
		return nil
	case r = <-done:
	}
	if r.err != nil {
		return asFailure(r.err)
	}
	debug.FreeOSMemory()
	handler.SetSession(r.session)
	name, version := r.engine.Name(), r.engine.Version()
	log.Info("model serves", "model", cfg.name, "version", cfg.version, "engine", name, "engineVersion", version,
		"took", time.Since(began).Round(time.Millisecond))
	if err := json.NewEncoder(report).Encode(readiness{Ready: true, Engine: name, EngineVersion: version}); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

func load(cfg config, log *slog.Logger) (engine.Engine, engine.Session, error) {
	if cfg.format != "onnx" {
		return nil, nil, fmt.Errorf("format %q is not supported, only onnx", cfg.format)
	}
	info, err := os.Stat(cfg.model)
	if err != nil {
		return nil, nil, err
	}
	if info.Size() > cfg.memoryLimit {
		return nil, nil, fmt.Errorf("%w: the model file has %d MiB, the memory limit is %d MiB", engine.ErrOutOfMemory,
			info.Size()>>20, cfg.memoryLimit>>20)
	}
	e, err := openEngine(cfg, log)
	if err != nil {
		return nil, nil, err
	}
	model, err := os.ReadFile(cfg.model)
	if err != nil {
		return nil, nil, err
	}
	session, err := e.Load(model, engine.Options{Threads: cfg.threads})
	if err != nil {
		return nil, nil, fmt.Errorf("load %s with %s %s: %w", cfg.model, e.Name(), e.Version(), err)
	}
	return e, session, nil
}

// openEngine opens the engine asked for; auto means ONNX Runtime where it can be had, and GoMLX otherwise.
func openEngine(cfg config, log *slog.Logger) (engine.Engine, error) {
	openGoMLX := func() (engine.Engine, error) { return gomlx.Open() }
	openORT := func() (engine.Engine, error) {
		library, err := ort.FindLibrary(cfg.ortLibrary)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", engine.ErrNoEngine, err)
		}
		return ort.Open(library)
	}
	switch cfg.engine {
	case "onnxruntime":
		return openORT()
	case "gomlx":
		return openGoMLX()
	}
	e, errORT := openORT()
	if errORT == nil {
		return e, nil
	}
	e, err := openGoMLX()
	if err != nil {
		return nil, errors.Join(errORT, err)
	}
	log.Info("ONNX Runtime is not used", "reason", errORT)
	return e, nil
}

// asFailure gives an error the reason that the agent reports.
func asFailure(err error) error {
	if err == nil {
		return nil
	}
	reason := loadFailed
	switch {
	case errors.Is(err, engine.ErrNoEngine):
		reason = noEngine
	case errors.Is(err, engine.ErrOutOfMemory):
		reason = outOfMemory
	}
	return &failure{Reason: reason, Message: err.Error()}
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
