package infer

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/space"
)

func flipByte(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// bulky is a good model file of some size.
func bulky(name string, size int) []byte {
	return fault{Pad: name + strings.Repeat("x", size)}.file()
}

// If this fails, a slow and broken link never gets a model through, because each cut starts from the beginning (G1).
func TestDownloadResumes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := newHub(t)
	h.cut.Store(100 << 10)
	file := bulky("big", 1<<20)
	spec := h.modelOf("big", "1", file)
	e := startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(spec))
	e.until("half of the file is here", func() bool { return e.report("big").BytesDone > 512<<10 })
	if r := e.report("big"); r.BytesTotal != uint64(len(file)) {
		t.Errorf("report %v", r)
	}
	// A restart keeps what is here.
	e.stop()
	e = startEdge(t, dir, h, nil, nil)
	e.m.SetDesired(specs(spec))
	e.serves("big", "1")
	// What was on its way when a connection was cut may be sent twice, and no more.
	if sent, most := h.sent.Load(), int64(len(file))+h.asked.Load()*(64<<10); sent > most {
		t.Errorf("%d bytes sent in %d answers for a file of %d", sent, h.asked.Load(), len(file))
	}
	if n := h.asked.Load(); n < 10 {
		t.Errorf("only %d requests: nothing was cut", n)
	}
}

// If this fails, a file that is not what the model says is loaded, or a hub that has been repaired is not asked again.
func TestDigestAndSizeMismatch(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
	spec := h.model("adder", "2", fault{})
	v := spec.Variants[0]
	h.mu.Lock()
	right := h.files[v.Digest]
	wrong := bytes.Repeat([]byte{'?'}, len(right))
	h.files[v.Digest] = wrong
	h.mu.Unlock()
	e.m.SetDesired(specs(spec))
	e.failed("adder", reasonDigestMismatch, "1")
	e.until("the wrong file is gone", func() bool { return e.m.files.have(v.Digest) == 0 })
	h.mu.Lock()
	h.files[v.Digest] = append(right, "and more"...)
	h.mu.Unlock()
	e.failed("adder", reasonSizeMismatch, "1")
	if e.infers("adder") != "1" {
		t.Error("the old version does not answer")
	}
	h.mu.Lock()
	h.files[v.Digest] = right
	h.mu.Unlock()
	e.serves("adder", "2")
}

// If this fails, a power cut at some step of a download leaves a file that is loaded though it is damaged, or one that blocks
// the model for good (G2). Each case is what the disk may hold after such a cut.
func TestPowerCutWhileStaging(t *testing.T) {
	t.Parallel()
	file := bulky("adder", 200<<10)
	damaged := bytes.Clone(file)
	damaged[100] ^= 1
	for name, c := range map[string]struct {
		part, final []byte
		fetched     int64 // bytes that must come from the hub
	}{
		"nothing":                      {nil, nil, int64(len(file))},
		"empty partial file":           {[]byte{}, nil, int64(len(file))},
		"half of it":                   {file[:100<<10], nil, int64(len(file) - 100<<10)},
		"all of it, not renamed":       {file, nil, 0},
		"half of it, damaged":          {damaged[:100<<10], nil, int64(len(file)-100<<10) + int64(len(file))},
		"all of it, damaged":           {damaged, nil, int64(len(file))},
		"more than it, never synced":   {append(bytes.Clone(file), 0, 0, 0), nil, int64(len(file))},
		"final":                        {nil, file, 0},
		"final, damaged on the disk":   {nil, damaged, int64(len(file))},
		"final, empty":                 {nil, []byte{}, int64(len(file))},
		"final and an old partial one": {file[:10], file, 0},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			dir, err := os.MkdirTemp("", "cut")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			h := newHub(t)
			spec := h.modelOf("adder", "1", file)
			fn, err := fileName(spec.Variants[0].Digest)
			if err != nil {
				t.Fatal(err)
			}
			f, err := openFiles(filepath.Join(dir, "files"), 1<<30, 0)
			if err != nil {
				t.Fatal(err)
			}
			for suffix, b := range map[string][]byte{partSuffix: c.part, "": c.final} {
				if b != nil {
					if err := os.WriteFile(filepath.Join(f.dir, fn+suffix), b, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			for tries := 1; ; tries++ {
				err := f.download(t.Context(), h, spec.Variants[0].Digest, int64(len(file)), time.Minute, func(int64) {})
				if err == nil {
					break
				}
				if tries == 2 {
					t.Fatalf("second try: %v", err)
				}
			}
			got, err := os.ReadFile(f.path(spec.Variants[0].Digest))
			if err != nil || !bytes.Equal(got, file) {
				t.Fatalf("the file is not what it should be: %v", err)
			}
			if n := h.sent.Load(); n != c.fetched {
				t.Errorf("%d bytes came from the hub, want %d", n, c.fetched)
			}
		})
	}
}

// If this fails, models fill the disk of a small box (G4), or one that does not fit can't be told from one that is broken.
func TestDiskQuota(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	small, big := bulky("small", 300<<10), bulky("big", 800<<10)
	e := startEdge(t, t.TempDir(), h, func(c *Config) { c.DiskQuota = 1 << 20 }, nil)
	keep := h.modelOf("small", "1", small)
	e.m.SetDesired(specs(keep))
	e.serves("small", "1")
	e.isGood("small", "1")
	large := h.modelOf("big", "1", big)
	e.m.SetDesired(specs(keep, large))
	if r := e.failed("big", reasonDiskQuota, ""); !strings.Contains(r.Message, "the quota is 1048576 (models.diskQuota)") {
		t.Errorf("message %q", r.Message)
	}
	if r := e.report("small"); r.State != longshorepb.ModelState_MODEL_STATE_SERVING {
		t.Errorf("the other model: %v", r)
	}
	// A second version needs room beside the first, which must stay until the second has proven itself.
	e.m.SetDesired(specs(h.modelOf("small", "2", bulky("small2", 900<<10))))
	e.failed("small", reasonDiskQuota, "1")
	// Room is made by what goes.
	e.m.SetDesired(specs(large))
	e.serves("big", "1")
	if used, quota := e.m.DiskUsage(); used > quota {
		t.Errorf("%d bytes on disk, quota %d", used, quota)
	}
}

// If this fails, downloads take the whole of a thin link although a rate was set, or a silent hub stops them for good.
func TestDownloadRate(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	file := bulky("adder", 100<<10)
	digest := h.put(file)
	f, err := openFiles(t.TempDir(), 1<<30, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := f.download(t.Context(), h, digest, int64(len(file)), time.Minute, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	// (100 KiB - a burst of 16 KiB) at 64 KiB/s; the bound is from below, so a slow machine does not matter.
	if took := time.Since(began); took < time.Second {
		t.Errorf("100 KiB took %v at 64 KiB/s", took)
	}
}

// Two downloads at once must not eat up together what each alone leaves free: the store of desired state and telemetry need it.
func TestDownloadsAtOnceKeepTheReserve(t *testing.T) {
	f, err := openFiles(t.TempDir(), 1<<50, 0)
	if err != nil {
		t.Fatal(err)
	}
	free, size, err := space.Of(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	room := free - min(maxReserve, size/3)
	if room <= 0 {
		t.Fatalf("only %d MiB are free below %s: the test needs more", free>>20, f.dir)
	}
	most := room / 4 * 3 // fits alone, not twice; the rest is for what others write meanwhile
	release, err := f.reserve("a", most)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.claim("a", most); err != nil {
		t.Fatal("the first download:", err)
	}
	var failed *failure
	if err := f.claim("b", most); !errors.As(err, &failed) || failed.reason != reasonDiskFull {
		t.Errorf("the second download: %v, want %s", err, reasonDiskFull)
	}
	release()
	if err := f.claim("b", most); err != nil {
		t.Error("the second download after the first:", err)
	}
}
