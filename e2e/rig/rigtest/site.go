package rigtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// Site is a hub on a folder and its edges, for one test, which fails on every error. What it starts ends with the test.
type Site struct {
	Hub *rig.Hub
	// Links relay the edges' MQTT, Files their downloads, by name.
	Links, Files map[string]*rig.Link

	t   *testing.T
	bin rig.Bin
}

// NewSite makes a site. It starts nothing.
func NewSite(t *testing.T, bin rig.Bin) *Site {
	t.Helper()
	h, err := rig.NewHub(bin, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := &Site{t: t, bin: bin, Hub: h, Links: map[string]*rig.Link{}, Files: map[string]*rig.Link{}}
	t.Cleanup(func() {
		for _, l := range []map[string]*rig.Link{s.Links, s.Files} {
			for _, k := range l {
				k.Close()
			}
		}
	})
	return s
}

// StartHub starts the hub and waits until it is ready.
func (s *Site) StartHub() {
	s.t.Helper()
	if err := s.Hub.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	s.EndWithTest(s.Hub.Process)
}

// EndWithTest stops a process at the end of the test; what the test itself ended is left alone. A data race fails the test.
func (s *Site) EndWithTest(p *rig.Process) {
	s.t.Cleanup(func() {
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
	})
}

// Write puts a manifest into the watched folder.
func (s *Site) Write(name, text string) {
	s.t.Helper()
	if err := s.Hub.Write(name, text); err != nil {
		s.t.Fatal(err)
	}
}

// Remove takes a manifest out of the watched folder.
func (s *Site) Remove(name string) {
	s.t.Helper()
	if err := os.Remove(filepath.Join(s.Hub.Manifests(), name)); err != nil {
		s.t.Fatal(err)
	}
}

// Enroll writes an edge's manifest, makes its credential and returns the path of that.
func (s *Site) Enroll(name string) string {
	s.t.Helper()
	s.Write("edge-"+name+".yaml", fmt.Sprintf("apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata:\n  name: %s\n  labels: {site: %s}\nspec: {pods: true, plain: true}\n", name, name))
	return s.Credential(name)
}

// Credential makes the credential of an edge and returns its path.
func (s *Site) Credential(name string) string {
	s.t.Helper()
	credential, err := s.Hub.Enroll(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	return credential
}

// Edge enrolls an edge and makes it, behind a link of its own. extra is YAML for its configuration.
func (s *Site) Edge(name, extra string) *rig.Edge {
	s.t.Helper()
	return s.Box(name, s.Enroll(name), extra)
}

// Box makes an edge with a credential that exists, behind the links of that name.
func (s *Site) Box(name, credential, extra string) *rig.Edge {
	s.t.Helper()
	for target, links := range map[string]map[string]*rig.Link{s.Hub.MQTT: s.Links, s.Hub.HTTP: s.Files} {
		if links[name] == nil {
			k, err := rig.NewLink(target)
			if err != nil {
				s.t.Fatal(err)
			}
			links[name] = k
		}
	}
	e, err := rig.NewEdge(s.bin, s.t.TempDir(), name, credential, s.Links[name].Addr(), s.Files[name].Addr(), extra)
	if err != nil {
		s.t.Fatal(err)
	}
	return e
}

// Cut cuts an edge's links.
func (s *Site) Cut(name string) {
	s.Links[name].Cut()
	s.Files[name].Cut()
}

// Restore restores an edge's links.
func (s *Site) Restore(name string) {
	s.Links[name].Restore()
	s.Files[name].Restore()
}

// Start starts an edge and waits until it is alive.
func (s *Site) Start(e *rig.Edge) {
	s.t.Helper()
	if err := e.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	s.EndWithTest(e.Process)
}

// Knows says whether the hub has an Edge of that name.
func (s *Site) Knows(name string) error {
	edges, err := s.Hub.Edges(s.t.Context())
	if _, ok := edges[name]; err == nil && !ok {
		err = fmt.Errorf("the hub does not know %s", name)
	}
	return err
}

// Holds says whether the edge holds exactly these pods, and confirms so to the hub if it is linked.
func (s *Site) Holds(e *rig.Edge, linked bool, pods ...string) error {
	st, err := e.Status(s.t.Context())
	if err != nil {
		return err
	}
	var names []string
	for _, p := range st.Pods {
		names = append(names, p.Name)
	}
	slices.Sort(names)
	if !slices.Equal(names, pods) || linked && !st.List.Synced {
		return fmt.Errorf("%s holds %v, synced %t (link %s %s)", e.Name, names, st.List.Synced, st.Link.State, st.Link.Error)
	}
	if !linked {
		return nil
	}
	edges, err := s.Hub.Edges(s.t.Context())
	if h := edges[e.Name]; err == nil && (!h.Synced || len(h.Pods) != len(pods)) {
		err = fmt.Errorf("the hub has of %s: %+v", e.Name, h)
	}
	return err
}

// LinkIs says whether an edge's link is in that state.
func (s *Site) LinkIs(e *rig.Edge, state string) error {
	st, err := e.Status(s.t.Context())
	if err == nil && st.Link.State != state {
		err = fmt.Errorf("link is %s %s", st.Link.State, st.Link.Error)
	}
	return err
}

// Drained says whether the edge holds nothing any more and the hub's account of the stream is balanced.
func (s *Site) Drained(e *rig.Edge, stream string) error {
	st, err := e.Status(s.t.Context())
	if err != nil {
		return err
	}
	sum, err := s.Hub.Sum(s.t.Context(), e.Name, stream)
	if held := st.Stream(stream).Held; err == nil && (held > 0 || !sum.Balanced() || sum.Accepted == 0) {
		err = fmt.Errorf("held %d, %+v", held, sum)
	}
	return err
}

// CheckRecords holds what the sink has of an edge's readings against what devices were promised: every acknowledged number is
// there, once unless it had to be sent again, and no record is there twice under one name. It returns how many records are
// of nobody among the devices.
func (s *Site) CheckRecords(edge string, devices ...*Numbers) (others int) {
	s.t.Helper()
	records, err := s.Hub.Records(s.t.Context(), edge, "readings")
	if err != nil {
		s.t.Fatal(err)
	}
	names, times := map[string]bool{}, map[string]int{}
	for _, r := range records {
		name := fmt.Sprintf("%s/%d", r.Epoch, r.Sequence)
		if names[name] {
			s.t.Errorf("record %s is there twice", name)
		}
		names[name] = true
		times[numberOf(r.Payload)]++
	}
	for _, n := range devices {
		acked, sent := n.promised()
		for number, again := range acked {
			if c := times[number]; c == 0 || c > 1 && !again {
				s.t.Errorf("acknowledged reading %s is %d times in the sink", number, c)
			}
		}
		for i := range sent {
			delete(times, n.number(i+1))
		}
		if len(acked) == 0 {
			s.t.Errorf("nothing of %s was acknowledged", n.Device.ClientID)
		}
	}
	for _, c := range times {
		others += c
	}
	return others
}
