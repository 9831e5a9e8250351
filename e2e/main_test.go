package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// bin holds the commands under test, built with the race detector.
var bin rig.Bin

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "longshore-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	if bin, err = rig.Build(ctx, "..", dir, "-race"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// soon bounds every wait: generous, since nothing here measures speed.
const soon = 90 * time.Second

// eventually waits for cond to return nil.
func eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if err := rig.Until(ctx, cond); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// need fails the test when a command of the system is missing: a test that is skipped proves nothing.
func need(t *testing.T, command string) string {
	t.Helper()
	path, err := exec.LookPath(command)
	if err != nil {
		if path, err = exec.LookPath(filepath.Join("/usr/sbin", command)); err != nil {
			t.Fatalf("%s is missing: run e2e/install.sh as root", command)
		}
	}
	return path
}

// site is a hub on a folder and its edges, for one test.
type site struct {
	t     *testing.T
	hub   *rig.Hub
	links map[string]*rig.Link
	files map[string]*rig.Link
}

func newSite(t *testing.T) *site {
	t.Helper()
	h, err := rig.NewHub(bin, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, hub: h, links: map[string]*rig.Link{}, files: map[string]*rig.Link{}}
	t.Cleanup(func() {
		for _, l := range []map[string]*rig.Link{s.links, s.files} {
			for _, k := range l {
				k.Close()
			}
		}
	})
	return s
}

func (s *site) startHub() {
	s.t.Helper()
	if err := s.hub.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	p := s.hub.Process
	s.t.Cleanup(func() { s.end(p) })
}

// end stops a process at the end of a test; what the test itself ended is left alone. A data race fails the test.
func (s *site) end(p *rig.Process) {
	select {
	case <-p.Done():
	default:
		if err := p.Stop(30 * time.Second); err != nil {
			s.t.Error(err)
		}
	}
	if s.t.Failed() {
		s.t.Logf("the end of %s's log:\n%s", p.Name, p.Tail(40))
	}
}

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := s.hub.Write(name, text); err != nil {
		s.t.Fatal(err)
	}
}

// edge enrolls an edge, writes its manifest and makes it, behind a link of its own. extra is YAML for its configuration.
func (s *site) edge(name, extra string) *rig.Edge {
	s.t.Helper()
	s.write("edge-"+name+".yaml", fmt.Sprintf("apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata:\n  name: %s\n  labels: {site: %s}\nspec: {pods: true, plain: true}\n", name, name))
	credential, err := s.hub.Enroll(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	for target, links := range map[string]map[string]*rig.Link{s.hub.MQTT: s.links, s.hub.HTTP: s.files} {
		if links[name], err = rig.NewLink(target); err != nil {
			s.t.Fatal(err)
		}
	}
	e, err := rig.NewEdge(bin, s.t.TempDir(), name, credential, s.links[name].Addr(), s.files[name].Addr(), extra)
	if err != nil {
		s.t.Fatal(err)
	}
	return e
}

func (s *site) cut(name string) {
	s.links[name].Cut()
	s.files[name].Cut()
}

func (s *site) restore(name string) {
	s.links[name].Restore()
	s.files[name].Restore()
}

func (s *site) start(e *rig.Edge) {
	s.t.Helper()
	if err := e.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	p := e.Process
	s.t.Cleanup(func() { s.end(p) })
}
