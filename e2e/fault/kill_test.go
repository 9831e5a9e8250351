package fault

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// storm is a site under load, and what was done to it.
type storm struct {
	*rigtest.Site
	t      *testing.T
	edges  []*rig.Edge
	load   map[string][]*rigtest.Numbers // by edge
	pods   map[string]map[string]bool    // by edge
	random *rand.Rand
	next   int // kind of fault
	faults map[string]int
}

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// G1, G2, G3 and G6: both hubs killed with kill -9 at random moments, and links cut, while specs change and devices publish.
// After every round the edges hold what the folder says, and every reading that was acknowledged is in the sink, none
// twice. ROUNDS or DURATION make it a soak, SEED repeats one.
func TestG1G2G3G6KillsUnderLoad(t *testing.T) {
	seed := number(t, "SEED", uint64(time.Now().UnixNano()))
	rounds := number(t, "ROUNDS", 5)
	var until time.Time
	if text := os.Getenv("DURATION"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal("DURATION:", err)
		}
		until, rounds = time.Now().Add(d), 0
	}
	t.Logf("SEED=%d", seed)
	k := newStorm(t, seed)
	gauges := newGauges(k)
	for round := uint64(1); round <= rounds || time.Now().Before(until); round++ {
		k.round(round)
		if t.Failed() {
			t.Fatalf("round %d with SEED=%d failed", round, seed)
		}
		gauges.print(round)
	}
	gauges.summary()
}

func newStorm(t *testing.T, seed uint64) *storm {
	k := &storm{
		Site: rigtest.NewSite(t, bin), t: t, load: map[string][]*rigtest.Numbers{}, pods: map[string]map[string]bool{},
		random: rand.New(rand.NewPCG(seed, 0)), faults: map[string]int{},
	}
	k.StartHub()
	for _, name := range []string{"dock-1", "dock-2"} {
		e := k.Edge(name, rigtest.Readings)
		k.edges = append(k.edges, e)
		k.pods[name] = map[string]bool{}
		for _, client := range []string{"press", "crane"} {
			n := rigtest.NewNumbers(t, e, client)
			n.Filler = rigtest.Noise(200)
			k.load[name] = append(k.load[name], n)
		}
		k.Start(e)
		k.change(e, 0)
	}
	return k
}

// change adds, changes or removes a pod of an edge.
func (k *storm) change(e *rig.Edge, version uint64) {
	pod := fmt.Sprintf("%s-%d", e.Name, k.random.IntN(6))
	file := pod + ".yaml"
	if k.pods[e.Name][pod] && len(k.pods[e.Name]) > 1 && k.random.IntN(2) == 0 {
		delete(k.pods[e.Name], pod)
		if err := os.Remove(filepath.Join(k.Hub.Manifests(), file)); err != nil {
			k.t.Fatal(err)
		}
		return
	}
	k.pods[e.Name][pod] = true
	k.Write(file, rigtest.PodManifest(pod, e.Name, fmt.Sprintf("v%d-%d", version, k.random.Uint32())))
}

// round is some seconds of load with a few faults at random moments, and then the proof that nothing came of them.
func (k *storm) round(number uint64) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), 2*rigtest.Soon)
	defer cancel()
	over := make(chan struct{})
	g, ctx := errgroup.WithContext(ctx)
	for _, numbers := range k.load {
		for _, n := range numbers {
			g.Go(func() error { return publish(ctx, n, over) })
		}
	}
	for range 3 {
		for range 3 {
			k.change(k.edges[k.random.IntN(len(k.edges))], number)
			k.pause(ctx, 150)
		}
		k.fault(ctx)
	}
	close(over)
	if err := g.Wait(); err != nil {
		k.t.Fatal(err)
	}
	for _, e := range k.edges {
		settled(k.t, k.Site, e, slices.Sorted(maps.Keys(k.pods[e.Name]))...)
		if others := k.CheckRecords(e.Name, k.load[e.Name]...); others > 0 {
			k.t.Errorf("%d records of %s that nobody published", others, e.Name)
		}
	}
}

// publish publishes about 25 readings a second until over is closed.
func publish(ctx context.Context, n *rigtest.Numbers, over <-chan struct{}) error {
	tick := time.NewTicker(40 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := n.Publish(ctx, 1); err != nil {
			return err
		}
		select {
		case <-over:
			return nil
		case <-tick.C:
		}
	}
}

// pause waits up to so many milliseconds: it picks the moment of what comes next, nothing is waited for.
func (k *storm) pause(ctx context.Context, most int) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(k.random.IntN(most)) * time.Millisecond):
	}
}

// fault does the next kind of fault, to a random edge.
func (k *storm) fault(ctx context.Context) {
	e := k.edges[k.random.IntN(len(k.edges))]
	k.next++
	switch k.next % 4 {
	case 0:
		k.faults["kill -9 of the hub"]++
		k.Hub.Kill()
		k.pause(ctx, 300)
		k.StartHub()
	case 1:
		k.faults["kill -9 of an edge"]++
		e.Kill()
		k.pause(ctx, 300)
		k.Start(e)
	case 2:
		k.faults["kill -9 of hub and edge together"]++
		k.Hub.Kill()
		e.Kill()
		k.Start(e)
		k.pause(ctx, 300)
		k.StartHub()
	case 3:
		k.faults["link cut"]++
		k.Cut(e.Name)
		k.pause(ctx, 1000)
		k.Restore(e.Name)
	}
}
