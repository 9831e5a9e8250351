package infer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
)

const (
	// oomScore makes the kernel end a worker before the agent when memory runs out.
	oomScore = "500"
	// maxAnswer bounds what the manager itself reads of an answer of a worker.
	maxAnswer = 16 << 20
)

// worker is one process. It ends with the agent: its stdin closes, and the kernel kills it when the thread that started it
// is gone.
type worker struct {
	unit   unit
	log    *slog.Logger
	socket string
	pid    int
	client *http.Client // of bindings and probes, which don't wait behind the front door
	relay  *relay       // of the front door
	count  *counters

	ready  chan struct{} // closed when the worker said that it is ready
	exited chan struct{} // closed when the process is reaped
	hung   chan struct{} // 1-slot: an inference took too long

	outcome  outcome // written before exited is closed
	stderr   tail
	resident atomic.Int64
	engine   string       // written before ready is closed
	meta     oip.Metadata // written before the worker is handed out

	mu       sync.Mutex // guards the fields below
	inflight int
	retired  bool
	idle     chan struct{} // closed when retired and nothing is under way
}

// outcome of a process.
type outcome struct {
	err  error    // of Wait
	said *failure // what it printed before it ended
}

// statement is a line of JSON that a worker prints.
type statement struct {
	Ready         bool   `json:"ready"`
	Engine        string `json:"engine"`
	EngineVersion string `json:"engineVersion"`
	Reason        string `json:"reason"`
	Message       string `json:"message"`
}

// startWorker starts the process; it is not ready yet.
func (m *Manager) startWorker(u unit, count *counters) (*worker, error) {
	socket := filepath.Join(m.sockets, strconv.FormatUint(m.serial.Add(1), 10)+".sock")
	w := &worker{
		unit: u, socket: socket, count: count,
		log:   m.log.With("model", u.namespace+"/"+u.name, "version", u.version),
		ready: make(chan struct{}), exited: make(chan struct{}), hung: make(chan struct{}, 1), idle: make(chan struct{}),
	}
	dialer := &net.Dialer{}
	w.client = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
		IdleConnTimeout: keepAlive, DisableCompression: true,
	}}
	w.relay = newRelay(w, &m.buffers)
	args := []string{
		"--model", m.files.path(u.digest), "--format", "onnx", "--name", u.name, "--version", u.version, "--socket", socket,
		"--engine", u.engine, "--memory-limit", strconv.FormatInt(u.memory, 10), "--threads", "1",
	}
	if m.engines.ort && m.engines.library != "" {
		args = append(args, "--ort-library", m.engines.library)
	}
	cmd := exec.Command(m.cfg.Worker, args...)
	cmd.Env = workerEnv()
	cmd.Dir = m.sockets
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdout = &lines{each: w.statement}
	cmd.Stderr = &lines{each: w.complaint}
	if _, err := cmd.StdinPipe(); err != nil { // closed by Wait
		return nil, fmt.Errorf("make the worker's stdin: %w", err)
	}
	started := make(chan error)
	go func() {
		// The parent-death signal comes when this thread ends, so it must be there as long as the worker is.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		w.outcome.err = cmd.Wait()
		close(w.exited)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start the worker (models.worker): %w", err)
	}
	w.pid = cmd.Process.Pid
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", w.pid), []byte(oomScore), 0); err != nil {
		w.log.Debug("worker keeps the agent's place in the kernel's out-of-memory order", "error", err)
	}
	w.log.Debug("worker started", "pid", w.pid, "engine", u.engine)
	return w, nil
}

// workerEnv passes on what a worker may need, and nothing that could be a secret of the agent's.
func workerEnv() []string {
	var env []string
	for _, key := range []string{"PATH", "HOME", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "LONGSHORE_CACHE", "LONGSHORE_ORT", "GOCOVERDIR"} {
		if v, ok := os.LookupEnv(key); ok {
			env = append(env, key+"="+v)
		}
	}
	return env
}

// statement takes a line of stdout.
func (w *worker) statement(line []byte) {
	var s statement
	if err := json.Unmarshal(line, &s); err != nil {
		w.complaint(line)
		return
	}
	switch {
	case s.Ready:
		select {
		case <-w.ready:
		default:
			w.engine = strings.TrimSpace(s.Engine + " " + s.EngineVersion)
			close(w.ready)
		}
	case s.Reason != "":
		w.outcome.said = &failure{s.Reason, s.Message}
	}
}

// complaint takes a line of stderr.
func (w *worker) complaint(line []byte) {
	w.stderr.add(string(line))
	w.log.Debug("worker says", "line", string(line))
}

// ended says why the process is gone; only after exited.
func (w *worker) ended() *failure {
	var exit *exec.ExitError
	if w.outcome.said != nil && errors.As(w.outcome.err, &exit) && exit.ExitCode() > 0 {
		return w.outcome.said
	}
	message := "the worker ended by itself"
	if w.outcome.err != nil {
		message = "the worker ended: " + w.outcome.err.Error()
	}
	if said := w.stderr.String(); said != "" {
		message += ": " + said
	}
	return &failure{reasonCrashed, message}
}

// acquire books a request under way; it fails when the worker was retired.
func (w *worker) acquire() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.retired {
		return false
	}
	w.inflight++
	return true
}

func (w *worker) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.inflight--; w.inflight == 0 && w.retired {
		close(w.idle)
	}
}

// retire refuses new requests; idle closes when those under way are done.
func (w *worker) retire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.retired {
		return
	}
	w.retired = true
	if w.inflight == 0 {
		close(w.idle)
	}
}

// stop ends the process with SIGTERM, and with SIGKILL after grace or for what is left of its group. It returns when it is
// reaped.
func (w *worker) stop(grace time.Duration) {
	select {
	case <-w.exited:
	default:
		if grace > 0 && syscall.Kill(w.pid, syscall.SIGTERM) == nil {
			timer := time.NewTimer(grace)
			select {
			case <-w.exited:
			case <-timer.C:
			}
			timer.Stop()
		}
	}
	if err := syscall.Kill(-w.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		w.log.Warn("kill worker", "pid", w.pid, "error", err)
	}
	<-w.exited
	w.client.CloseIdleConnections()
	w.relay.end()
	if err := os.Remove(w.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		w.log.Debug("remove socket of worker", "error", err)
	}
}

// get fetches a path of the worker's protocol, beside the requests under way.
func (w *worker) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://worker"+path, nil)
	if err != nil {
		return nil, err
	}
	body, _, err := w.do(req)
	return body, err
}

// do sends a request, and returns a successful answer's body and the size of its JSON part.
func (w *worker) do(req *http.Request) (body []byte, header string, err error) {
	resp, err := w.client.Do(req)
	if err != nil {
		return nil, "", &transportError{err}
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, "", &transportError{err}
	}
	if len(body) > maxAnswer {
		return nil, "", fmt.Errorf("the answer is larger than %d bytes", maxAnswer)
	}
	if resp.StatusCode != http.StatusOK {
		var e oip.Error
		if json.Unmarshal(body, &e) == nil && e.Error != "" {
			return nil, "", errors.New(e.Error)
		}
		return nil, "", fmt.Errorf("the worker answered %s", resp.Status)
	}
	return body, resp.Header.Get(oip.HeaderLength), nil
}

// transportError says that the worker did not answer, or not to the end.
type transportError struct{ err error }

func (e *transportError) Error() string { return "the worker did not answer: " + e.err.Error() }
func (e *transportError) Unwrap() error { return e.err }

// measure reads the resident memory of the process in bytes (proc_pid_statm(5)); 0 when it is gone.
func (w *worker) measure() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", w.pid))
	if err != nil {
		return 0
	}
	f := bytes.Fields(b)
	if len(f) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(string(f[1]), 10, 64)
	if err != nil {
		return 0
	}
	n := pages * int64(os.Getpagesize())
	w.resident.Store(n)
	return n
}

// maxLine bounds a line of a worker's output; the rest of a longer one is dropped.
const maxLine = 16 << 10

// lines is a writer that hands on each line. exec calls it from one goroutine.
type lines struct {
	each func([]byte)
	rest []byte
}

func (l *lines) Write(p []byte) (int, error) {
	n := len(p)
	for {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			l.keep(p)
			return n, nil
		}
		l.keep(p[:i])
		if len(l.rest) > 0 {
			l.each(l.rest)
		}
		l.rest = l.rest[:0]
		p = p[i+1:]
	}
}

func (l *lines) keep(p []byte) {
	l.rest = append(l.rest, p[:min(len(p), maxLine-len(l.rest))]...)
}

// tail keeps the last lines of stderr, shortened, for the message about a crash.
type tail struct {
	mu    sync.Mutex
	lines []string
}

const (
	tailLines = 4
	tailWidth = 300
)

func (t *tail) add(line string) {
	if len(line) > tailWidth {
		line = strings.ToValidUTF8(line[:tailWidth], "") + "…"
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.lines) == tailLines {
		t.lines = slices.Delete(t.lines, 0, 1)
	}
	t.lines = append(t.lines, strings.ToValidUTF8(line, "?"))
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.lines, " | ")
}
