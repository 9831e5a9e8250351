package modelfile

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"
)

// ErrUnauthenticated is what an allow hook returns (wrapped or not) for a request without valid credentials: 401 instead
// of 403.
var ErrUnauthenticated = errors.New("no valid credentials")

// retryAfter is what an edge is told when a file is not here yet, in seconds.
const retryAfter = "10"

// Handler serves GET and HEAD of /models/sha256:<hex>, with ranges (RFC 9110, section 14). allow decides who may read a
// digest; its error's text is the answer (403, or 401 for ErrUnauthenticated), so it must not tell whether the file exists.
// A wanted file that is not here yet is 503 with Retry-After and the reason; a file no model names is 404.
func (s *Store) Handler(allow func(r *http.Request, digest string) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
			return
		}
		digest, ok := strings.CutPrefix(r.URL.Path, "/models/")
		if _, err := parseDigest(digest); !ok || err != nil {
			http.Error(w, "model files are at /models/sha256:<64 hexadecimal digits>", http.StatusNotFound)
			return
		}
		if err := allow(r, digest); err != nil {
			code := http.StatusForbidden
			if errors.Is(err, ErrUnauthenticated) {
				w.Header().Set("WWW-Authenticate", "Bearer")
				code = http.StatusUnauthorized
			}
			http.Error(w, err.Error(), code)
			return
		}
		f, why, known := s.open(digest)
		if f == nil {
			code := http.StatusNotFound
			if known {
				w.Header().Set("Retry-After", retryAfter)
				code = http.StatusServiceUnavailable
			}
			http.Error(w, why, code)
			return
		}
		defer f.Close()
		w.Header().Set("ETag", `"`+digest+`"`)
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Cache-Control", "private, immutable")
		http.ServeContent(w, r, "", time.Time{}, f)
	})
}

// open returns the verified file of a digest, or why there is none; known tells that a model names it.
func (s *Store) open(digest string) (f *os.File, why string, known bool) {
	s.mu.Lock()
	e := s.entries[digest]
	if e == nil {
		s.mu.Unlock()
		return nil, "no model names this file", false
	}
	v := e.file
	why = fmt.Sprintf("the hub does not have this file yet: %d of %d bytes", e.done, e.sources[0].Size)
	if e.reason != "" {
		why = "the hub does not have this file: " + e.reason + ": " + e.message
	}
	s.mu.Unlock()
	if v == nil {
		return nil, why, true
	}
	f, err := s.openVerified(v)
	if err == nil {
		return f, "", true
	}
	// The file was changed or removed below us: check it again.
	s.mu.Lock()
	if e.file == v {
		e.file, e.next = nil, time.Time{}
	}
	s.mu.Unlock()
	signal(s.wake)
	s.log.Warn("model file changed below the hub", "digest", digest, "error", err)
	return nil, "the file changed on the hub and is checked again", true
}

func (s *Store) openVerified(v *verified) (*os.File, error) {
	open := os.Open
	if v.inDir {
		open = s.root.Open
	}
	f, err := open(v.path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && (st.Size() != v.size || !st.ModTime().Equal(v.modify)) {
		err = fmt.Errorf("size or time of modification of %q changed", v.path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
