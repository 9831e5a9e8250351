package modelfile

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/longshore-edge/longshore/sync/durable"
)

// Reasons why a file is not ready, as Status has them.
const (
	ReasonInvalidSource  = "InvalidSource"  // the URI can't be used
	ReasonNotFound       = "NotFound"       // nothing is at the URI
	ReasonFetchFailed    = "FetchFailed"    // the source answered with an error, or not at all
	ReasonSizeMismatch   = "SizeMismatch"   // the source's file has another size
	ReasonDigestMismatch = "DigestMismatch" // the source's file has another digest
	ReasonCacheFull      = "CacheFull"      // wanted files alone exceed MaxBytes
)

// Config of a Store. Zero values mean the default in parentheses.
type Config struct {
	Logger *slog.Logger
	// Dir is the folder that relative file: URIs are below; empty refuses all file: URIs.
	Dir string
	// CacheDir keeps what was fetched over HTTP; it is made if missing.
	CacheDir string
	// MaxBytes bounds CacheDir (8 GiB). Files that nobody wants make room first, the least recently written before others.
	MaxBytes int64
	// Client fetches http and https URIs (a client that gives up on a server that sends no headers for 30 s).
	Client *http.Client
	// RetryMin and RetryMax bound the backoff between tries for one file (1 s, 2 min).
	RetryMin, RetryMax time.Duration
}

// Source says where the bytes of one digest are to be had.
type Source struct {
	// Digest is "sha256:" and 64 lower-case hexadecimal digits.
	Digest string
	// Size in bytes.
	Size int64
	// URI with scheme http, https or file.
	URI string
}

// Status of one wanted file.
type Status struct {
	Digest string
	Ready  bool
	// Done of Size bytes are here.
	Done, Size int64
	// Reason (CamelCase) and Message say why the file is not ready; both are empty before the first try ended.
	Reason, Message string
}

// Store serves model files by digest: those of Dir in place, the others fetched once into CacheDir. Safe for concurrent use.
type Store struct {
	cfg  Config
	log  *slog.Logger
	root *os.Root // of cfg.Dir; nil if none
	wake chan struct{}
	news chan struct{}

	mu      sync.Mutex
	entries map[string]*entry // by digest; wanted files only
	busy    map[string]bool   // digests being fetched or hashed, also when they are not wanted any more
}

// entry is one wanted file. Store.mu guards it.
type entry struct {
	digest  string
	sources []Source
	tries   int
	next    time.Time // no try before
	done    int64
	reason  string
	message string
	// file is set when the digest is verified.
	file *verified
}

// verified is a file whose digest was checked when it had this size and time of modification.
type verified struct {
	path   string // relative to Dir, or absolute
	inDir  bool
	size   int64
	modify time.Time
}

// New checks the configuration and opens the folders. It starts nothing.
func New(cfg Config) (*Store, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 8 << 30
	}
	if cfg.RetryMin == 0 {
		cfg.RetryMin = time.Second
	}
	if cfg.RetryMax == 0 {
		cfg.RetryMax = 2 * time.Minute
	}
	if cfg.Client == nil {
		cfg.Client = &http.Client{Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
			TLSHandshakeTimeout:   30 * time.Second,
			ResponseHeaderTimeout: 30 * time.Second,
			IdleConnTimeout:       90 * time.Second,
		}}
	}
	if cfg.CacheDir == "" {
		return nil, errors.New("model files: no cache folder configured")
	}
	if err := durable.MkdirAll(cfg.CacheDir, 0o750); err != nil {
		return nil, fmt.Errorf("make the model cache (give a folder this user may write to): %w", err)
	}
	s := &Store{
		cfg: cfg, log: cfg.Logger,
		wake: make(chan struct{}, 1), news: make(chan struct{}, 1),
		entries: map[string]*entry{}, busy: map[string]bool{},
	}
	if cfg.Dir != "" {
		abs, err := filepath.Abs(cfg.Dir)
		if err != nil {
			return nil, fmt.Errorf("model folder: %w", err)
		}
		s.cfg.Dir = abs
		s.root, err = os.OpenRoot(abs)
		if err != nil {
			return nil, fmt.Errorf("open the model folder (make it, or name another): %w", err)
		}
	}
	return s, nil
}

// Want tells all files that models name, level-triggered: what is not named any more is no longer served, and may be
// removed from the cache when room is needed. Several sources of one digest are tried in turn.
func (s *Store) Want(sources []Source) {
	by := map[string][]Source{}
	for _, src := range sources {
		if !slices.Contains(by[src.Digest], src) {
			by[src.Digest] = append(by[src.Digest], src)
		}
	}
	s.mu.Lock()
	for d, srcs := range by {
		e := s.entries[d]
		if e == nil {
			e = &entry{digest: d}
			s.entries[d] = e
		}
		if !slices.Equal(e.sources, srcs) {
			e.sources, e.tries, e.next = srcs, 0, time.Time{}
		}
	}
	for d := range s.entries {
		if by[d] == nil {
			delete(s.entries, d)
		}
	}
	s.mu.Unlock()
	signal(s.wake)
}

// Status of every wanted file, sorted by digest.
func (s *Store) Status() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Status, 0, len(s.entries))
	for _, e := range s.entries {
		st := Status{Digest: e.digest, Ready: e.file != nil, Done: e.done, Size: e.sources[0].Size}
		if st.Ready {
			st.Done = st.Size
		} else {
			st.Reason, st.Message = e.reason, e.message
		}
		out = append(out, st)
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Digest, b.Digest) })
	return out
}

// Changed is a 1-slot signal: a file became ready, or failed for another reason; look at Status again.
func (s *Store) Changed() <-chan struct{} { return s.news }

// concurrentFetches bounds how many files are fetched or hashed at a time.
const concurrentFetches = 2

// Run makes wanted files ready until ctx ends, then waits for what is under way and returns nil.
func (s *Store) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.cfg.Client.CloseIdleConnections()
	slots := make(chan struct{}, concurrentFetches)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
		}
		wait := time.Hour
		for _, e := range s.due(&wait) {
			select {
			case slots <- struct{}{}:
			default:
				s.mu.Lock()
				delete(s.busy, e.digest)
				s.mu.Unlock()
				continue // a finished try wakes the loop
			}
			wg.Go(func() {
				s.try(ctx, e)
				<-slots
				signal(s.wake)
			})
		}
		timer.Reset(wait)
	}
}

// due marks the entries to try now as busy and returns them; wait becomes the time until the next one.
func (s *Store) due(wait *time.Duration) []*entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	var out []*entry
	for _, e := range s.entries {
		if s.busy[e.digest] || e.file != nil {
			continue
		}
		if d := e.next.Sub(now); d > 0 {
			*wait = min(*wait, d)
			continue
		}
		s.busy[e.digest] = true
		out = append(out, e)
	}
	return out
}

// try makes one entry ready, or notes why it could not.
func (s *Store) try(ctx context.Context, e *entry) {
	s.mu.Lock()
	sources := e.sources
	src := sources[e.tries%len(sources)]
	s.mu.Unlock()
	file, err := s.obtain(ctx, src, func(done int64) {
		s.mu.Lock()
		e.done = done
		s.mu.Unlock()
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, e.digest)
	if ctx.Err() != nil {
		return
	}
	if err == nil {
		e.file, e.reason, e.message, e.tries = file, "", "", 0
		s.log.Info("model file ready", "digest", e.digest, "bytes", file.size, "uri", src.URI)
		signal(s.news)
		return
	}
	f := asFailure(err)
	if !slices.Equal(sources, e.sources) {
		return // the model was changed meanwhile: try the new sources at once
	}
	e.tries++
	e.next = time.Now().Add(s.backoff(e.tries))
	if e.reason != f.reason || e.message != f.Error() {
		e.reason, e.message = f.reason, f.Error()
		s.log.Warn("model file not to be had", "digest", e.digest, "uri", src.URI, "reason", f.reason, "error", f.err)
		signal(s.news)
	}
}

// backoff doubles from RetryMin to RetryMax, with a quarter of jitter.
func (s *Store) backoff(tries int) time.Duration {
	d := min(s.cfg.RetryMin<<min(tries-1, 20), s.cfg.RetryMax)
	return d + time.Duration(rand.Int64N(int64(d)/4+1))
}

// failure is an error with a reason for Status.
type failure struct {
	reason string
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(reason, format string, args ...any) error {
	return &failure{reason, fmt.Errorf(format, args...)}
}

func asFailure(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	return &failure{ReasonFetchFailed, err}
}

// parseDigest returns the 64 hexadecimal digits of "sha256:<hex>".
func parseDigest(d string) (string, error) {
	h, ok := strings.CutPrefix(d, "sha256:")
	raw, err := hex.DecodeString(h)
	if !ok || err != nil || len(raw) != 32 || h != strings.ToLower(h) {
		return "", fmt.Errorf("digest %q is not \"sha256:\" and 64 lower-case hexadecimal digits", d)
	}
	return h, nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
