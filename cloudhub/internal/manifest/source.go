package manifest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/durable"
)

const (
	// settle is how long the folder must be quiet before it is read: an editor writes a file in several steps.
	settle = 50 * time.Millisecond
	// rescan finds what no notification told of, such as changes on network file systems.
	rescan = 10 * time.Second
	// resolution of the times of files, at least: FAT has 2 s.
	resolution = 3 * time.Second
)

// Config of a Source.
type Config struct {
	Logger *slog.Logger
	// Dir is the folder; its files *.yaml, *.yml and *.json are read, also in folders below it. Hidden ones are not.
	Dir string
	// DataDir keeps the cluster's UID and each file's last good content.
	DataDir string
	Cache   *mirror.Cache
}

// Source reads the folder again whenever it changes and tells the cache what differs. Safe for concurrent use.
type Source struct {
	cfg     Config
	cluster string
	loaded  chan struct{} // closed after the first complete read

	mu       sync.Mutex
	problems []Problem
	err      error // why the folder cannot be read at all

	// The rest belongs to New and then Run.
	files   map[string]file
	current map[ref]object
}

// entry is what was found under a file's name: its content, or why it could not be read.
type entry struct {
	content []byte
	problem string
	stamp   stamp // of the content; zero: read it again next time
}

// stamp tells whether a file is still the one that was read.
type stamp struct {
	device, inode     uint64
	size              int64
	modified, changed int64 // nanoseconds
}

// stampOf returns the zero stamp for a file that changed so shortly before now that it may change again within the resolution of
// its times.
func stampOf(st fs.FileInfo, now time.Time) stamp {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{}
	}
	s := stamp{uint64(sys.Dev), sys.Ino, sys.Size, sys.Mtim.Nano(), sys.Ctim.Nano()} //nolint:unconvert // the types differ between architectures
	if max(s.modified, s.changed) > now.Add(-resolution).UnixNano() {
		return stamp{}
	}
	return s
}

// file is one file of the folder.
type file struct {
	entry           // as last read
	good     []byte // last content without a problem, nil if none
	objects  []object
	problems []Problem
}

// New checks the folder and reads what an earlier run knew. It starts nothing.
func New(cfg Config) (*Source, error) {
	if st, err := os.Stat(cfg.Dir); err != nil || !st.IsDir() {
		return nil, fmt.Errorf("the folder of manifests %q cannot be read: make it, or name another with --manifests (%w)", cfg.Dir, notDir(err))
	}
	if err := durable.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("make data folder: %w", err)
	}
	s := &Source{cfg: cfg, loaded: make(chan struct{}), files: map[string]file{}, current: map[ref]object{}}
	var err error
	if s.cluster, err = clusterUID(filepath.Join(cfg.DataDir, "cluster-uid")); err != nil {
		return nil, err
	}
	return s, s.restore()
}

func notDir(err error) error {
	if err == nil {
		return errors.New("not a folder")
	}
	return err
}

func clusterUID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil && len(bytes.TrimSpace(b)) > 0 {
		return string(bytes.TrimSpace(b)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read cluster UID: %w", err)
	}
	id := string(uid("cluster", rand.Text()))
	return id, durable.WriteFile(path, []byte(id+"\n"))
}

// ClusterUID names this folder's "cluster"; it is made once and kept in the data folder.
func (s *Source) ClusterUID(context.Context) (string, error) { return s.cluster, nil }

// Ready reports why there is no state to mirror yet, nil once the folder was read. Files with problems do not make it
// fail: their last good content holds.
func (s *Source) Ready() error {
	select {
	case <-s.loaded:
	default:
		return errors.New("the folder of manifests has not been read yet")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Problems returns what is wrong with the files now, by file and line.
func (s *Source) Problems() []Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.problems)
}

// Prove waits for the first read: after it the cache is never behind the folder as far as anybody can tell.
func (s *Source) Prove(ctx context.Context, _ string) error {
	select {
	case <-s.loaded:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Report does nothing: a folder has no place for what edges report; the mirror shows it.
func (s *Source) Report(mirror.EdgeState) {}

// Problem logs an object that cannot be mirrored.
func (s *Source) Problem(r mirror.ObjectRef, reason, message string) {
	s.cfg.Logger.Warn("object not mirrored", "kind", r.Kind, "namespace", r.Namespace, "name", r.Name, "reason", reason, "message", message)
}

// Run reads the folder and follows its changes until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", s.cfg.Dir, err)
	}
	defer func() { _ = w.Close() }()
	var timer <-chan time.Time
	s.scan(w)
	close(s.loaded)
	tick := time.NewTicker(rescan)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.Events:
			timer = time.After(settle)
		case err := <-w.Errors:
			s.cfg.Logger.Warn("watching the folder failed, it is read again every few seconds", "dir", s.cfg.Dir, "err", err)
		case <-timer:
			timer = nil
			s.scan(w)
		case <-tick.C:
			s.scan(w)
		}
	}
}

// scan reads the folder and applies what changed. A folder that cannot be read changes nothing: a file system that is not
// mounted must not look like a fleet without pods.
func (s *Source) scan(w *fsnotify.Watcher) {
	entries, err := s.read(w)
	s.mu.Lock()
	known := s.err
	s.err = err
	s.mu.Unlock()
	if err != nil {
		if known == nil || known.Error() != err.Error() {
			s.cfg.Logger.Error("the folder of manifests cannot be read, its last state stays", "dir", s.cfg.Dir, "err", err)
		}
		if len(s.current) == 0 {
			s.apply()
		}
		return
	}
	changed := false
	for name := range s.files {
		if _, ok := entries[name]; !ok {
			delete(s.files, name)
			changed = true
		}
	}
	for name, e := range entries {
		old, known := s.files[name]
		if known && old.problem == e.problem && old.content != nil && bytes.Equal(old.content, e.content) {
			old.entry = e
			s.files[name] = old
			continue
		}
		changed = true
		f := file{entry: e, good: old.good, objects: old.objects}
		if e.problem != "" {
			f.problems = []Problem{{name, 1, e.problem}}
		} else if objects, problems := parse(name, e.content); len(problems) == 0 {
			f.good, f.objects = e.content, objects
		} else {
			f.problems = problems
		}
		s.files[name] = f
	}
	if changed || known != nil || len(s.current) == 0 {
		s.apply()
	}
}

// read returns what is in the folder, by path below it. An error says that the folder itself cannot be read; what is wrong with
// one file is told with it.
func (s *Source) read(w *fsnotify.Watcher) (map[string]entry, error) {
	entries := map[string]entry{}
	err := filepath.WalkDir(s.cfg.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if path == s.cfg.Dir {
				return err
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil // went away meanwhile: the next notification comes
			}
			s.keepBelow(path, err, entries)
			return nil
		}
		hidden := strings.HasPrefix(d.Name(), ".") && path != s.cfg.Dir
		if d.IsDir() {
			if hidden {
				return filepath.SkipDir
			}
			if err := w.Add(path); err != nil { // then the next rescan finds what changed
				s.cfg.Logger.Debug("a folder of manifests cannot be watched", "dir", path, "err", err)
			}
			return nil
		}
		ext := filepath.Ext(path)
		if hidden || ext != ".yaml" && ext != ".yml" && ext != ".json" {
			return nil
		}
		rel, err := filepath.Rel(s.cfg.Dir, path)
		if err != nil {
			return err
		}
		if e, ok := readEntry(path, s.files[rel].entry, time.Now()); ok {
			entries[rel] = e
		}
		return nil
	})
	return entries, err
}

// keepBelow says of every file known below a folder that it cannot be read, so that its last good content stays.
func (s *Source) keepBelow(folder string, err error, entries map[string]entry) {
	for name := range s.files {
		if strings.HasPrefix(filepath.Join(s.cfg.Dir, name), folder+string(filepath.Separator)) {
			entries[name] = entry{content: []byte{}, problem: fmt.Sprintf("its folder cannot be read: %v", err)}
		}
	}
}

// readEntry reads one file, unless it is still the known one; ok is false if there is none (any more).
func readEntry(path string, known entry, now time.Time) (e entry, ok bool) {
	e.content = []byte{}
	st, err := os.Stat(path) // follows links, as those of a mounted ConfigMap
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return e, false
	case err != nil:
	case !st.Mode().IsRegular():
		e.problem = "not a regular file"
		return e, true
	case st.Size() > maxFile:
		e.problem = fmt.Sprintf("the file has %d bytes, at most %d are read", st.Size(), maxFile)
		return e, true
	default:
		if e.stamp = stampOf(st, now); e.stamp != (stamp{}) && e.stamp == known.stamp {
			return known, true
		}
		e.content, err = os.ReadFile(path)
	}
	if err != nil {
		e.problem, e.stamp = fmt.Sprintf("the file cannot be read: %v", err), stamp{}
	}
	return e, !errors.Is(err, fs.ErrNotExist)
}

// apply tells the cache the difference between what it was told and what the files say now.
func (s *Source) apply() {
	names := slices.Sorted(maps.Keys(s.files))
	want := map[ref]object{}
	from := map[ref]string{}
	var problems []Problem
	for _, name := range names {
		f := s.files[name]
		problems = append(problems, f.problems...)
		for n, o := range f.objects {
			if other, taken := from[o.ref]; taken {
				problems = append(problems, Problem{name, lineOfObject(name, f.good, n), fmt.Sprintf("%s is also in %s, which holds", o.ref, other)})
				continue
			}
			want[o.ref], from[o.ref] = o, name
		}
	}
	s.cfg.Cache.Batch(func(c *mirror.Cache) {
		for r, o := range s.current {
			if n, ok := want[r]; !ok || n.value.GetUID() != o.value.GetUID() {
				forget(c, o)
			}
		}
		for r, o := range want {
			if old, ok := s.current[r]; !ok || !reflect.DeepEqual(old.value, o.value) {
				tell(c, o)
			}
		}
	})
	s.cfg.Cache.Synced()
	s.current = want
	s.report(problems)
	if err := s.keep(); err != nil {
		s.cfg.Logger.Error("the last good manifests cannot be kept, a restart while a file is bad would forget its objects", "err", err)
	}
}

func (s *Source) report(problems []Problem) {
	s.mu.Lock()
	old := s.problems
	s.problems = problems
	s.mu.Unlock()
	for _, p := range problems {
		if !slices.Contains(old, p) {
			s.cfg.Logger.Error("a manifest is bad, its last good content holds", "file", p.File, "line", p.Line, "reason", p.Reason)
		}
	}
	if len(old) > 0 && len(problems) == 0 {
		s.cfg.Logger.Info("all manifests are good again")
	}
}

func tell(c *mirror.Cache, o object) {
	switch v := o.value.(type) {
	case *v1alpha1.Edge:
		c.SetEdge(v)
	case *v1alpha1.Model:
		c.SetModel(v)
	case *corev1.Pod:
		c.SetPod(v)
	case *corev1.ConfigMap:
		c.SetConfigMap(v)
	case *corev1.Secret:
		c.SetSecret(v)
	}
}

func forget(c *mirror.Cache, o object) {
	switch v := o.value.(type) {
	case *v1alpha1.Edge:
		c.DeleteEdge(v.Name)
	case *v1alpha1.Model:
		c.DeleteModel(v.Namespace, v.Name)
	case *corev1.Pod:
		c.DeletePod(v.Namespace, v.Name, v.UID)
	case *corev1.ConfigMap:
		c.SetAbsent(longshorepb.Kind_KIND_CONFIG_MAP, v.Namespace, v.Name, "not found")
	case *corev1.Secret:
		c.SetAbsent(longshorepb.Kind_KIND_SECRET, v.Namespace, v.Name, "not found")
	}
}

func (s *Source) goodPath() string { return filepath.Join(s.cfg.DataDir, "manifests-last-good.json") }

// keep writes the last good content of every file that has one.
func (s *Source) keep() error {
	good := map[string]string{}
	for name, f := range s.files {
		if f.good != nil {
			good[name] = string(f.good)
		}
	}
	b, err := json.Marshal(good)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(s.goodPath()); err == nil && bytes.Equal(old, b) {
		return nil
	}
	return durable.WriteFile(s.goodPath(), b)
}

// restore reads what keep wrote. Files that are gone by the first scan are forgotten there.
func (s *Source) restore() error {
	b, err := os.ReadFile(s.goodPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	good := map[string]string{}
	if err == nil {
		err = json.Unmarshal(b, &good)
	}
	if err != nil {
		return fmt.Errorf("read the last good manifests: %w (remove the file to begin with what the folder says now)", err)
	}
	for name, content := range good {
		if objects, problems := parse(name, []byte(content)); len(problems) == 0 {
			s.files[name] = file{good: []byte(content), objects: objects}
		}
	}
	return nil
}
