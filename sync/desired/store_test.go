package desired

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// writerDir tells the test binary to be the process that TestG2Killed kills.
const writerDir = "LONGSHORE_TEST_WRITER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		writeForever(dir)
	}
	if dir := os.Getenv(fullDir); dir != "" {
		beProcess(dir)
	}
	goleak.VerifyTestMain(m,
		// Badger's dependency starts it at import and never ends it.
		goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, moved, err := OpenStore(dir, quiet())
	if err != nil || moved != "" {
		t.Fatalf("open store: moved %q, %v", moved, err)
	}
	t.Cleanup(func() { _ = s.Close() }) // a second Close does nothing
	return s
}

// commitPods stores pods and commits the list of them.
func commitPods(s *Store, sizes ...int) (*List, error) {
	var entries []*longshorepb.Entry
	for i, size := range sizes {
		o := must(FromPod(pod(fmt.Sprint("p", i), size)))
		entries = append(entries, o.Entry())
		if err := s.Apply(SaveObject{o}); err != nil {
			return nil, err
		}
	}
	l := NewList(entries)
	if err := s.Apply(SaveObject{Object{Ref: Ref{Kind: longshorepb.Kind_KIND_LIST}, Digest: l.Digest, Body: l.Body()}}); err != nil {
		return nil, err
	}
	return l, s.Apply(Commit{List: l, Cluster: "c1"})
}

// writeForever commits list after list, and says which after each.
func writeForever(dir string) {
	s, _, err := OpenStore(dir, quiet())
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for i := 1; ; i++ {
		before := must(s.Load())
		l, err := commitPods(s, i, 100_000+i, 2000+i)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		var drop []Digest
		for d := range before.Objects {
			if d != l.Digest && !l.Names(d) {
				drop = append(drop, d)
			}
		}
		if err := s.Apply(Drop{drop}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(l.Digest)
	}
}

// TestG2Killed: after a kill -9 at any moment the edge would start without its pods, or with half of them.
func TestG2Killed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	for round := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writerDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// What was said before the kill is committed; the next one may be.
		var last string
		lines := bufio.NewScanner(out)
		for n := 0; n < 3+7*round && lines.Scan(); n++ {
			last = lines.Text()
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		said := map[string]bool{last: true} // since the kill
		for lines.Scan() {
			said[lines.Text()] = true
			last = lines.Text()
		}
		_ = cmd.Wait() // it was killed
		if len(last) != 64 {
			t.Fatalf("the writer says %q", last)
		}
		s := open(t, dir)
		l, objects, err := s.Current()
		if err != nil || len(objects) != 3 {
			t.Fatalf("round %d: %d objects: %v", round, len(objects), err)
		}
		for _, o := range objects {
			if digestOf(o.Kind, o.Body, [32]byte{}) != o.Digest {
				t.Errorf("round %d: %s is damaged", round, o.Ref)
			}
		}
		if l.Digest.String() != last && said[l.Digest.String()] {
			t.Errorf("round %d: an older list than the last one committed", round)
		}
		st := must(s.Load())
		if st.List.Digest != l.Digest || st.Cluster != "c1" || st.Previous != nil && st.Previous.Digest == l.Digest {
			t.Errorf("round %d: loaded %+v", round, st)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStoreReopen: an agent that restarts would fetch everything again, or reuse a session number.
func TestStoreReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if l, os, err := s.Current(); l != nil || os != nil || err != nil {
		t.Errorf("a new store holds %v %v %v", l, os, err)
	}
	sizes := []int{10, 40_000, 3 << 20}
	l := must(commitPods(s, sizes...))
	part := SavePart{Digest: Digest{9}, Data: []byte(noise("part", 70_000)), Total: 100_000, Kind: longshorepb.Kind_KIND_POD}
	more := SavePart{Digest: Digest{9}, Offset: 70_000, Data: []byte("more"), Total: 100_000, Kind: longshorepb.Kind_KIND_POD}
	gap := SavePart{Digest: Digest{9}, Offset: 80_000, Data: []byte("gap"), Total: 100_000, Kind: longshorepb.Kind_KIND_POD}
	for _, a := range []EdgeAction{part, more, gap} {
		if err := s.Apply(a); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Put("model/m", []byte("v1")); err != nil {
		t.Fatal(err)
	}
	if err := s.Put("big", make([]byte, maxValue+1)); err == nil {
		t.Error("a value above 32 KiB is taken")
	}
	n := must(s.NextSession())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, dir)
	st := must(s.Load())
	if st.List == nil || st.List.Digest != l.Digest || len(st.Objects) != 4 || st.Lists[l.Digest] == nil {
		t.Fatalf("loaded %d objects, list %v", len(st.Objects), st.List)
	}
	if p := st.Parts[Digest{9}]; string(p.Data) != string(part.Data)+"more" || p.Total != 100_000 || p.Kind != part.Kind {
		t.Errorf("part of %d bytes of %d", len(p.Data), p.Total)
	}
	_, objects, err := s.Current()
	if err != nil || len(objects) != 3 {
		t.Fatal(err)
	}
	for i, o := range objects {
		if want := must(FromPod(pod(fmt.Sprint("p", i), sizes[i]))); string(want.Body) != string(o.Body) || o.Ref != want.Ref {
			t.Errorf("%s differs", o.Ref)
		}
	}
	if v := must(s.Get("model/m")); string(v) != "v1" {
		t.Errorf("value %q", v)
	}
	if err := s.Delete("model/m"); err != nil || must(s.Get("model/m")) != nil {
		t.Errorf("a deleted value stays: %v", err)
	}
	if m := must(s.NextSession()); m <= n {
		t.Errorf("session %d after %d", m, n)
	}
	if err := s.Apply(Drop{[]Digest{{9}}}); err != nil || len(must(s.Load()).Parts) != 0 {
		t.Errorf("a dropped part stays: %v", err)
	}
}

// TestCommitNeedsObjects: a mistake elsewhere would make a list current whose pods are not here (G2).
func TestCommitNeedsObjects(t *testing.T) {
	s := open(t, t.TempDir())
	l := NewList([]*longshorepb.Entry{must(FromPod(pod("a", 1))).Entry()})
	if err := s.Apply(Commit{List: l, Cluster: "c1"}); err == nil {
		t.Error("a list is committed that is not stored")
	}
	if l, _, err := s.Current(); l != nil || err != nil {
		t.Errorf("current %v %v", l, err)
	}
}

// TestStoreInUse: two agents on one state directory would destroy it.
func TestStoreInUse(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	_, moved, err := OpenStore(dir, quiet())
	if err == nil || moved != "" || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), dir) {
		t.Errorf("moved %q, err = %v, want one that says that the store is in use", moved, err)
	}
}

// TestStoreCannotBeMade: an installer who mistypes the directory would not learn what is wrong.
func TestStoreCannotBeMade(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := OpenStore(filepath.Join(file, "x"), quiet()); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("err = %v", err)
	}
}

// TestDiskFull: Badger would end the process with SIGBUS in the middle of a write, or the agent would forget what it had.
func TestDiskFull(t *testing.T) {
	s := open(t, t.TempDir())
	l := must(commitPods(s, 10))
	before := must(s.NextSession())
	s.reserve = 1 << 60
	_, err := commitPods(s, 20)
	if !errors.Is(err, ErrDiskFull) || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("err = %v, want ErrDiskFull that says what to do", err)
	}
	for range 2 { // telemetry must go up to make room
		next, err := s.NextSession()
		if err != nil || next <= before {
			t.Errorf("session %d after %d: %v", next, before, err)
		}
		before = next
	}
	s.reserve = minReserve
	if now, _, err := s.Current(); err != nil || now.Digest != l.Digest {
		t.Errorf("current %v %v", now, err)
	}
	if _, err := commitPods(s, 20); err != nil {
		t.Errorf("with space again: %v", err)
	}
}

// TestCorruptStore: one bad sector would leave an edge dead until somebody drives there.
func TestCorruptStore(t *testing.T) {
	damage := map[string]func(t *testing.T, file string){
		"flipped": func(t *testing.T, file string) {
			b := must(os.ReadFile(file))
			for i := range b {
				if b[i] != 0 {
					b[i] ^= 0x55
				}
			}
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cut": func(t *testing.T, file string) {
			if err := os.Truncate(file, must(os.Stat(file)).Size()/2); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, f := range damage {
		for _, pattern := range []string{"MANIFEST", "*.sst"} {
			t.Run(name+" "+pattern, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "store")
				s := open(t, dir)
				if _, err := commitPods(s, 10, 200_000); err != nil {
					t.Fatal(err)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				files := must(filepath.Glob(filepath.Join(dir, pattern)))
				if len(files) == 0 {
					t.Fatal("nothing to damage")
				}
				for _, file := range files {
					f(t, file)
				}
				s, moved, err := OpenStore(dir, quiet())
				if err != nil {
					t.Fatalf("the agent can't start: %v", err)
				}
				defer func() { _ = s.Close() }()
				if l, _, err := s.Current(); l != nil || err != nil {
					t.Errorf("current of a new store: %v %v", l, err)
				}
				// Badger takes a cut manifest for one whose end was never written: it begins with an empty store by itself.
				if _, err := os.Stat(moved); pattern+name != "MANIFEST"+"cut" && (err != nil || !strings.HasPrefix(moved, dir+".corrupt-")) {
					t.Errorf("moved to %q: %v", moved, err)
				}
				if _, err := commitPods(s, 10); err != nil {
					t.Errorf("the new store can't be written: %v", err)
				}
			})
		}
	}
}

// TestHalfWritten: blocks of objects that a crash left incomplete would fill the disk for good (G4).
func TestHalfWritten(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	l := must(commitPods(s, 100_000))
	var w writes
	w.put(append(digestKey(blockKey, Digest{7}), 0, 0, 0, 0), make([]byte, 1000))
	if err := s.write(w); err != nil {
		t.Fatal(err)
	}
	must(s.Load())
	if keys := s.countKeys(t); keys != 1+1+4+1+1 { // committed, two headers, four blocks of the pod and one of the list
		t.Errorf("%d keys are left", keys)
	}
	if now, _, err := s.Current(); err != nil || now.Digest != l.Digest {
		t.Errorf("current %v %v", now, err)
	}
}

// TestG4StoreIsBounded: an edge whose pods change for months would fill its disk with what it no longer holds.
func TestG4StoreIsBounded(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	random := rand.NewChaCha8([32]byte{})
	for range 48 {
		o := Object{Ref: Ref{Kind: longshorepb.Kind_KIND_CONFIG_MAP, Namespace: "default", Name: "a"}, Body: make([]byte, 1<<20)}
		_, _ = random.Read(o.Body)
		o.Digest = digestOf(o.Kind, o.Body, [32]byte{})
		l := NewList([]*longshorepb.Entry{o.Entry()})
		before := must(s.Load())
		for _, a := range []EdgeAction{
			SaveObject{o}, SaveObject{Object{Ref: Ref{Kind: longshorepb.Kind_KIND_LIST}, Digest: l.Digest, Body: l.Body()}},
			Commit{List: l, Cluster: "c1"}, Drop{slices.Collect(maps.Keys(before.Objects))},
		} {
			if err := s.Apply(a); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, objects, err := s.Current(); err != nil || len(objects) != 1 {
		t.Fatalf("%d objects: %v", len(objects), err)
	}
	var size int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// Log files are sparse: their sizes are upper bounds.
	if size > 40<<20 {
		t.Errorf("%d MiB on disk for a state of 1 MiB after 48 MiB of changes", size>>20)
	}
	t.Logf("%d KiB on disk", size>>10)
}

func (s *Store) countKeys(t *testing.T) int {
	t.Helper()
	n := 0
	txn := s.db.NewTransaction(false)
	defer txn.Discard()
	err := scan(txn, nil, false, func(_, _ []byte) error { n++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// G2: a power cut in the middle of a flush leaves files that Badger had not finished. They are nobody's: the store must open with
// what it had, and not be moved aside.
func TestG2UnfinishedFiles(t *testing.T) {
	for name, content := range map[string]string{"00077.mem": "", "000077.vlog": "", "000077.sst": "", "000078.sst": strings.Repeat("x", 5000)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			list, err := commitPods(s, 10, 20)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			now, objects, err := open(t, dir).Current()
			if err != nil || now == nil || now.Digest != list.Digest || len(objects) != 2 {
				t.Errorf("the store lost its list: %v, %d objects, %v", now, len(objects), err)
			}
		})
	}
}
