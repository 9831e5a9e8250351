package infer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// KV keeps small values durably (implemented by desired.Store). Get returns nil for a missing key.
type KV interface {
	Get(key string) ([]byte, error)
	Put(key string, value []byte) error
	Delete(key string) error
}

// Fetcher opens a model file at an offset (an HTTP range request to the hub; implemented by edgehub/internal/uplink).
// It fails at once with a clear error when there is no link.
type Fetcher interface {
	Fetch(ctx context.Context, digest string, offset int64) (io.ReadCloser, error)
}

// Config of a Manager. Zero values mean the default in parentheses.
type Config struct {
	Logger *slog.Logger
	// Dir for model files and sockets.
	Dir string
	// Worker is the path of the worker binary (longshore-worker beside the agent's own binary).
	Worker string
	// ORTLibrary is the path of libonnxruntime.so.1 ("" = search the usual places).
	ORTLibrary string
	// DiskQuota for model files in bytes (2 GiB), DownloadRate in bytes per second (0 = unlimited).
	DiskQuota, DownloadRate int64
	// MemoryLimit of a worker in bytes where the model names none (512 MiB).
	MemoryLimit int64
	KV          KV
	// Fetcher may be nil: then only files that are here already are served.
	Fetcher Fetcher
	// Publish sends a result (or error) to the edge's broker; Append puts one into a telemetry stream, durably. Either may
	// be nil where no binding needs it.
	Publish func(ctx context.Context, topic string, payload []byte) error
	Append  func(ctx context.Context, stream, topic string, payload []byte) error
	// Arch of this machine (runtime.GOARCH).
	Arch string
}

// tuning holds the times and counts of supervision. They are not configuration: one set fits every edge.
type tuning struct {
	loadTimeout       time.Duration // for a worker to load and warm up
	probeEvery        time.Duration
	probeTimeout      time.Duration
	probeFailures     int // in a row make a worker hung
	memoryEvery       time.Duration
	probation         time.Duration // of healthy serving until a version is the last good one
	failures          int           // in a row until a new version is given up
	backoffMin        time.Duration // of restarts
	backoffMax        time.Duration
	drain             time.Duration // for requests under way when a worker is replaced
	drainShutdown     time.Duration // and when the agent ends
	term              time.Duration // between SIGTERM and SIGKILL
	inferTimeout      time.Duration // of a binding's inference; past it the worker counts as hung
	fetchMin          time.Duration // backoff of downloads
	fetchMax          time.Duration
	fetchStall        time.Duration // without a byte until a download is tried anew
	retryAfterRestart time.Duration // from the agent's start until a version that failed earlier is tried again
	resync            time.Duration
	queue             int // messages waiting per model
}

func defaultTuning() tuning {
	return tuning{
		loadTimeout: 3 * time.Minute, probeEvery: 2 * time.Second, probeTimeout: 5 * time.Second, probeFailures: 2,
		memoryEvery: 250 * time.Millisecond, probation: 10 * time.Second, failures: 3,
		backoffMin: time.Second, backoffMax: 5 * time.Minute,
		drain: 30 * time.Second, drainShutdown: 2 * time.Second, term: 3 * time.Second, inferTimeout: 30 * time.Second,
		fetchMin: time.Second, fetchMax: 5 * time.Minute, fetchStall: time.Minute,
		retryAfterRestart: 10 * time.Minute, resync: 10 * time.Second, queue: 256,
	}
}

// Manager downloads, stages, serves, supervises and falls back, level-triggered. Safe for concurrent use.
//
// A new version is loaded in a worker beside the one that serves, and takes over when it answered a warm-up. It becomes
// the last good version, durably, after ten seconds of healthy serving. When a new version fails three times in a row
// (while it loads, or within those ten seconds after it took over), the manager goes back to the last good version and
// leaves the new one alone until its spec changes; after a restart of the agent it is tried once more, ten minutes later,
// beside the version that serves. Where nothing good is left to go back to, tries go on with backoff.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	tune    tuning
	engines engines
	memory  int64 // of this machine, in bytes
	files   *files
	durable *durable
	sockets string // directory
	started time.Time

	wake    chan struct{}
	changed chan struct{}
	serial  atomic.Uint64 // of sockets
	buffers bufferPool
	routes  atomic.Pointer[[]route]

	collecting sync.Mutex // held while files are removed
	routing    sync.Mutex // held while routes are gathered

	mu     sync.Mutex        // guards the fields below; taken before any model's
	models map[string]*model // by "namespace/name"
	told   bool              // SetDesired was called
}

// New checks the configuration and looks at what is on disk. It starts nothing.
func New(cfg Config) (*Manager, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Dir == "" || cfg.KV == nil {
		return nil, errors.New("models: a directory and a store are needed")
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("model directory: %w", err)
	}
	cfg.Dir = dir
	if cfg.Worker == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find the worker binary (set models.worker): %w", err)
		}
		cfg.Worker = filepath.Join(filepath.Dir(self), "longshore-worker")
	}
	if cfg.DiskQuota == 0 {
		cfg.DiskQuota = 2 << 30
	}
	if cfg.MemoryLimit == 0 {
		cfg.MemoryLimit = 512 << 20
	}
	if cfg.Arch == "" {
		cfg.Arch = runtime.GOARCH
	}
	m := &Manager{
		cfg: cfg, log: cfg.Logger, tune: defaultTuning(), started: time.Now(),
		engines: findEngines(cfg), memory: machineMemory(),
		wake: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		models: map[string]*model{},
	}
	if m.files, err = openFiles(filepath.Join(dir, "files"), cfg.DiskQuota, cfg.DownloadRate); err != nil {
		return nil, err
	}
	if m.durable, err = openDurable(cfg.KV, cfg.Logger); err != nil {
		return nil, err
	}
	if m.sockets, err = socketDir(filepath.Join(dir, "run")); err != nil {
		return nil, err
	}
	return m, nil
}

// maxSocketPath is what fits into sockaddr_un with its final zero (unix(7)).
const maxSocketPath = 107

// socketDir empties dir and returns it, or another directory where the names of sockets below dir would be too long.
func socketDir(dir string) (string, error) {
	if err := os.RemoveAll(dir); err != nil {
		return "", fmt.Errorf("remove old sockets of workers: %w", err)
	}
	if len(filepath.Join(dir, "999999.sock")) > maxSocketPath {
		short, err := os.MkdirTemp("", "longshore-")
		if err != nil {
			return "", fmt.Errorf("make a directory for sockets of workers (%s is too long for them): %w", dir, err)
		}
		return short, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the directory for sockets of workers: %w", err)
	}
	return dir, nil
}

// Run works until ctx ends, then stops every worker and returns nil. It can be called once.
func (m *Manager) Run(ctx context.Context) error {
	defer os.RemoveAll(m.sockets)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		m.mu.Lock()
		for _, s := range m.models {
			if !s.running {
				s.running = true
				wg.Go(func() { s.run(ctx) })
			}
		}
		m.mu.Unlock()
		m.collect(func() {})
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		}
	}
}

// SetDesired tells all models this edge should serve, as the committed list has them. A model that is not among them any
// more is ended, and its files are removed.
func (m *Manager) SetDesired(models []*longshorepb.Model) {
	want := map[string]*want{}
	for _, spec := range models {
		want[modelKey(spec)] = newWant(spec)
	}
	m.mu.Lock()
	for key, w := range want {
		s := m.models[key]
		if s == nil {
			s = newModel(m, key, w.spec)
			m.models[key] = s
		}
		s.setWant(w)
	}
	for key, s := range m.models {
		if want[key] == nil {
			s.setWant(nil)
		}
	}
	m.told = true
	m.mu.Unlock()
	m.updateRoutes()
	m.durable.retain(func(key string) bool { return want[key] != nil })
	signal(m.wake)
	signal(m.changed)
}

// Reports returns the state of every desired model, sorted by namespace and name.
func (m *Manager) Reports() []*longshorepb.ModelReport {
	var out []*longshorepb.ModelReport
	for _, s := range m.all() {
		if r := s.currentReport(); r != nil {
			out = append(out, r)
		}
	}
	return out
}

// Changed is a 1-slot signal: Reports changed, look again.
func (m *Manager) Changed() <-chan struct{} { return m.changed }

// LinkUp tells that fetching may work again: failed downloads are retried now.
func (m *Manager) LinkUp() {
	for _, s := range m.all() {
		signal(s.linkUp)
	}
}

// ModelMetrics counts for one model since the agent's start.
type ModelMetrics struct {
	Namespace, Name string
	// Inferences answered, through the front door and bindings; Errors are those that failed, bad payloads included.
	Inferences, Errors uint64
	// Restarts of workers after they failed in any way.
	Restarts uint64
	// QueueDrops counts messages a full queue did not take; Queued wait now.
	QueueDrops uint64
	Queued     int
	// WorkerMemory is the resident memory of the serving worker in bytes.
	WorkerMemory int64
	// Ready: a worker serves.
	Ready bool
}

// Metrics of every model, sorted by namespace and name.
func (m *Manager) Metrics() []ModelMetrics {
	var out []ModelMetrics
	for _, s := range m.all() {
		out = append(out, s.metrics())
	}
	return out
}

// DiskUsage returns the bytes that model files take, partial ones included, and the quota.
func (m *Manager) DiskUsage() (used, quota int64) { return m.files.usage(), m.cfg.DiskQuota }

// all models, sorted by namespace and name.
func (m *Manager) all() []*model {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*model, 0, len(m.models))
	for _, s := range m.models {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *model) int {
		if c := strings.Compare(a.namespace, b.namespace); c != 0 {
			return c
		}
		return strings.Compare(a.name, b.name)
	})
	return out
}

// forget drops a model that ended because nobody wants it; it reports false if somebody wants it again.
func (m *Manager) forget(s *model) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.wanted() != nil {
		return false
	}
	delete(m.models, s.key)
	signal(m.wake)
	return true
}

// collect removes the files that no model needs, after a change of these needs; nothing before every model said what it
// needs. A model that looks for a file after its change finds it, or it was not there.
func (m *Manager) collect(change func()) {
	m.collecting.Lock()
	defer m.collecting.Unlock()
	change()
	keep := map[string]bool{}
	m.mu.Lock()
	ready := m.told
	for _, s := range m.models {
		needs, known := s.currentNeeds()
		ready = ready && known
		for _, d := range needs {
			keep[d] = true
		}
	}
	m.mu.Unlock()
	if !ready {
		return
	}
	if err := m.files.collect(keep); err != nil {
		m.log.Warn("remove model files nobody needs", "error", err)
	}
}

func modelKey(spec *longshorepb.Model) string { return spec.GetNamespace() + "/" + spec.GetName() }

// failure says why something does not work, for reports.
type failure struct {
	reason  string // CamelCase
	message string
}

func (f *failure) Error() string { return f.reason + ": " + f.message }

// Reasons in reports.
const (
	reasonNoVariant      = "NoVariant"
	reasonNoEngine       = "NoEngine"
	reasonFetchFailed    = "FetchFailed"
	reasonSizeMismatch   = "SizeMismatch"
	reasonDigestMismatch = "DigestMismatch"
	reasonDiskQuota      = "DiskQuota"
	reasonDiskFull       = "DiskFull"
	reasonDisk           = "DiskError"
	reasonLoading        = "Loading"
	reasonRestarting     = "Restarting"
	reasonLoadFailed     = "LoadFailed"
	reasonOutOfMemory    = "OutOfMemory"
	reasonCrashed        = "Crashed"
	reasonHung           = "Hung"
	reasonRolledBack     = "RolledBack"
	reasonStore          = "StoreFailed"
)

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// want is a desired spec and its identity.
type want struct {
	spec *longshorepb.Model
	hash string
}

func newWant(spec *longshorepb.Model) *want {
	spec = proto.Clone(spec).(*longshorepb.Model)
	return &want{spec: spec, hash: specHash(spec)}
}
