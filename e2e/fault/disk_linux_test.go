package fault

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// allocated returns the bytes that a file takes on its disk.
func allocated(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}

// smallDisk makes a folder a file system of its own, of so many MiB, until the test ends.
func smallDisk(t *testing.T, dir string, mib int) {
	t.Helper()
	rigtest.NeedRoot(t, "a small file system")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("longshore-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
		t.Fatal("mount a small file system:", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// warned says whether the edge's status tells people what to do about the disk.
func warned(ctx context.Context, e *rig.Edge) error {
	st, err := e.Status(ctx)
	if err == nil && !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "free some space") }) {
		err = fmt.Errorf("warnings: %q", st.Warnings)
	}
	return err
}

// fillUp publishes until the edge takes no more.
func fillUp(t *testing.T, n *rigtest.Numbers) {
	t.Helper()
	for range 5000 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err := n.Publish(ctx, 1)
		cancel()
		if err != nil {
			return
		}
	}
	t.Fatal("the disk never filled up")
}

// G2, G3 and G4: the link is down for so long that readings of a stream that refuses rather than drops fill the disk. Devices
// get no PUBACK then, the status says what to do, the box still boots, and once the link is back it delivers everything and
// takes readings again, without help.
func TestG2G3G4ReadingsFillTheDisk(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	e := s.Edge("dock-1", rigtest.Readings+"  policy: refuse\n")
	smallDisk(t, e.State(), 72)
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 1)
	settled(t, s, e, "a")
	s.Cut("dock-1")
	n.Filler = rigtest.Noise(100 << 10)
	fillUp(t, n)
	if err := warned(t.Context(), e); err != nil {
		t.Error(err)
	}
	out, err := bin.Run(t.Context(), "edgehub", "status", "--state", e.State())
	if err != nil || !strings.Contains(out, "messages refused, the newest because:") {
		t.Errorf("the status must say that messages are refused: %v\n%s", err, out)
	}
	e.Kill()
	s.Start(e)
	if err := s.Holds(e, false, "a"); err != nil {
		t.Error("after a boot with a full disk:", err)
	}
	s.Restore("dock-1")
	settled(t, s, e, "a")
	n.Filler = ""
	publishNow(t, n, 10)
	settled(t, s, e, "a")
	s.CheckRecords("dock-1", n)
}

// G1 and G3: something else fills the disk to the last byte. Nothing acknowledged is lost, nothing is acknowledged that is not
// on disk, a change of the specs waits, and all goes on by itself when there is space again.
func TestG1G3SomethingElseFillsTheDisk(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	e := s.Edge("dock-1", rigtest.Readings)
	smallDisk(t, e.State(), 96)
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 50)
	settled(t, s, e, "a")

	ballast := filepath.Join(e.State(), "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if cerr := f.Close(); !errors.Is(err, unix.ENOSPC) || cerr != nil {
		t.Fatal("fill the disk:", err, cerr)
	}
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	n.Filler = rigtest.Noise(8 << 10)
	fillUp(t, n)
	rigtest.Eventually(t, "the status says what to do", func() error { return warned(t.Context(), e) })
	rigtest.Eventually(t, "the status says that specs can't be stored", func() error {
		st, err := e.Status(t.Context())
		if err == nil && !strings.Contains(st.List.Error, "free some space") {
			err = fmt.Errorf("%+v", st.List)
		}
		return err
	})
	if err := s.Holds(e, false, "a"); err != nil {
		t.Error("while the disk is full:", err)
	}

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	publishNow(t, n, 10)
	settled(t, s, e, "a", "b")
	s.CheckRecords("dock-1", n)
}

// G1 and G4: a model that does not fit the disk must be refused with a reason, and must not take the room that specs need: the
// edge still follows the folder.
func TestG1G4ModelDoesNotFitTheDisk(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", "")
	smallDisk(t, e.State(), 96)
	s.Start(e)
	content := []byte(rigtest.Noise(72 << 20))
	if err := os.WriteFile(filepath.Join(s.Hub.Models(), "large.onnx"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	s.Write("model.yaml", fmt.Sprintf("apiVersion: longshore.dev/v1alpha1\nkind: Model\nmetadata: {name: large, namespace: default}\nspec:\n  version: \"1\"\n  edgeSelector: {}\n  variants:\n  - {name: fp32, format: onnx, source: {uri: \"file:large.onnx\"}, digest: \"sha256:%x\", sizeBytes: %d}\n",
		sha256.Sum256(content), len(content)))
	rigtest.Eventually(t, "the model is refused", func() error {
		st, err := e.Status(t.Context())
		if err != nil {
			return err
		}
		m, err := st.Model("large")
		if err == nil && (m.Reason != "DiskFull" || !strings.Contains(m.Message, "free some space")) {
			err = fmt.Errorf("%+v", m)
		}
		return err
	})
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	rigtest.Eventually(t, "specs go on", func() error { return s.Holds(e, true, "a") })
}

// G2 and G3: the disk lost a part of the store. It is moved aside, the status says so, everything is fetched again, and the
// readings, which are kept elsewhere, are delivered.
func TestG2G3CorruptStore(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	s.Write("a.yaml", rigtest.PodManifest("a", "dock-1", "v1"))
	e := s.Edge("dock-1", rigtest.Readings)
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 20)
	settled(t, s, e, "a")
	s.Cut("dock-1")
	linkIs(t, s, e, "down")
	publishNow(t, n, 50)
	stop(t, e)
	files, err := filepath.Glob(filepath.Join(e.State(), "desired", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			b[i] ^= 0x55
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.Start(e)
	if moved, err := filepath.Glob(filepath.Join(e.State(), "desired.corrupt-*")); err != nil || len(moved) != 1 {
		t.Errorf("moved aside: %q, %v", moved, err)
	}
	st, err := e.Status(t.Context())
	if err != nil || !slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "moved aside") }) {
		t.Errorf("the status must say so: %q, %v", st.Warnings, err)
	}
	s.Write("b.yaml", rigtest.PodManifest("b", "dock-1", "v1"))
	s.Restore("dock-1")
	settled(t, s, e, "a", "b")
	s.CheckRecords("dock-1", n)
	noDuplicates(t, s, "dock-1")
}

// G3: a bit flips in a file of readings that wait. That costs the records of the one batch it stands in, which are in the
// ledger; everything else is delivered.
func TestG3FlippedBitCostsOneBatch(t *testing.T) {
	t.Parallel()
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	e := s.Edge("dock-1", rigtest.Readings)
	s.Start(e)
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 1)
	settled(t, s, e)
	s.Cut("dock-1")
	linkIs(t, s, e, "down")
	publishNow(t, n, 60) // one at a time: each is a batch of its own
	stop(t, e)
	segments, err := filepath.Glob(filepath.Join(e.State(), "outbox", "epochs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	flipped := 0
	for _, path := range segments {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if at := bytes.Index(b, []byte("press-000030")); at >= 0 {
			b[at+8] ^= 1
			flipped++
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if flipped != 1 {
		t.Fatalf("%d files hold the reading: the test shows nothing", flipped)
	}
	s.Start(e)
	s.Restore("dock-1")
	settled(t, s, e)
	if sum := account(t, s, "dock-1"); sum.Accepted != 61 || sum.Delivered != 60 || sum.Ledgered != 1 {
		t.Errorf("the account: %+v", sum)
	}
	records, err := s.Hub.Records(t.Context(), "dock-1", "readings")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if strings.HasPrefix(r.Payload, "press-000030") {
			t.Error("the damaged reading was delivered")
		}
	}
	if len(records) != 60 {
		t.Errorf("%d readings in the sink, want 60", len(records))
	}
	noDuplicates(t, s, "dock-1")
}
