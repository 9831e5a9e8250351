package bearing

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// The committed models and the accuracy that README.md states for them.
var models = []struct {
	version  string
	accuracy float64
}{{"1", Accuracy1}, {"2", Accuracy2}}

const (
	// A seed of its own: neither training nor the trainer's measurement has seen these machines.
	freshSeed = 3
	freshSize = 800
	// margin is three standard deviations of a measurement this small.
	margin = 0.035
	batch  = 100
)

// A user who trusts the demo must find that the committed files really do what the README says, on both engines, on data
// nobody has seen before; and that it does not matter which engine an edge happens to have.
func TestCommittedModelsKeepTheirPromise(t *testing.T) {
	worker := filepath.Join(t.TempDir(), "longshore-worker")
	build := exec.Command("go", "build", "-o", worker, "../../edgehub/worker")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	windows, conditions := Dataset(freshSeed, freshSize)
	for _, m := range models {
		if stated := fmt.Sprintf("%.1f%%", 100*m.accuracy); !strings.Contains(string(readme), stated) {
			t.Errorf("README.md does not state the accuracy of version %s, %s", m.version, stated)
		}
		var first [][]float32
		for _, engine := range []string{"gomlx", "onnxruntime"} {
			t.Run("version "+m.version+" on "+engine, func(t *testing.T) {
				infer := serve(t, worker, engine, m.version)
				var probabilities [][]float32
				for some := range slices.Chunk(windows, batch) {
					probabilities = append(probabilities, infer(some)...)
				}
				right := 0
				for i, p := range probabilities {
					if Condition(slices.Index(p, slices.Max(p))) == conditions[i] {
						right++
					}
					for j := range p {
						if first != nil && math.Abs(float64(p[j]-first[i][j])) > 1e-3 {
							t.Fatalf("window %d: engines disagree: %v, %v", i, p, first[i])
						}
					}
				}
				first = probabilities
				got := float64(right) / float64(len(windows))
				t.Logf("accuracy %.1f%%, stated %.1f%%", 100*got, 100*m.accuracy)
				if got < m.accuracy-margin {
					t.Errorf("accuracy is %.1f%%, %.1f%% is stated", 100*got, 100*m.accuracy)
				}
			})
		}
	}
}

// serve starts a worker and returns a function that infers a batch of windows.
func serve(t *testing.T, worker, engine, version string) func([][]float32) [][]float32 {
	socket := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, worker, "--model", "bearing-"+version+".onnx", "--name", "bearing", "--version", version,
		"--socket", socket, "--engine", engine)
	var log lockedBuffer
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	line, err := bufio.NewReader(out).ReadBytes('\n')
	var first struct {
		Ready  bool
		Reason string
	}
	if err == nil {
		err = json.Unmarshal(line, &first)
	}
	switch {
	case err != nil:
		t.Fatalf("worker's first line: %q: %v\n%s", line, err, log.String())
	case first.Reason == "NoEngine" && os.Getenv("LONGSHORE_REQUIRE_ORT") != "1":
		t.Skipf("NOT TESTED on %s: %s", engine, line)
	case !first.Ready:
		t.Fatalf("worker is not ready: %s (run \"make onnxruntime\"?)", line)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	t.Cleanup(client.CloseIdleConnections)
	return func(windows [][]float32) [][]float32 { return infer(t, client, windows) }
}

func infer(t *testing.T, client *http.Client, windows [][]float32) [][]float32 {
	t.Helper()
	body, err := json.Marshal(map[string]any{"inputs": []any{map[string]any{
		"name": "vibration", "shape": []int{len(windows), Window}, "datatype": "FP32", "data": windows}}})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Post("http://worker/v2/models/bearing/infer", "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	var result struct {
		Outputs []struct {
			Name  string
			Shape []int
			Data  []float32
		}
	}
	if err == nil {
		err = json.Unmarshal(text, &result)
	}
	if err != nil || resp.StatusCode != http.StatusOK || len(result.Outputs) != 1 ||
		!slices.Equal(result.Outputs[0].Shape, []int{len(windows), int(Conditions)}) {
		t.Fatalf("%s: %v\n%.300s", resp.Status, err, text)
	}
	return slices.Collect(slices.Chunk(result.Outputs[0].Data, int(Conditions)))
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A model file must stay small enough to travel over a 64 kbit/s link within half a minute, as the demo shows it.
func TestModelsAreSmall(t *testing.T) {
	for _, m := range models {
		info, err := os.Stat("bearing-" + m.version + ".onnx")
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 200<<10 {
			t.Errorf("%s has %d bytes", info.Name(), info.Size())
		}
	}
}

// Without equal data from equal seeds the stated accuracy could not be checked by anybody.
func TestDatasetRepeats(t *testing.T) {
	a, conditions := Dataset(7, 8)
	b, _ := Dataset(7, 8)
	c, _ := Dataset(8, 8)
	for i := range a {
		if len(a[i]) != Window || !slices.Equal(a[i], b[i]) || slices.Equal(a[i], c[i]) || conditions[i] != Condition(i%4) {
			t.Fatalf("window %d", i)
		}
	}
}

// The faults must strike in the rhythm the textbook gives for this bearing: otherwise the demo teaches nonsense.
func TestFaultFrequencies(t *testing.T) {
	m := NewMachine(rand.New(rand.NewPCG(1, 1)), Normal)
	if m.period() != 0 {
		t.Error("a healthy bearing strikes")
	}
	for c, multiple := range map[Condition]float64{InnerRace: 5.4152, OuterRace: 3.5848, Ball: 4.7135} {
		m.SetCondition(c)
		if got := 1 / m.period() / m.speed; math.Abs(got-multiple) > 0.002 {
			t.Errorf("%s: %.4f strikes per turn, the data sheet says %.4f", c, got, multiple)
		}
	}
}
