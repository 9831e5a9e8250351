package fault

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// metric reads one value of a metrics page.
func metric(t *testing.T, address, name string) float64 {
	t.Helper()
	b, err := rig.Get(t.Context(), "http://"+address+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	t.Fatalf("no metric %s at %s", name, address)
	return 0
}

// diskUse sums the blocks that the files below a folder take, in bytes. Files that vanish meanwhile don't count.
func diskUse(dir string) int64 {
	var sum int64
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil
		}
		if size, err := allocated(path); err == nil {
			sum += size
		}
		return nil
	})
	return sum
}

// gauge is what one process took at one time.
type gauge struct {
	memory, goroutines, files float64
	disk                      int64
}

func (g gauge) String() string {
	return fmt.Sprintf("memory %.0f MiB, goroutines %.0f, open files %.0f, disk %.1f MiB", g.memory/(1<<20), g.goroutines, g.files, float64(g.disk)/(1<<20))
}

// gauges watches what a storm costs, once a minute.
type gauges struct {
	k           *storm
	began, last time.Time
	rounds      uint64
	seen        map[string][]gauge // by process
}

func newGauges(k *storm) *gauges {
	return &gauges{k: k, began: time.Now(), last: time.Now(), seen: map[string][]gauge{}}
}

func (g *gauges) read(address, dir string) gauge {
	m := func(name string) float64 { return metric(g.k.t, address, name) }
	return gauge{m("process_resident_memory_bytes"), m("go_goroutines"), m("process_open_fds"), diskUse(dir)}
}

// print writes a line per process when a minute is over.
func (g *gauges) print(round uint64) {
	g.rounds = round
	if time.Since(g.last) >= time.Minute {
		g.look()
	}
}

func (g *gauges) look() {
	g.last = time.Now()
	now := map[string]gauge{"cloudhub": g.read(g.k.Hub.HTTP, g.k.Hub.Data())}
	for _, e := range g.k.edges {
		now[e.Name] = g.read(e.HTTP, e.State())
	}
	for _, name := range slices.Sorted(maps.Keys(now)) {
		g.seen[name] = append(g.seen[name], now[name])
		// To the terminal at once: a soak is watched.
		fmt.Fprintf(os.Stderr, "%6s  round %d  %-9s %s\n", time.Since(g.began).Round(time.Second), g.rounds, name, now[name])
	}
}

func (g *gauges) summary() {
	g.look()
	var b strings.Builder
	acked := 0
	for _, e := range g.k.edges {
		for _, n := range g.k.load[e.Name] {
			acked += n.Count()
		}
	}
	fmt.Fprintf(&b, "%d rounds in %s, %d readings acknowledged, none lost, none twice\n", g.rounds, time.Since(g.began).Round(time.Second), acked)
	for _, kind := range slices.Sorted(maps.Keys(g.k.faults)) {
		fmt.Fprintf(&b, "%4d times %s\n", g.k.faults[kind], kind)
	}
	for _, name := range slices.Sorted(maps.Keys(g.seen)) {
		// A leak shows as a second half above the first.
		s := g.seen[name]
		half := len(s) / 2
		fmt.Fprintf(&b, "%-9s median of the first half:  %s\n", name, median(s[:max(1, half)]))
		fmt.Fprintf(&b, "%-9s median of the second half: %s\n", "", median(s[half:]))
	}
	fmt.Fprint(os.Stderr, b.String())
}

// median of each gauge by itself.
func median(all []gauge) gauge {
	of := func(value func(gauge) float64) float64 {
		var v []float64
		for _, g := range all {
			v = append(v, value(g))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return gauge{
		memory: of(func(g gauge) float64 { return g.memory }), goroutines: of(func(g gauge) float64 { return g.goroutines }),
		files: of(func(g gauge) float64 { return g.files }), disk: int64(of(func(g gauge) float64 { return float64(g.disk) })),
	}
}
