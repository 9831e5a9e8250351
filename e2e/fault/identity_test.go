package fault

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// copyState makes dst hold what src holds, as an image of a disk would. No agent runs on either.
func copyState(t *testing.T, dst, src string) {
	t.Helper()
	if err := os.RemoveAll(dst); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dst, os.DirFS(src)); err != nil {
		t.Fatal(err)
	}
}

// stop ends an edge in order.
func stop(t *testing.T, e *rig.Edge) {
	t.Helper()
	if err := e.Stop(rigtest.Soon); err != nil {
		t.Fatal(err)
	}
}

// publishNow publishes readings that must all be acknowledged soon.
func publishNow(t *testing.T, n *rigtest.Numbers, count int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	if err := n.Publish(ctx, count); err != nil {
		t.Fatal(err)
	}
}

// linkIs waits for a state of an edge's link.
func linkIs(t *testing.T, s *rigtest.Site, e *rig.Edge, state string) {
	t.Helper()
	rigtest.Eventually(t, "the link is "+state, func() error { return s.LinkIs(e, state) })
}

// noDuplicates fails if a stream's account shows two records under one name, or one name with two contents.
func noDuplicates(t *testing.T, s *rigtest.Site, edge string) {
	t.Helper()
	if sum := account(t, s, edge); sum.Duplicates+sum.Conflicts > 0 || !sum.Balanced() {
		t.Errorf("the account of %s: %+v", edge, sum)
	}
}

// G1 and G3: a box whose disk was replaced comes up under its old name, gets what the folder says, and its readings, which
// count from one again, are taken for new ones.
func TestG1G3ReimagedEdge(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings)
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 50)
	settled(t, s, e, "a")

	e.Kill()
	if err := os.RemoveAll(e.State()); err != nil {
		t.Fatal(err)
	}
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	s.Start(e)
	publishNow(t, n, 50)
	settled(t, s, e, "a", "b")
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
	if sum := account(t, s, "dock-1"); sum.Delivered < 100 || sum.Ledgered > 0 {
		t.Errorf("the account: %+v", sum)
	}
}

// G3: two boxes made from one disk, both alive with one credential. The later one works, the earlier one stops syncing and
// says why; no reading of either is lost or taken for one of the other.
func TestG3ClonedBoxes(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	credential := s.Enroll("dock-1")
	first := s.Box("dock-1", credential, rigtest.Readings)
	second := s.Box("dock-1", credential, rigtest.Readings)
	s.Start(first)
	press := rigtest.NewNumbers(t, first, "press")
	publishNow(t, press, 20)
	settled(t, s, first, "a")
	// The image holds readings that are not delivered yet, so both boxes will deliver them.
	s.Cut("dock-1")
	linkIs(t, s, first, "down")
	publishNow(t, press, 20)
	stop(t, first)
	copyState(t, second.State(), first.State())
	s.Restore("dock-1")
	s.Start(first)
	settled(t, s, first, "a")

	s.Start(second)
	linkIs(t, s, first, "superseded")
	settled(t, s, second, "a")
	crane := rigtest.NewNumbers(t, second, "crane")
	publishNow(t, crane, 30)
	publishNow(t, press, 30) // kept on the first box, which does not sync
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	settled(t, s, second, "a", "b")
	if err := s.Holds(first, false, "a"); err != nil {
		t.Error("the superseded box must keep what it had:", err)
	}
	st, err := first.Status(t.Context())
	if err != nil || st.Link.State != "superseded" || st.Link.Error == "" || st.Stream("readings").Held < 30 {
		t.Errorf("the first box: %+v, %+v, %v", st.Link, st.Stream("readings"), err)
	}
	if edges, err := s.Hub.Edges(t.Context()); err != nil || edges["dock-1"].Link != "Online" || edges["dock-1"].Superseded != 1 {
		t.Errorf("the hub must show both boxes: %+v, %v", edges["dock-1"], err)
	}
	noDuplicates(t, s, "dock-1")

	// One box alone again, as after the repair: what the other still holds is delivered, too.
	stop(t, second)
	stop(t, first)
	s.Start(first)
	settled(t, s, first, "a", "b")
	s.CheckRecords("dock-1", press, crane)
	noDuplicates(t, s, "dock-1")
}

// G1 and G3: a box whose disk was set back to an older image holds what the folder says again, and what it delivers a
// second time is not counted twice.
func TestG1G3RolledBackDisk(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings)
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 20)
	settled(t, s, e, "a")
	s.Cut("dock-1")
	linkIs(t, s, e, "down")
	publishNow(t, n, 30) // stand in the image, not yet in the cloud
	stop(t, e)
	image := filepath.Join(t.TempDir(), "image")
	copyState(t, image, e.State())

	// Several starts go on from there: sessions, lists and readings that the image knows nothing of.
	s.Restore("dock-1")
	for i := range 3 {
		s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", fmt.Sprintf("v%d", i+2)))
		s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", fmt.Sprintf("v%d", i+2)))
		s.Start(e)
		publishNow(t, n, 30)
		settled(t, s, e, "a", "b")
		stop(t, e)
	}
	before := account(t, s, "dock-1")

	copyState(t, e.State(), image)
	if err := os.Remove(filepath.Join(s.Hub.Manifests(), "a.yaml")); err != nil {
		t.Fatal(err)
	}
	s.Start(e)
	settled(t, s, e, "b")
	publishNow(t, n, 30)
	settled(t, s, e, "b")
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
	if after := account(t, s, "dock-1"); after.Delivered != before.Delivered+30 {
		t.Errorf("the account went from %+v to %+v, want 30 more delivered", before, after)
	}
}

// G3: acknowledgements are lost, so the edge takes delivered readings for undelivered; a full quota then drops them. The
// ledger must not count as lost what the cloud has.
func TestG3LostAcknowledgementThenQuota(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings+"  maxBytes: 256KiB\n")
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 10)
	settled(t, s, e)

	// The hub keeps what it gets, but nothing of what it says arrives.
	s.Links["dock-1"].Mute(true)
	n.Filler = rigtest.Noise(2 << 10)
	publishNow(t, n, 5)
	rigtest.Eventually(t, "the cloud has them", func() error {
		if sum := account(t, s, "dock-1"); sum.Delivered < 15 {
			return fmt.Errorf("%+v", sum)
		}
		return nil
	})
	if st, err := e.Status(t.Context()); err != nil || st.Stream("readings").Held < 5 {
		t.Fatalf("the acknowledgement was not lost, so the test shows nothing: %+v, %v", st.Stream("readings"), err)
	}
	s.Cut("dock-1")
	s.Links["dock-1"].Mute(false)
	n.Filler = rigtest.Noise(8 << 10)
	publishNow(t, n, 60)
	st, err := e.Status(t.Context())
	if err != nil || st.Stream("readings").Dropped < 10 {
		t.Fatalf("the quota dropped too little to show anything: %+v, %v", st.Stream("readings"), err)
	}
	s.Restore("dock-1")
	settled(t, s, e)
	sum := account(t, s, "dock-1")
	records, err := s.Hub.Records(t.Context(), "dock-1", "readings")
	if err != nil || sum.Accepted != 75 || uint64(len(records)) != sum.Delivered || sum.Ledgered == 0 || sum.Ledgered >= st.Stream("readings").Dropped {
		t.Errorf("%d records in the sink, the edge dropped %d, the account: %+v, %v", len(records), st.Stream("readings").Dropped, sum, err)
	}
	noDuplicates(t, s, "dock-1")
}
