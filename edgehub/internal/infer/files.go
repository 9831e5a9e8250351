package infer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/longshore-edge/longshore/sync/space"
)

const (
	partSuffix = ".part"
	// readSize is how much of a download is read at a time; with a rate limit it is what is waited for.
	readSize = 16 << 10
	// syncEvery bounds what a power cut can cost of a download, in bytes.
	syncEvery = 8 << 20
	// concurrentDownloads share the link; more would only finish later.
	concurrentDownloads = 2
)

// errMissing says that a file is not here, whole and with the right digest.
var errMissing = errors.New("model file is not here")

// files is a content-addressed folder: sha256-<hex> is whole and verified, sha256-<hex>.part is being downloaded. A file
// gets its final name by a rename after its bytes are on disk, so a power cut at any moment leaves either of the two.
// Safe for concurrent use.
type files struct {
	dir     string
	quota   int64
	limiter *rate.Limiter // nil = unlimited
	slots   chan struct{}

	mu       sync.Mutex
	reserved map[string]int64     // whole size by file name, of downloads under way
	coming   map[string]int64     // bytes by file name that downloads under way have still to write
	checked  map[string]time.Time // modification time of files verified in this process
	locks    map[string]*fileLock
}

// fileLock serializes downloads of one file; files.mu guards users.
type fileLock struct {
	held  chan struct{}
	users int
}

func openFiles(dir string, quota, downloadRate int64) (*files, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory for model files: %w", err)
	}
	f := &files{
		dir: dir, quota: quota, slots: make(chan struct{}, concurrentDownloads),
		reserved: map[string]int64{}, coming: map[string]int64{}, checked: map[string]time.Time{}, locks: map[string]*fileLock{},
	}
	if downloadRate > 0 {
		f.limiter = rate.NewLimiter(rate.Limit(downloadRate), readSize)
	}
	return f, nil
}

// fileName turns "sha256:<hex>" into a file name.
func fileName(digest string) (string, error) {
	h, ok := strings.CutPrefix(digest, "sha256:")
	raw, err := hex.DecodeString(h)
	if !ok || err != nil || len(raw) != sha256.Size || h != strings.ToLower(h) {
		return "", fmt.Errorf("digest %q is not \"sha256:\" and 64 lower-case hexadecimal digits", digest)
	}
	return "sha256-" + h, nil
}

// path of a file that open found whole.
func (f *files) path(digest string) string {
	name, err := fileName(digest)
	if err != nil {
		return ""
	}
	return filepath.Join(f.dir, name)
}

// verify returns nil if the file is here and whole. The first time in a process its digest is computed; a damaged file is
// removed. It fails with errMissing, or with what the disk said.
func (f *files) verify(ctx context.Context, digest string, size int64) error {
	name, err := fileName(digest)
	if err != nil {
		return err
	}
	path := filepath.Join(f.dir, name)
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return errMissing
	}
	if err != nil {
		return fmt.Errorf("look at model file: %w", err)
	}
	f.mu.Lock()
	at, ok := f.checked[name]
	f.mu.Unlock()
	if st.Size() == size && ok && at.Equal(st.ModTime()) {
		return nil
	}
	if st.Size() == size {
		h := sha256.New()
		if err := hashFile(ctx, h, path); err != nil {
			return fmt.Errorf("verify model file: %w", err)
		}
		if "sha256-"+hex.EncodeToString(h.Sum(nil)) == name {
			f.mu.Lock()
			f.checked[name] = st.ModTime()
			f.mu.Unlock()
			return nil
		}
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove damaged model file: %w", err)
	}
	return errMissing
}

// have returns how many bytes of a file are here.
func (f *files) have(digest string) int64 {
	path := f.path(digest)
	if st, err := os.Stat(path); err == nil {
		return st.Size()
	}
	if st, err := os.Stat(path + partSuffix); err == nil {
		return st.Size()
	}
	return 0
}

// download makes one try to complete a file, going on where an earlier one ended, also in an earlier process. progress is
// called with the bytes that are here. It fails with a *failure, or with ctx's error.
func (f *files) download(ctx context.Context, from Fetcher, digest string, size int64, stall time.Duration, progress func(int64)) error {
	name, err := fileName(digest)
	if err != nil {
		return &failure{reasonNoVariant, err.Error()}
	}
	unlock, err := f.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := f.verify(ctx, digest, size); !errors.Is(err, errMissing) {
		return diskFailure(err) // another model may have fetched it meanwhile
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	release, err := f.reserve(name, size)
	if err != nil {
		return err
	}
	defer release()
	part := filepath.Join(f.dir, name+partSuffix)
	file, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return diskFailure(err)
	}
	d := &download{files: f, file: file, name: name, hash: sha256.New(), digest: digest, size: size, stall: stall, progress: progress}
	err = d.run(ctx, from)
	if cerr := file.Close(); err == nil && cerr != nil {
		err = diskFailure(cerr)
	}
	if err != nil {
		if d.bad {
			err = errors.Join(err, os.Remove(part))
		}
		return err
	}
	return diskFailure(f.finish(name, part))
}

// finish gives a complete file, whose bytes are on disk, its name.
func (f *files) finish(name, part string) error {
	final := filepath.Join(f.dir, name)
	if err := os.Rename(part, final); err != nil {
		return err
	}
	if err := syncDir(f.dir); err != nil {
		return err
	}
	st, err := os.Stat(final)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.checked[name] = st.ModTime()
	f.mu.Unlock()
	return nil
}

// lock serializes downloads of one file.
func (f *files) lock(ctx context.Context, name string) (unlock func(), err error) {
	f.mu.Lock()
	l := f.locks[name]
	if l == nil {
		l = &fileLock{held: make(chan struct{}, 1)}
		f.locks[name] = l
	}
	l.users++
	f.mu.Unlock()
	leave := func() {
		f.mu.Lock()
		if l.users--; l.users == 0 {
			delete(f.locks, name)
		}
		f.mu.Unlock()
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// reserve books room for a whole file.
func (f *files) reserve(name string, size int64) (release func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	used, err := f.used(name)
	if err != nil {
		return nil, diskFailure(err)
	}
	if used+size > f.quota {
		return nil, &failure{reasonDiskQuota, fmt.Sprintf("the file needs %d bytes, other models %d, the quota is %d (models.diskQuota)", size, used, f.quota)}
	}
	f.reserved[name] = size
	return func() {
		f.mu.Lock()
		delete(f.reserved, name)
		delete(f.coming, name)
		f.mu.Unlock()
	}, nil
}

// used sums what files other than except take or will take. The caller holds mu.
func (f *files) used(except string) (int64, error) {
	list, err := os.ReadDir(f.dir)
	if err != nil {
		return 0, err
	}
	var used int64
	for name, size := range f.reserved {
		if name != except {
			used += size
		}
	}
	for _, e := range list {
		name := strings.TrimSuffix(e.Name(), partSuffix)
		if _, ok := f.reserved[name]; ok || name == except {
			continue
		}
		if st, err := e.Info(); err == nil {
			used += st.Size()
		}
	}
	return used, nil
}

// usage returns the bytes on disk.
func (f *files) usage() int64 {
	list, err := os.ReadDir(f.dir)
	if err != nil {
		return 0
	}
	var n int64
	for _, e := range list {
		if st, err := e.Info(); err == nil {
			n += st.Size()
		}
	}
	return n
}

// collect removes every file whose digest is not in keep.
func (f *files) collect(keep map[string]bool) error {
	names := map[string]bool{}
	for d := range keep {
		if n, err := fileName(d); err == nil {
			names[n] = true
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	list, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range list {
		name := strings.TrimSuffix(e.Name(), partSuffix)
		if _, busy := f.reserved[name]; busy || names[name] {
			continue
		}
		errs = append(errs, os.RemoveAll(filepath.Join(f.dir, e.Name())))
		delete(f.checked, name)
	}
	return errors.Join(errs...)
}

// download is one try.
type download struct {
	files    *files
	file     *os.File
	hash     hash.Hash
	name     string // of the file, once it is whole
	digest   string
	size     int64
	stall    time.Duration
	progress func(int64)
	bad      bool // the partial file is of no use
}

func (d *download) run(ctx context.Context, from Fetcher) error {
	if st, err := d.file.Stat(); err != nil {
		return diskFailure(err)
	} else if st.Size() > d.size {
		if err := d.file.Truncate(0); err != nil {
			return diskFailure(err)
		}
	}
	have, err := io.Copy(d.hash, contextReader(ctx, d.file))
	if err != nil {
		return diskFailure(err)
	}
	d.progress(have)
	resumed := have > 0
	if have < d.size {
		if err := d.files.claim(d.name, d.size-have); err != nil {
			return err
		}
		if err := d.receive(ctx, from, have); err != nil {
			return err
		}
	}
	if got := "sha256:" + hex.EncodeToString(d.hash.Sum(nil)); got != d.digest {
		d.bad = true
		if resumed {
			return &failure{reasonDigestMismatch, fmt.Sprintf("what was downloaded in parts has digest %s, the model says %s; it is downloaded anew", got, d.digest)}
		}
		return &failure{reasonDigestMismatch, fmt.Sprintf("the hub sent a file with digest %s, the model says %s", got, d.digest)}
	}
	if err := d.file.Sync(); err != nil {
		return diskFailure(err)
	}
	return nil
}

// maxReserve bounds the free space that model files leave on the disk, a third of a small one. It is more than telemetry and the
// store of desired state leave: a disk that models could fill to there would squeeze out all telemetry, and take no list any
// more that removes them.
const maxReserve = 96 << 20

// claim books n bytes more for a download, unless they, with what other downloads will still write, leave too little room on the
// disk.
func (f *files) claim(name string, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	free, size, err := space.Of(f.dir)
	if err != nil {
		return diskFailure(err)
	}
	reserve := min(maxReserve, size/3)
	var others int64
	for other, left := range f.coming {
		if other != name {
			others += left
		}
	}
	if free-others-n < reserve {
		return diskFailure(fmt.Errorf("%w: the file needs %d MiB more, %d MiB are free, of which %d MiB are kept and other downloads need %d MiB",
			syscall.ENOSPC, n>>20+1, free>>20, reserve>>20, others>>20))
	}
	f.coming[name] = n
	return nil
}

// wrote takes what a download wrote off its claim.
func (f *files) wrote(name string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.coming[name] -= int64(n)
}

// receive appends what the hub has from byte have on.
func (d *download) receive(outer context.Context, from Fetcher, have int64) error {
	if from == nil {
		return &failure{reasonFetchFailed, "there is no link to the hub"}
	}
	ctx, cancel := context.WithCancel(outer)
	defer cancel()
	stalled := time.AfterFunc(d.stall, cancel)
	defer stalled.Stop()
	body, err := from.Fetch(ctx, d.digest, have)
	if err != nil {
		return d.fetchFailure(outer, err)
	}
	defer body.Close()
	stop := context.AfterFunc(ctx, func() { body.Close() }) // a body that ignores ctx ends too
	defer stop()
	buf := make([]byte, readSize)
	unsynced := 0
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if have+int64(n) > d.size {
				d.bad = true
				return &failure{reasonSizeMismatch, fmt.Sprintf("the hub sent more than the %d bytes the model says", d.size)}
			}
			if _, err := d.file.Write(buf[:n]); err != nil {
				return diskFailure(err)
			}
			d.files.wrote(d.name, n)
			d.hash.Write(buf[:n])
			have += int64(n)
			d.progress(have)
			if unsynced += n; unsynced >= syncEvery {
				if err := d.file.Sync(); err != nil {
					return diskFailure(err)
				}
				unsynced = 0
			}
			if d.files.limiter != nil {
				stalled.Stop() // this pause is ours
				if err := d.files.limiter.WaitN(outer, n); err != nil {
					return d.fetchFailure(outer, err)
				}
			}
			stalled.Reset(d.stall)
		}
		if err == io.EOF && have == d.size {
			return nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return d.fetchFailure(outer, fmt.Errorf("after %d of %d bytes: %w", have, d.size, err))
		}
	}
}

// fetchFailure tells the end of the agent's interest from a bad link.
func (d *download) fetchFailure(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, context.Canceled) {
		err = fmt.Errorf("no byte for %v", d.stall)
	}
	return &failure{reasonFetchFailed, err.Error()}
}

func diskFailure(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &failure{reasonDiskFull, fmt.Sprintf("%v (free some space, or lower models.diskQuota)", err)}
	}
	return &failure{reasonDisk, err.Error()}
}

func hashFile(ctx context.Context, h hash.Hash, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(h, contextReader(ctx, f))
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
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
