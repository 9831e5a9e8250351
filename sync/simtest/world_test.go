package simtest

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what happens into testdata")

// TestScripts: each script in testdata says in its first lines what a user would lose.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) { runScript(t, f) })
	}
}

// runScript runs blocks of commands, each followed by "----" and what has to happen, up to an empty line.
func runScript(t *testing.T, file string) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	w := NewWorld(1)
	var out strings.Builder
	for block := range strings.SplitSeq(strings.TrimRight(string(b), "\n"), "\n\n") {
		commands, want, _ := strings.Cut(block, "\n----")
		want = strings.TrimPrefix(want, "\n")
		var got []string
		for line := range strings.SplitSeq(commands, "\n") {
			if strings.HasPrefix(line, "#") {
				continue
			}
			lines, err := w.Exec(line)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			got = append(got, lines...)
		}
		text := strings.Join(got, "\n")
		if text != want && !*update {
			t.Errorf("%s:\n%s\n---- got\n%s\n---- want\n%s", file, commands, text, want)
		}
		out.WriteString(commands)
		if text != "" {
			out.WriteString("\n----\n" + text)
		}
		out.WriteString("\n\n")
	}
	for _, f := range w.Failures() {
		t.Error(f)
	}
	if *update {
		if err := os.WriteFile(file, []byte(strings.TrimRight(out.String(), "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestG1SlowLink: at 64 kbit/s with 2 s of round trip, an edge that asks again too early would fill the link with what is
// on its way already, and never be done.
func TestG1SlowLink(t *testing.T) {
	for _, rate := range []int{8_000, 80_000, 10_000_000} {
		w := NewWorld(1)
		var lines []string
		for _, c := range []string{
			"hub h1", "edge e1", "put e1 cm/big v1 900000", "put e1 pod/a v1 100", "put e1 model/m v1 3000",
			fmt.Sprintf("link rate=%d delay=1s", rate), "connect e1 h1",
		} {
			if _, err := w.Exec(c); err != nil {
				t.Fatal(err)
			}
		}
		start := w.now
		for w.box("e1").disk.kept.list == nil && w.now.Sub(start).Minutes() < 10 {
			more, err := w.Exec("run 1s")
			if err != nil {
				t.Fatal(err)
			}
			lines = append(lines, more...)
		}
		asked := make(map[string]int)
		for _, l := range lines {
			if strings.Contains(l, " fetch ") {
				asked[l]++
			}
		}
		for l, n := range asked {
			if n > 1 {
				t.Errorf("%d bytes/s: %d times %q", rate, n, l)
			}
		}
		moved := w.box("e1").conn.bytes
		if moved > 930_000 {
			t.Errorf("%d bytes/s: %d bytes moved for 903,000", rate, moved)
		}
		took := w.now.Sub(start).Seconds()
		t.Logf("%d bytes/s: %.0f s, %d requests, %d bytes", rate, took, len(asked), moved)
		// In virtual time, so nothing here depends on the machine: the link is used for more than half of its worth.
		if best := 903_000/float64(rate) + 14; took > 2*best {
			t.Errorf("%d bytes/s: took %.0f s, the link needs %.0f", rate, took, best)
		}
	}
}

// history is a random list of commands.
func history(seed uint64) []string {
	rng := rand.New(rand.NewPCG(seed, 2))
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	boxes := []string{"e1", "e2"}
	h := []string{"hub h1", "hub h2", "edge e1", "edge e2"}
	if rng.IntN(3) == 0 {
		h = append(h, fmt.Sprintf("link delay=%dms lose=%d repeat=%d damage=%d", rng.IntN(3000), rng.IntN(30), rng.IntN(20), rng.IntN(5)))
	}
	if rng.IntN(5) == 0 {
		h = append(h, "link rate=8000 delay=1s")
	}
	cloned := false
	for n := 10 + rng.IntN(50); n > 0; n-- {
		b := pick(boxes...)
		switch k := rng.IntN(100); {
		case k < 25:
			o := pick("pod", "cm", "secret", "model") + "/" + pick("a", "b", "c")
			size := 0
			switch rng.IntN(12) {
			case 0:
				size = 40_000 + rng.IntN(100_000)
			case 1, 2:
				size = rng.IntN(20_000)
			}
			h = append(h, fmt.Sprintf("put %s %s v%d %d", pick("e1", "e1", "e2"), o, rng.IntN(4), size))
		case k < 30:
			h = append(h, "del "+pick("e1", "e2")+" "+pick("pod", "cm", "secret", "model")+"/"+pick("a", "b", "c"))
		case k < 55:
			h = append(h, "run "+pick("5ms", "30ms", "100ms", "1s", "7s", "40s"))
		case k < 68:
			h = append(h, "connect "+b+" "+pick("h1", "h2"))
		case k < 73:
			h = append(h, "cut "+b)
		case k < 77:
			h = append(h, "power "+b)
		case k < 79:
			h = append(h, "crash "+b)
		case k < 81:
			h = append(h, "full "+b)
		case k < 85:
			h = append(h, "lag "+pick("h1", "h2"))
		case k < 89:
			h = append(h, "watch "+pick("h1", "h2")+pick("", " 1", " 2"))
		case k < 91:
			h = append(h, "restart "+pick("h1", "h2"))
		case k < 92:
			h = append(h, fmt.Sprintf("restore %d", rng.IntN(10)))
		case k < 96:
			h = append(h, "forge "+b)
		case k < 98:
			h = append(h, fmt.Sprintf("link delay=%dms lose=%d", rng.IntN(500), rng.IntN(20)))
		case !cloned:
			cloned = true
			boxes = append(boxes, "twin")
			h = append(h, "clone twin e1", "connect twin "+pick("h1", "h2"))
		}
	}
	return append(h, "heal", "forge e1", "heal")
}

// play returns the promises that a history breaks.
func play(seed uint64, commands []string) []error {
	w := NewWorld(seed)
	w.Quiet = true
	for _, c := range commands {
		if _, err := w.Exec(c); err != nil {
			return append(w.Failures(), err)
		}
		if len(w.Failures()) > 0 {
			break
		}
	}
	return w.Failures()
}

// shorten leaves commands out while the history still fails.
func shorten(seed uint64, commands []string) []string {
	for size := len(commands) / 2; size > 0; size /= 2 {
		for at := 0; at+size <= len(commands); {
			less := append(append([]string(nil), commands[:at]...), commands[at+size:]...)
			if broken(play(seed, less)) {
				commands = less
			} else {
				at += size
			}
		}
	}
	return commands
}

// broken tells a broken promise from a history that names what it left out.
func broken(errs []error) bool { return len(errs) > 0 && strings.HasPrefix(errs[0].Error(), "G") }

// TestRandomHistories guards G1, G2 and G5: whatever is lost, repeated, late, cut or forged, edges converge to what the
// cluster says, never go back, hold a whole state after a power cut, and believe only their hub. LONGSHORE_HISTORIES sets how
// many histories are tried (10,000; under the race detector, which takes ten times as long, 500), LONGSHORE_SEED the first.
func TestRandomHistories(t *testing.T) {
	number := 10_000
	if raceDetector() {
		number = 500
	}
	number, first := setting(t, "LONGSHORE_HISTORIES", number), setting(t, "LONGSHORE_SEED", 0)
	for i := range number {
		seed := uint64(first + i)
		commands := history(seed)
		errs := play(seed, commands)
		if len(errs) == 0 {
			continue
		}
		if broken(errs) {
			commands = shorten(seed, commands)
		}
		w := NewWorld(seed)
		for _, c := range commands {
			lines, err := w.Exec(c)
			t.Logf("%s\n\t%s", c, strings.Join(lines, "\n\t"))
			if err != nil {
				t.Log(err)
			}
		}
		t.Fatalf("seed %d breaks: %v\nshortened:\n%s", seed, errs, strings.Join(commands, "\n"))
	}
}

func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}

func setting(t *testing.T, name string, value int) int {
	if s := os.Getenv(name); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	return value
}
