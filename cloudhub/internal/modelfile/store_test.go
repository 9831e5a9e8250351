package modelfile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func source(b []byte, uri string) Source {
	return Source{Digest: digestOf(b), Size: int64(len(b)), URI: uri}
}

// open runs a store until the test ends, or stop is called.
func open(t *testing.T, dir, cache string, change func(*Config)) (s *Store, stop func()) {
	t.Helper()
	cfg := Config{
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Dir: dir, CacheDir: cache,
		RetryMin: 10 * time.Millisecond, RetryMax: 50 * time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return s, stop
}

// until waits for the status of a digest.
func until(t *testing.T, s *Store, digest string, f func(Status) bool) Status {
	t.Helper()
	end := time.Now().Add(30 * time.Second)
	for {
		for _, st := range s.Status() {
			if st.Digest == digest && f(st) {
				return st
			}
		}
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s: %+v", digest, s.Status())
		}
		<-time.After(2 * time.Millisecond)
	}
}

func ready(st Status) bool { return st.Ready }

func because(reason string) func(Status) bool {
	return func(st Status) bool { return !st.Ready && st.Reason == reason }
}

// allowAll lets everybody read everything.
func allowAll(*http.Request, string) error { return nil }

func get(s *Store, digest string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, "/models/"+digest, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	s.Handler(allowAll).ServeHTTP(w, r)
	return w
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// If this fails, edges can't get a model that lies in the hub's folder, or get another file than its digest says.
func TestFolder(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, t.TempDir(), nil)
	b := bytes.Repeat([]byte("model "), 10000)
	src := source(b, "file:bearing/v%201.onnx")
	s.Want([]Source{src})
	// It comes later.
	st := until(t, s, src.Digest, because(ReasonNotFound))
	if !strings.Contains(st.Message, `no file "bearing/v 1.onnx" in the hub's model folder `+dir) {
		t.Errorf("message %q", st.Message)
	}
	path := filepath.Join(dir, "bearing/v 1.onnx")
	write(t, path, []byte("another"))
	until(t, s, src.Digest, because(ReasonSizeMismatch))
	write(t, path, bytes.Repeat([]byte("?"), len(b)))
	until(t, s, src.Digest, because(ReasonDigestMismatch))
	write(t, path, b)
	until(t, s, src.Digest, ready)
	if w := get(s, src.Digest); w.Code != 200 || !bytes.Equal(w.Body.Bytes(), b) || w.Header().Get("ETag") != `"`+src.Digest+`"` {
		t.Errorf("GET: %d, %d bytes, %v", w.Code, w.Body.Len(), w.Header())
	}
	w := get(s, src.Digest, "Range", "bytes=59990-")
	if w.Code != 206 || w.Body.String() != string(b[59990:]) || w.Header().Get("Content-Range") != "bytes 59990-59999/60000" {
		t.Errorf("range: %d %q %v", w.Code, w.Body, w.Header())
	}
	if w := get(s, src.Digest, "Range", "bytes=60000-"); w.Code != 416 {
		t.Errorf("range beyond the end: %d", w.Code)
	}
	// A file that changes is not served as what it was.
	write(t, path, []byte("changed"))
	if w := get(s, src.Digest); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("changed file: %d %s", w.Code, w.Body)
	}
	until(t, s, src.Digest, because(ReasonSizeMismatch))
	write(t, path, b)
	until(t, s, src.Digest, ready)
	// What nobody wants is not served.
	s.Want(nil)
	if w := get(s, src.Digest); w.Code != 404 {
		t.Errorf("unwanted file: %d", w.Code)
	}
}

// If this fails, who may write a Model reads any file of the hub's machine (G5).
func TestFolderIsNotLeft(t *testing.T) {
	outside := t.TempDir()
	secret := []byte("secret")
	write(t, filepath.Join(outside, "secret"), secret)
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(outside, "secret"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "linked")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "inside"), secret)
	s, _ := open(t, dir, t.TempDir(), nil)
	rel, err := filepath.Rel(dir, filepath.Join(outside, "secret"))
	if err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{
		"file:" + rel, "file://" + outside + "/secret", "file:" + outside + "/secret", "file:link", "file:linked/secret",
		"file:%2e%2e/" + filepath.Base(outside) + "/secret", "file://host/inside", "file:", "file:.", "ftp://x/y", "inside", "file:%zz", "http://[::1",
	} {
		src := source(secret, uri)
		s.Want([]Source{src})
		until(t, s, src.Digest, func(st Status) bool { return st.Reason != "" })
		st := until(t, s, src.Digest, func(Status) bool { return true })
		if st.Ready || st.Reason != ReasonInvalidSource {
			t.Errorf("%s: %+v", uri, st)
		}
		s.Want(nil)
	}
	// The same file by its absolute name is inside.
	src := source(secret, "file://"+dir+"/inside")
	s.Want([]Source{src})
	until(t, s, src.Digest, ready)
}

// origin is a web server with one file.
type origin struct {
	*httptest.Server
	asked, sent atomic.Int64
	cut         atomic.Int64 // bytes after which an answer breaks; 0 = none
	noRanges    atomic.Bool
	status      atomic.Int64 // instead of the file; 0 = none
	file        atomic.Pointer[[]byte]
}

func newOrigin(t *testing.T, b []byte) *origin {
	o := &origin{}
	o.file.Store(&b)
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.asked.Add(1)
		if code := o.status.Load(); code != 0 {
			http.Error(w, "no", int(code))
			return
		}
		if o.noRanges.Load() {
			r.Header.Del("Range")
		}
		http.ServeContent(&cutter{w, o, 0}, r, "", time.Time{}, bytes.NewReader(*o.file.Load()))
	}))
	t.Cleanup(o.Close)
	return o
}

type cutter struct {
	http.ResponseWriter
	o *origin
	n int64
}

func (c *cutter) Write(p []byte) (int, error) {
	if cut := c.o.cut.Load(); cut > 0 && c.n+int64(len(p)) > cut {
		n, _ := c.ResponseWriter.Write(p[:cut-c.n])
		c.o.sent.Add(int64(n))
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	n, err := c.ResponseWriter.Write(p)
	c.n += int64(n)
	c.o.sent.Add(int64(n))
	return n, err
}

// If this fails, the hub fetches a model again for every edge or restart, never gets it over a bad line, or serves half.
func TestFetchedOnce(t *testing.T) {
	b := bytes.Repeat([]byte("0123456789"), 50000)
	o := newOrigin(t, b)
	o.cut.Store(100 << 10)
	o.status.Store(404)
	cache := t.TempDir()
	s, stop := open(t, "", cache, nil)
	src := source(b, o.URL+"/m.onnx")
	s.Want([]Source{src})
	until(t, s, src.Digest, because(ReasonNotFound))
	o.status.Store(500)
	until(t, s, src.Digest, because(ReasonFetchFailed))
	if w := get(s, src.Digest); w.Code != 503 || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), "FetchFailed") {
		t.Errorf("not there yet: %d %s", w.Code, w.Body)
	}
	o.status.Store(0)
	until(t, s, src.Digest, ready)
	if w := get(s, src.Digest); w.Code != 200 || !bytes.Equal(w.Body.Bytes(), b) {
		t.Errorf("GET: %d, %d bytes", w.Code, w.Body.Len())
	}
	// Each byte once: what was cut goes on where it stopped.
	if n := o.sent.Load(); n > int64(len(b))+10*(64<<10) {
		t.Errorf("%d bytes fetched for a file of %d", n, len(b))
	}
	// A restart needs no origin.
	stop()
	o.Close()
	s, _ = open(t, "", cache, nil)
	s.Want([]Source{src})
	until(t, s, src.Digest, ready)
}

// If this fails, an origin without ranges, with another file, or a damaged cache blocks a model for good.
func TestBadOrigins(t *testing.T) {
	b := bytes.Repeat([]byte("0123456789"), 20000)
	damaged := bytes.Clone(b)
	damaged[5] ^= 1
	for name, c := range map[string]struct {
		part, final, serve []byte
		noRanges           bool
		reason             string // that is told before the origin serves b; "" if it does from the start
	}{
		"no ranges":         {part: b[:1000], serve: b, noRanges: true},
		"damaged part":      {part: damaged[:1000], serve: b},
		"part too long":     {part: append(bytes.Clone(b), 'x'), serve: b},
		"whole part":        {part: b, serve: nil},
		"damaged file":      {final: damaged, serve: b},
		"another file":      {serve: damaged, reason: ReasonDigestMismatch},
		"a longer file":     {serve: append(bytes.Clone(b), 'x'), reason: ReasonSizeMismatch},
		"a shorter file":    {serve: b[:len(b)-1], reason: ReasonSizeMismatch},
		"shorter than ours": {part: b[:5000], serve: b[:100], reason: ReasonSizeMismatch},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			cache := t.TempDir()
			src := source(b, "")
			final := filepath.Join(cache, strings.ReplaceAll(src.Digest, ":", "-"))
			if c.part != nil {
				write(t, final+".part", c.part)
			}
			if c.final != nil {
				write(t, final, c.final)
			}
			o := newOrigin(t, c.serve)
			o.noRanges.Store(c.noRanges)
			src.URI = o.URL
			s, _ := open(t, "", cache, nil)
			s.Want([]Source{src})
			if c.reason != "" {
				until(t, s, src.Digest, because(c.reason))
				o.file.Store(&b)
			}
			until(t, s, src.Digest, ready)
			if w := get(s, src.Digest); !bytes.Equal(w.Body.Bytes(), b) {
				t.Errorf("%d bytes are not the file", w.Body.Len())
			}
		})
	}
}

// If this fails, the hub's disk fills up with models nobody wants any more (G4).
func TestCacheIsBounded(t *testing.T) {
	one, two := bytes.Repeat([]byte("1"), 6000), bytes.Repeat([]byte("2"), 6000)
	o1, o2 := newOrigin(t, one), newOrigin(t, two)
	cache := t.TempDir()
	s, _ := open(t, "", cache, func(c *Config) { c.MaxBytes = 10000 })
	src1, src2 := source(one, o1.URL), source(two, o2.URL)
	s.Want([]Source{src1})
	until(t, s, src1.Digest, ready)
	s.Want([]Source{src1, src2})
	st := until(t, s, src2.Digest, because(ReasonCacheFull))
	if !strings.Contains(st.Message, "needs 6000 bytes and other wanted files 6000, the hub's model cache has 10000") {
		t.Errorf("message %q", st.Message)
	}
	s.Want([]Source{src2})
	until(t, s, src2.Digest, ready)
	list, err := os.ReadDir(cache)
	if err != nil || len(list) != 1 {
		t.Errorf("cache holds %v, %v", list, err)
	}
}

// If this fails, a file that several places have is not served because the first place does not.
func TestSeveralSources(t *testing.T) {
	b := []byte("model")
	dir := t.TempDir()
	write(t, filepath.Join(dir, "m"), b)
	s, _ := open(t, dir, t.TempDir(), nil)
	s.Want([]Source{source(b, "http://127.0.0.1:1/nothing"), source(b, "file:m")})
	until(t, s, digestOf(b), ready)
}

// If this fails, whoever reaches the hub's port reads every model (G5), or can't tell why not.
func TestAuthorisation(t *testing.T) {
	dir := t.TempDir()
	b := []byte("model")
	write(t, filepath.Join(dir, "m"), b)
	s, _ := open(t, dir, t.TempDir(), nil)
	src := source(b, "file:m")
	s.Want([]Source{src})
	until(t, s, src.Digest, ready)
	h := s.Handler(func(r *http.Request, digest string) error {
		switch r.Header.Get("Authorization") {
		case "":
			return errors.Join(ErrUnauthenticated)
		case "Bearer edge-1:t":
			if digest == src.Digest {
				return nil
			}
		}
		return errors.New("not in this edge's list")
	})
	for _, c := range []struct {
		method, path, auth string
		code               int
	}{
		{"GET", "/models/" + src.Digest, "", 401},
		{"GET", "/models/" + src.Digest, "Bearer edge-2:t", 403},
		{"GET", "/models/" + digestOf(nil), "Bearer edge-1:t", 403},
		{"GET", "/models/" + src.Digest, "Bearer edge-1:t", 200},
		{"HEAD", "/models/" + src.Digest, "Bearer edge-1:t", 200},
		{"PUT", "/models/" + src.Digest, "Bearer edge-1:t", 405},
		{"GET", "/models/", "Bearer edge-1:t", 404},
		{"GET", "/models/sha256:" + strings.Repeat("A", 64), "Bearer edge-1:t", 404},
		{"GET", "/models/" + src.Digest + "/..", "Bearer edge-1:t", 404},
	} {
		r := httptest.NewRequest(c.method, c.path, nil)
		if c.auth != "" {
			r.Header.Set("Authorization", c.auth)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.code {
			t.Errorf("%s %s %q: %d %s, want %d", c.method, c.path, c.auth, w.Code, w.Body, c.code)
		}
		if c.method == "HEAD" && (w.Body.Len() != 0 || w.Header().Get("Content-Length") != "5") {
			t.Errorf("HEAD: %v %q", w.Header(), w.Body)
		}
	}
}

// If this fails, many edges that fetch while models change get an error or wrong bytes.
func TestConcurrentReaders(t *testing.T) {
	dir := t.TempDir()
	b := bytes.Repeat([]byte("m"), 128<<10)
	write(t, filepath.Join(dir, "m"), b)
	s, _ := open(t, dir, t.TempDir(), nil)
	src := source(b, "file:m")
	s.Want([]Source{src})
	until(t, s, src.Digest, ready)
	server := httptest.NewServer(s.Handler(allowAll))
	defer server.Close()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 10 {
				resp, err := server.Client().Get(server.URL + "/models/" + src.Digest)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				if cerr := resp.Body.Close(); err != nil || cerr != nil || !bytes.Equal(got, b) {
					t.Errorf("%s, %d bytes, %v", resp.Status, len(got), err)
				}
			}
		})
	}
	for range 50 {
		other := source([]byte("x"), "file:other")
		s.Want([]Source{src, other})
		s.Want([]Source{src})
	}
	wg.Wait()
}

// If this fails, a hub with a wrong folder starts and serves nothing.
func TestNewSaysWhatToDo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, nil)
	for _, cfg := range []Config{{}, {CacheDir: file}, {CacheDir: t.TempDir(), Dir: filepath.Join(t.TempDir(), "missing")}} {
		if s, err := New(cfg); err == nil {
			t.Errorf("New(%+v) = %v", cfg, s)
		} else {
			t.Log(err)
		}
	}
}
