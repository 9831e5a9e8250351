package fault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/longshore-edge/longshore/e2e/cluster"
	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// storm is a site under load, and what was done to it.
type storm struct {
	*rigtest.Site
	t       *testing.T
	source  source
	edges   []*rig.Edge
	load    map[string][]*rigtest.Numbers // by edge
	pods    map[string]map[string]bool    // by edge
	random  *rand.Rand
	created int // pods
	next    int // kind of fault
	faults  map[string]int
}

// source is where the specs of a storm come from.
type source interface {
	// edge declares an Edge and returns its credential.
	edge(name string) string
	// apply creates or changes a pod; remove deletes it.
	apply(pod, manifest string)
	remove(pod string)
	// holds says whether the edge holds exactly these pods as the source has them, and the hub knows.
	holds(e *rig.Edge, pods ...string) error
	// crash kills the source and starts it again; false if it is no process.
	crash() bool
}

// folder is the watched folder of the hub.
type folder struct{ *rigtest.Site }

func (f folder) edge(name string) string    { return f.Enroll(name) }
func (f folder) apply(pod, manifest string) { f.Write(pod+".yaml", manifest) }
func (f folder) crash() bool                { return false }

func (f folder) remove(pod string) { f.Remove(pod + ".yaml") }

func (f folder) holds(e *rig.Edge, pods ...string) error { return f.Holds(e, true, pods...) }

// kubernetes is a real API server with its scheduler and controllers.
type kubernetes struct {
	rigtest.Kubectl
	site *rigtest.Site
	*cluster.Cluster
}

func (k kubernetes) edge(name string) string {
	k.Do(fmt.Sprintf("apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: %s}\nspec: {pods: true}\n", name), "apply", "-f", "-")
	return k.site.Credential(name)
}

func (k kubernetes) apply(_, manifest string) { k.Do(manifest, "apply", "-f", "-") }

func (k kubernetes) remove(pod string) { k.Do("", "delete", "pod", pod, "--wait=false") }

func (k kubernetes) holds(e *rig.Edge, pods ...string) error { return k.Holds(e, len(pods)) }

func (k kubernetes) crash() bool {
	if err := errors.Join(k.Kill(), k.Restart(k.T.Context())); err != nil {
		k.T.Fatal(err)
	}
	return true
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

// G1, G2, G3 and G6: hubs, edges and the API server killed with kill -9 at random moments, and links cut, while specs change and
// devices publish. After every round the edges hold what the source says, and every reading that was acknowledged is in the
// sink, none twice.
func TestG1G2G3G6KillsUnderLoad(t *testing.T) {
	t.Run("folder", func(t *testing.T) {
		k := newStorm(t)
		k.begin(folder{k.Site})
		k.rounds(5)
	})
	t.Run("kubernetes", func(t *testing.T) {
		k := newStorm(t)
		k.begin(onKubernetes(t, k.Site))
		k.rounds(4)
	})
}

// TestSoak is the same for DURATION, with what the processes take every minute. It runs only when asked to: make soak.
func TestSoak(t *testing.T) {
	if os.Getenv("DURATION") == "" {
		t.Skip("a soak takes long: make soak")
	}
	d, err := time.ParseDuration(os.Getenv("DURATION"))
	if err != nil {
		t.Fatal("DURATION:", err)
	}
	k := newStorm(t)
	k.begin(onKubernetes(t, k.Site))
	gauges := newGauges(k)
	until := time.Now().Add(d)
	for round := uint64(1); time.Now().Before(until); round++ {
		k.round(round)
		gauges.print(round)
	}
	gauges.summary()
}

// onKubernetes starts a control plane and points the site's hub to it, with the rights that deploy/rbac.yaml grants.
func onKubernetes(t *testing.T, s *rigtest.Site) kubernetes {
	c, k := rigtest.Install(t, bin, "../..")
	api, err := rig.NewLink(k.Server())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	s.Hub.Kubeconfig = k.HubKubeconfig(api)
	return kubernetes{k, s, c}
}

// newStorm makes the site of a storm; SEED repeats one.
func newStorm(t *testing.T) *storm {
	seed := number(t, "SEED", uint64(time.Now().UnixNano()))
	t.Logf("SEED=%d", seed)
	return &storm{
		Site: rigtest.NewSite(t, bin), t: t, load: map[string][]*rigtest.Numbers{}, pods: map[string]map[string]bool{},
		random: rand.New(rand.NewPCG(seed, 0)), faults: map[string]int{},
	}
}

// begin starts the hub and two edges.
func (k *storm) begin(from source) {
	k.source = from
	var credentials []string
	for _, name := range []string{"dock-1", "dock-2"} {
		credentials = append(credentials, from.edge(name))
		e := k.Box(name, credentials[len(credentials)-1], rigtest.Readings)
		k.edges = append(k.edges, e)
	}
	k.StartHub()
	for _, e := range k.edges {
		k.pods[e.Name] = map[string]bool{}
		for _, client := range []string{"press", "crane"} {
			n := rigtest.NewNumbers(k.t, e, client)
			n.Filler = rigtest.Noise(200)
			k.load[e.Name] = append(k.load[e.Name], n)
		}
		k.Start(e)
		k.change(e, 0)
	}
}

// rounds runs so many rounds.
func (k *storm) rounds(count uint64) {
	for round := range count {
		k.round(round + 1)
	}
}

// change adds, changes or removes a pod of an edge.
func (k *storm) change(e *rig.Edge, version uint64) {
	pods := k.pods[e.Name]
	names := slices.Sorted(maps.Keys(pods))
	switch choice := k.random.IntN(3); {
	case len(names) < 2 || choice == 0 && len(names) < 6:
		k.created++
		pod := fmt.Sprintf("%s-%d", e.Name, k.created) // a name of its own: the one before may still be on its way out
		pods[pod] = true
		k.apply(e, pod, version)
	case choice == 1:
		k.apply(e, names[k.random.IntN(len(names))], version)
	default:
		pod := names[k.random.IntN(len(names))]
		delete(pods, pod)
		k.source.remove(pod)
	}
}

func (k *storm) apply(e *rig.Edge, pod string, version uint64) {
	k.source.apply(pod, rigtest.PodManifest(pod, e.Name, fmt.Sprintf("v%d-%d", version, k.random.Uint32())))
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
		pods := slices.Sorted(maps.Keys(k.pods[e.Name]))
		rigtest.Eventually(k.t, fmt.Sprintf("%s holds what the source says", e.Name), func() error { return k.source.holds(e, pods...) })
		rigtest.Eventually(k.t, fmt.Sprintf("the account of %s is balanced", e.Name), func() error { return k.Drained(e, "readings") })
		if others := k.CheckRecords(e.Name, k.load[e.Name]...); others > 0 {
			k.t.Errorf("%d records of %s that nobody published", others, e.Name)
		}
	}
	if k.t.Failed() {
		k.t.Fatalf("round %d failed", number)
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
	switch k.next % 5 {
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
	case 4:
		if k.source.crash() {
			k.faults["kill -9 of the API server"]++
		}
	}
}
