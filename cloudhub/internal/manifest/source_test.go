package manifest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// folder is a running source on a folder, and the view of one edge.
type folder struct {
	t         testing.TB
	dir, data string
	source    *Source
	view      *mirror.View
	stop      func()
}

func start(t testing.TB, dir, data string) *folder {
	t.Helper()
	cache := mirror.NewCache()
	s, err := New(Config{Logger: slog.New(slog.DiscardHandler), Dir: dir, DataDir: data, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	f := &folder{t: t, dir: dir, data: data, source: s, view: cache.View("dock-1", make([]byte, 32), func() {})}
	f.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("Run:", err)
		}
	}
	if err := s.Prove(ctx, "dock-1"); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *folder) write(name, text string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// names lists what the edge should hold.
func (f *folder) names() []string {
	names := []string{}
	if l := f.view.Snapshot(time.Now()).List; l != nil {
		for _, e := range l.Entries {
			names = append(names, e.Name)
		}
	}
	return names
}

func (f *folder) until(what string, cond func() bool) {
	f.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			f.t.Fatalf("%s: not within 30 s; the edge holds %v, problems %v", what, f.names(), f.source.Problems())
		}
		<-time.After(10 * time.Millisecond)
	}
}

func (f *folder) holds(names ...string) {
	f.t.Helper()
	f.until(fmt.Sprintf("hold %v", names), func() bool { return slices.Equal(f.names(), names) })
}

func pod(name string) string {
	return strings.Replace(goodPod, "name: web\nspec", "name: "+name+"\nspec", 1)
}

const edge = "apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: dock-1}\nspec: {pods: true}\n"

// A folder is the whole cluster of somebody without Kubernetes: what is written there must reach the edge, what is removed
// must leave it, and a mistake in one file must not touch the rest.
func TestFolderIsFollowed(t *testing.T) {
	defer goleak.VerifyNone(t)
	f := start(t, t.TempDir(), t.TempDir())
	defer f.stop()
	f.write("edge.yaml", edge)
	f.write("pods/web.yaml", pod("web"))
	f.holds("web")
	f.write("pods/web.yaml", pod("web")+"---\n"+pod("second"))
	f.holds("second", "web")

	f.write("pods/web.yaml", pod("web")+"---\n"+strings.Replace(pod("second"), "nodeName", "nodename", 1))
	f.until("the bad file is reported", func() bool {
		p := f.source.Problems()
		return len(p) == 1 && p[0].File == "pods/web.yaml" && p[0].Line > 10
	})
	f.holds("second", "web")
	f.write("other.yml", pod("other"))
	f.holds("other", "second", "web")

	f.write("zz.yaml", pod("web"))
	f.until("the duplicate is reported", func() bool {
		return slices.ContainsFunc(f.source.Problems(), func(p Problem) bool {
			return p.File == "zz.yaml" && strings.Contains(p.Reason, "also in pods/web.yaml")
		})
	})
	f.write("pods/web.yaml", pod("second"))
	f.until("the other file's copy takes over", func() bool { return len(f.source.Problems()) == 0 })
	f.holds("other", "second", "web")

	for _, name := range []string{"pods", "other.yml", "zz.yaml"} {
		if err := os.RemoveAll(filepath.Join(f.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	f.holds()
}

// The hub may be restarted while somebody is half way through an edit: edges must not lose their pods over that.
func TestLastGoodContentOutlivesARestart(t *testing.T) {
	dir, data := t.TempDir(), t.TempDir()
	f := start(t, dir, data)
	uid1, _ := f.source.ClusterUID(t.Context())
	f.write("edge.yaml", edge)
	f.write("a.yaml", pod("a"))
	f.write("b.yaml", pod("b"))
	f.holds("a", "b")
	f.write("a.yaml", "kind: [\n")
	f.until("the bad file is reported", func() bool { return len(f.source.Problems()) == 1 })
	f.stop()
	if err := os.Remove(filepath.Join(dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}

	f = start(t, dir, data)
	defer f.stop()
	f.holds("a")
	if len(f.source.Problems()) != 1 {
		t.Errorf("problems %v, want the bad file's", f.source.Problems())
	}
	if uid2, _ := f.source.ClusterUID(t.Context()); uid1 == "" || uid1 != uid2 {
		t.Errorf("the cluster's UID changed from %q to %q", uid1, uid2)
	}
}

// A folder of ten thousand files must not be read anew for each change; but an edit that leaves size and time as they were, or
// follows a read at once, must not be overlooked.
func TestOnlyChangedFilesAreReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.yaml")
	write := func(text string, at time.Time) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	hourAgo := time.Now().Add(-time.Hour)
	write("a: 1", hourAgo)
	if e, _ := readEntry(path, entry{}, time.Now()); string(e.content) != "a: 1" || e.stamp != (stamp{}) {
		t.Fatalf("read %q; a file that changed just now has the stamp %v", e.content, e.stamp)
	}
	later := time.Now().Add(time.Minute)
	known, _ := readEntry(path, entry{}, later)
	known.content = []byte("known")
	if e, _ := readEntry(path, known, later); string(e.content) != "known" {
		t.Error("a file that rests is read again")
	}
	write("a: 2", hourAgo) // the same size and time, as rsync may leave them
	if e, _ := readEntry(path, known, later); string(e.content) != "a: 2" {
		t.Errorf("read %q", e.content)
	}
}

// A folder on a file system that is not mounted must not look like a fleet without pods.
func TestVanishedFolderChangesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f := start(t, dir, t.TempDir())
	defer f.stop()
	f.write("edge.yaml", edge)
	f.write("a.yaml", pod("a"))
	f.holds("a")
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	f.until("the loss is told", func() bool { return f.source.Ready() != nil })
	f.holds("a")
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	f.until("the folder is read again", func() bool { return f.source.Ready() == nil })
	f.holds("a")
}

// One odd entry, such as a link to a folder or a pipe, must not stop the folder or hang the hub.
func TestOddEntriesTouchNothingElse(t *testing.T) {
	f := start(t, t.TempDir(), t.TempDir())
	defer f.stop()
	f.write("edge.yaml", edge)
	f.write("a.yaml", pod("a"))
	f.holds("a")
	if err := os.Symlink(t.TempDir(), filepath.Join(f.dir, "link.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(f.dir, "pipe.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(f.dir, "nowhere"), filepath.Join(f.dir, "dangling.yaml")); err != nil {
		t.Fatal(err)
	}
	huge := filepath.Join(f.dir, "huge.yaml")
	f.write("huge.yaml", "")
	if err := os.Truncate(huge, maxFile+1); err != nil {
		t.Fatal(err)
	}
	f.write("b.yaml", pod("b"))
	f.holds("a", "b")
	f.until("three are told", func() bool { return len(f.source.Problems()) == 3 })
	if err := os.Remove(huge); err != nil {
		t.Fatal(err)
	}
	f.until("two are left", func() bool { return len(f.source.Problems()) == 2 })
	if err := f.source.Ready(); err != nil {
		t.Error("the folder is not ready:", err)
	}
}

func TestMissingFolderSaysWhatToDo(t *testing.T) {
	_, err := New(Config{Logger: slog.New(slog.DiscardHandler), Dir: "/does/not/exist", DataDir: t.TempDir(), Cache: mirror.NewCache()})
	if err == nil || !strings.Contains(err.Error(), "--manifests") {
		t.Errorf("got %v, want an error that names the flag", err)
	}
}
