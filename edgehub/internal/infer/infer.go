package infer

import (
	"context"
	"io"
	"log/slog"
	"net/http"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// KV keeps small values durably (implemented by desired.Store).
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
	Fetcher     Fetcher
	// Publish sends a result (or error) to the edge's broker; Append puts one into a telemetry stream, durably.
	Publish func(ctx context.Context, topic string, payload []byte) error
	Append  func(ctx context.Context, stream, topic string, payload []byte) error
	// Arch of this machine (runtime.GOARCH).
	Arch string
}

// Manager downloads, stages, serves, supervises and falls back, level-triggered. Safe for concurrent use.
type Manager struct{}

// New checks the configuration and looks at what is on disk. It starts nothing.
func New(cfg Config) (*Manager, error) { panic("TODO") }

// Run works until ctx ends, then stops every worker and returns nil.
func (m *Manager) Run(ctx context.Context) error { panic("TODO") }

// SetDesired tells all models this edge should serve, as the committed list has them.
func (m *Manager) SetDesired(models []*longshorepb.Model) { panic("TODO") }

// Reports returns the state of every desired model, sorted by namespace and name.
func (m *Manager) Reports() []*longshorepb.ModelReport { panic("TODO") }

// Changed is a 1-slot signal: Reports changed, look again.
func (m *Manager) Changed() <-chan struct{} { panic("TODO") }

// LinkUp tells that fetching may work again: failed downloads are retried now.
func (m *Manager) LinkUp() { panic("TODO") }

// Handler serves the Open Inference Protocol v2: /v2, /v2/health/live, /v2/health/ready, /v2/models/{name}[/versions/{v}]
// [/ready|/infer]. {name} is "name" where it is unique and "namespace.name" always.
func (m *Manager) Handler() http.Handler { panic("TODO") }

// Message offers a device's message to the bindings; it returns at once. A full queue drops the message and counts it.
func (m *Manager) Message(topic string, payload []byte) { panic("TODO") }
