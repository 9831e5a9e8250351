package modelfile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/longshore-edge/longshore/sync/durable"
)

// stallAfter is how long a source may send nothing before the try ends.
const stallAfter = 60 * time.Second

// obtain returns the verified file of src: from the cache, from Dir in place, or fetched.
func (s *Store) obtain(ctx context.Context, src Source, progress func(int64)) (*verified, error) {
	hexa, err := parseDigest(src.Digest)
	if err != nil {
		return nil, fail(ReasonInvalidSource, "%w", err)
	}
	if src.Size <= 0 {
		return nil, fail(ReasonInvalidSource, "size of %d bytes", src.Size)
	}
	u, err := url.Parse(src.URI)
	if err != nil {
		return nil, fail(ReasonInvalidSource, "parse source: %w", err)
	}
	switch u.Scheme {
	case "file":
		return s.fromDir(ctx, src, u)
	case "http", "https":
		return s.fromHTTP(ctx, src, hexa, progress)
	}
	return nil, fail(ReasonInvalidSource, "source %q: the scheme must be http, https or file", src.URI)
}

// fromDir checks a file of Dir and leaves it where it is.
func (s *Store) fromDir(ctx context.Context, src Source, u *url.URL) (*verified, error) {
	name, err := s.relative(u)
	if err != nil {
		return nil, err
	}
	f, err := s.root.Open(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fail(ReasonNotFound, "no file %q in the hub's model folder %s", name, s.cfg.Dir)
	case err != nil:
		return nil, fail(ReasonInvalidSource, "open model file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("look at model file: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fail(ReasonInvalidSource, "%q in the hub's model folder is not a regular file", name)
	}
	if st.Size() != src.Size {
		return nil, fail(ReasonSizeMismatch, "file %q has %d bytes, the model says %d", name, st.Size(), src.Size)
	}
	h := sha256.New()
	if _, err := io.Copy(h, contextReader(ctx, f)); err != nil {
		return nil, fmt.Errorf("read model file: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != src.Digest {
		return nil, fail(ReasonDigestMismatch, "file %q has digest %s, the model says %s", name, got, src.Digest)
	}
	return &verified{path: name, inDir: true, size: st.Size(), modify: st.ModTime()}, nil
}

// relative turns a file: URI into a path below Dir. os.Root refuses what leaves it through ".." or links.
func (s *Store) relative(u *url.URL) (string, error) {
	if s.root == nil {
		return "", fail(ReasonInvalidSource, "file: sources need a model folder on the hub (cloudhub run --models DIR)")
	}
	if u.Host != "" && u.Host != "localhost" {
		return "", fail(ReasonInvalidSource, "file: source names the host %q; write file:PATH relative to the hub's model folder", u.Host)
	}
	name := u.Path
	if u.Opaque != "" {
		var err error
		if name, err = url.PathUnescape(u.Opaque); err != nil {
			return "", fail(ReasonInvalidSource, "parse source: %w", err)
		}
	}
	if filepath.IsAbs(name) {
		rel, err := filepath.Rel(s.cfg.Dir, name)
		if err != nil || !filepath.IsLocal(rel) {
			return "", fail(ReasonInvalidSource, "file %q is outside the hub's model folder %s", name, s.cfg.Dir)
		}
		name = rel
	}
	name = filepath.Clean(name)
	if !filepath.IsLocal(name) || name == "." {
		return "", fail(ReasonInvalidSource, "file %q is outside the hub's model folder %s", name, s.cfg.Dir)
	}
	return name, nil
}

// fromHTTP fetches into the cache, going on where an earlier try ended. The file gets its name only after its digest is
// checked and its bytes are on disk.
func (s *Store) fromHTTP(ctx context.Context, src Source, hexa string, progress func(int64)) (*verified, error) {
	final := filepath.Join(s.cfg.CacheDir, "sha256-"+hexa)
	part := final + ".part"
	if v, err := cached(ctx, final, src); v != nil || err != nil {
		return v, err
	}
	if err := s.makeRoom(part, src.Size); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open partial file: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	have, err := io.Copy(h, contextReader(ctx, f))
	if err != nil {
		return nil, fmt.Errorf("read partial file: %w", err)
	}
	resumed := have > 0
	if have > src.Size {
		if err := restart(f, h); err != nil {
			return nil, err
		}
		have = 0
	}
	if have < src.Size {
		if err := s.get(ctx, src, f, h, have, progress); err != nil {
			return nil, err
		}
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != src.Digest {
		if err := os.Remove(part); err != nil {
			return nil, fmt.Errorf("remove a file with a wrong digest: %w", err)
		}
		if resumed {
			return nil, fail(ReasonDigestMismatch, "what was fetched in parts has digest %s, the model says %s; it is fetched anew", got, src.Digest)
		}
		return nil, fail(ReasonDigestMismatch, "%s has digest %s, the model says %s", src.URI, got, src.Digest)
	}
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("sync model file: %w", err)
	}
	if err := os.Rename(part, final); err != nil {
		return nil, fmt.Errorf("name model file: %w", err)
	}
	if err := durable.SyncDir(s.cfg.CacheDir); err != nil {
		return nil, fmt.Errorf("sync model cache: %w", err)
	}
	st, err := os.Stat(final)
	if err != nil {
		return nil, fmt.Errorf("look at model file: %w", err)
	}
	return &verified{path: final, size: st.Size(), modify: st.ModTime()}, nil
}

// cached returns the file of an earlier run if it is whole, and removes it if it is not; nil, nil if there is none.
func cached(ctx context.Context, final string, src Source) (*verified, error) {
	f, err := os.Open(final)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open cached file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("look at cached file: %w", err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, contextReader(ctx, f)); err != nil {
		return nil, fmt.Errorf("read cached file: %w", err)
	}
	if "sha256:"+hex.EncodeToString(h.Sum(nil)) == src.Digest {
		if st.Size() != src.Size {
			return nil, fail(ReasonSizeMismatch, "%s has %d bytes, the model says %d", src.URI, st.Size(), src.Size)
		}
		return &verified{path: final, size: st.Size(), modify: st.ModTime()}, nil
	}
	if err := os.Remove(final); err != nil {
		return nil, fmt.Errorf("remove a damaged cached file: %w", err)
	}
	return nil, nil
}

// restart empties a partial file.
func restart(f *os.File, h hash.Hash) error {
	h.Reset()
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("truncate partial file: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("truncate partial file: %w", err)
	}
	return nil
}

// get appends the bytes from offset have to f and h.
func (s *Store) get(ctx context.Context, src Source, f *os.File, h hash.Hash, have int64, progress func(int64)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, src.URI, nil)
	if err != nil {
		return fail(ReasonInvalidSource, "%w", err)
	}
	if have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", have))
	}
	resp, err := s.cfg.Client.Do(req)
	if err != nil {
		return fail(ReasonFetchFailed, "fetch model file: %w", err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone:
		return fail(ReasonNotFound, "%s answered %s", src.URI, resp.Status)
	case resp.StatusCode == http.StatusOK && have > 0: // the server has no ranges
		if err := restart(f, h); err != nil {
			return err
		}
		have = 0
	case resp.StatusCode == http.StatusPartialContent && have > 0:
		if !strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", have)) {
			return fail(ReasonFetchFailed, "%s answered with the range %q, asked for was the one from byte %d", src.URI, resp.Header.Get("Content-Range"), have)
		}
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		if err := restart(f, h); err != nil {
			return err
		}
		return fail(ReasonSizeMismatch, "%s ends before byte %d, the model says %d bytes", src.URI, have, src.Size)
	case resp.StatusCode != http.StatusOK:
		return fail(ReasonFetchFailed, "%s answered %s", src.URI, resp.Status)
	}
	stall := time.AfterFunc(stallAfter, cancel)
	defer stall.Stop()
	buf := make([]byte, 256<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			stall.Reset(stallAfter)
			if have+int64(n) > src.Size {
				return errors.Join(os.Remove(f.Name()), fail(ReasonSizeMismatch, "%s is longer than the %d bytes the model says", src.URI, src.Size))
			}
			if _, err := f.Write(buf[:n]); err != nil {
				return fmt.Errorf("write partial file: %w", err)
			}
			h.Write(buf[:n])
			have += int64(n)
			progress(have)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fail(ReasonFetchFailed, "fetch model file after %d of %d bytes: %w", have, src.Size, err)
		}
	}
	if have < src.Size {
		return fail(ReasonSizeMismatch, "%s ended after %d bytes, the model says %d", src.URI, have, src.Size)
	}
	return nil
}

// makeRoom removes cached files that nobody wants, the oldest first, until size more bytes fit beside part's.
func (s *Store) makeRoom(part string, size int64) error {
	s.mu.Lock()
	keep := map[string]int64{} // by file name, the room it may need
	for d, e := range s.entries {
		if h, err := parseDigest(d); err == nil {
			keep["sha256-"+h] = 0
			keep["sha256-"+h+".part"] = 0
			if s.busy[d] {
				keep["sha256-"+h+".part"] = e.sources[0].Size
			}
		}
	}
	s.mu.Unlock()
	list, err := os.ReadDir(s.cfg.CacheDir)
	if err != nil {
		return fmt.Errorf("list the model cache: %w", err)
	}
	var used int64
	var spare []fs.FileInfo
	for _, d := range list {
		fi, err := d.Info()
		if err != nil || d.Name() == filepath.Base(part) {
			continue
		}
		room, wanted := keep[d.Name()]
		if !wanted {
			spare = append(spare, fi)
		}
		used += max(fi.Size(), room)
	}
	slices.SortFunc(spare, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, fi := range spare {
		if used+size <= s.cfg.MaxBytes {
			break
		}
		if err := os.Remove(filepath.Join(s.cfg.CacheDir, fi.Name())); err != nil {
			return fmt.Errorf("make room in the model cache: %w", err)
		}
		used -= fi.Size()
	}
	if used+size > s.cfg.MaxBytes {
		return fail(ReasonCacheFull, "the file needs %d bytes and other wanted files %d, the hub's model cache has %d", size, used, s.cfg.MaxBytes)
	}
	return nil
}

// readerFunc is a reader made of its one method.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// contextReader ends a long read when ctx ends.
func contextReader(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(p)
	})
}
