package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	"github.com/longshore-edge/longshore/e2e/powerdisk"
	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// outage is a site under load of which one program stands on a disk whose power is cut.
type outage struct {
	*rigtest.Site
	t      *testing.T
	edge   *rig.Edge
	load   []*rigtest.Numbers
	disk   *powerdisk.Disk
	random *rand.Rand
	// generation is that of the newest specs in the folder.
	generation int
}

// cuts runs rounds: a few, or as ROUNDS or DURATION say. SEED repeats them as far as the machine lets it.
func cuts(t *testing.T, rounds uint64, begin func(seed uint64) *outage, round func(*outage)) {
	t.Helper()
	seed := number(t, "SEED", uint64(time.Now().UnixNano()))
	rounds = number(t, "ROUNDS", rounds)
	var until time.Time
	if text := os.Getenv("DURATION"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal("DURATION:", err)
		}
		until, rounds = time.Now().Add(d), 0
	}
	t.Logf("SEED=%d", seed)
	o := begin(seed)
	for n := uint64(1); n <= rounds || time.Now().Before(until); n++ {
		round(o)
		if t.Failed() {
			t.Fatalf("round %d with SEED=%d failed", n, seed)
		}
	}
}

func newOutage(t *testing.T, seed uint64) *outage {
	return &outage{Site: rigtest.NewSite(t, bin), t: t, random: rand.New(rand.NewPCG(seed, 0))}
}

// mount makes a folder a disk whose power can be cut.
func (o *outage) mount(dir string, seed uint64) {
	o.t.Helper()
	rigtest.NeedRoot(o.t, "a file system of its own, through /dev/fuse")
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		o.disk, err = powerdisk.Mount(dir, powerdisk.Journaled, seed)
	}
	if err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() {
		if err := o.disk.Unmount(); err != nil {
			o.t.Error(err)
		}
	})
}

// devices makes the load: readings of so many bytes.
func (o *outage) devices(size int) {
	for _, client := range []string{"press", "crane"} {
		n := rigtest.NewNumbers(o.t, o.edge, client)
		n.Filler = rigtest.Noise(size)
		o.load = append(o.load, n)
	}
}

// pods of a generation. Either all of them are there, or none.
func pods(generation int) []string {
	return []string{fmt.Sprintf("left-%06d", generation), fmt.Sprintf("right-%06d", generation)}
}

// change makes the next generation of the specs: its pods, and some hundred KiB that one of them names.
func (o *outage) change() {
	o.t.Helper()
	o.generation++
	names := pods(o.generation)
	text := rigtest.PodManifest(names[0], o.edge.Name, "v1") +
		fmt.Sprintf("    envFrom: [{configMapRef: {name: bulk-%d}}]\n---\n", o.generation) +
		rigtest.PodManifest(names[1], o.edge.Name, "v1") +
		fmt.Sprintf("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: bulk-%d}\ndata: {bulk: %q}\n", o.generation, rigtest.Noise(300<<10))
	o.Write("pods.yaml", text)
}

// underLoad runs f while devices publish, and then waits for what they still have to publish.
func (o *outage) underLoad(f func(ctx context.Context)) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), 2*rigtest.Soon)
	defer cancel()
	over := make(chan struct{})
	end := sync.OnceFunc(func() { close(over) })
	defer end()
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range o.load {
		g.Go(func() error { return publish(ctx, n, over) })
	}
	f(ctx)
	end()
	if err := g.Wait(); err != nil {
		o.t.Fatal(err)
	}
}

// pause picks the moment of what comes next: up to so many milliseconds from now. Nothing is waited for.
func (o *outage) pause(ctx context.Context, most int) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(o.random.IntN(most)) * time.Millisecond):
	}
}

// forget cuts the power of the disk, which no process uses any more, and gives it back.
func (o *outage) forget() {
	o.t.Helper()
	if err := errors.Join(o.disk.Cut(), o.disk.Restore()); err != nil {
		o.t.Fatal(err)
	}
}

// held is the generation that pods are of, 0 if there are none.
func held(names []string) (int, error) {
	if len(names) == 0 {
		return 0, nil
	}
	generation := 0
	if _, err := fmt.Sscanf(strings.TrimPrefix(names[0], "left-"), "%d", &generation); err != nil || !slices.Equal(names, pods(generation)) {
		return 0, fmt.Errorf("half a state: %v", names)
	}
	return generation, nil
}

// reported is the newest generation of which the edge has told the hub anything, which it does once it has committed it. A report
// may lack pods that were not looked at yet.
func (o *outage) reported() int {
	o.t.Helper()
	edges, err := o.Hub.Edges(o.t.Context())
	if err != nil {
		o.t.Fatal(err)
	}
	newest := 0
	for _, p := range edges[o.edge.Name].Pods {
		_, number, _ := strings.Cut(p.Name, "-")
		generation, err := strconv.Atoi(number)
		if err != nil {
			o.t.Fatal("the edge reported a pod of nobody:", p.Name)
		}
		newest = max(newest, generation)
	}
	return newest
}

// bootAlone starts the edge without a link: it must come to hold a whole state, none older than what it had reported.
func (o *outage) bootAlone(reported int) {
	o.t.Helper()
	o.Start(o.edge)
	rigtest.Eventually(o.t, fmt.Sprintf("after the power cut the edge holds what it had reported, generation %d, or newer", reported), func() error {
		st, err := o.edge.Status(o.t.Context())
		if err != nil {
			return err
		}
		if len(st.Warnings) > 0 {
			o.t.Errorf("a power cut must leave nothing to warn of: %q", st.Warnings)
		}
		return holdsSince(st, reported)
	})
}

// holdsSince says whether an edge holds all of a generation, and none older than it had reported.
func holdsSince(st rig.EdgeStatus, reported int) error {
	var names []string
	for _, p := range st.Pods {
		names = append(names, p.Name)
	}
	slices.Sort(names)
	generation, err := held(names)
	if err == nil && generation < reported {
		err = fmt.Errorf("it holds generation %d, list %s", generation, st.List.Committed)
	}
	return err
}

// settled waits until the edge holds the newest generation and all its readings are in the sink, once.
func (o *outage) settled() {
	o.t.Helper()
	settled(o.t, o.Site, o.edge, pods(o.generation)...)
	if others := o.CheckRecords(o.edge.Name, o.load...); others > 0 {
		o.t.Errorf("%d records that nobody published", others)
	}
	noDuplicates(o.t, o.Site, o.edge.Name)
}

// G1, G2 and G3: the power of an edge is cut under load, sometimes again while it boots, sometimes after a shutdown in order.
// Without a link it then holds the specs as before the cut or as after the change that was under way, whole, and nothing
// older than what it had reported; every acknowledged reading comes to the sink once.
func TestG1G2G3PowerCutsOfAnEdge(t *testing.T) {
	cuts(t, 4, func(seed uint64) *outage {
		o := newOutage(t, seed)
		o.StartHub()
		o.edge = o.Edge("dock-1", rigtest.Readings)
		o.mount(o.edge.State(), seed)
		o.devices(200)
		o.change()
		o.Start(o.edge)
		return o
	}, func(o *outage) {
		o.underLoad(func(ctx context.Context) {
			for range 3 {
				o.change()
				o.pause(ctx, 600)
			}
			if o.random.IntN(3) == 0 { // so that much waits in the outbox
				o.Cut("dock-1")
				o.pause(ctx, 500)
			}
			reported := o.reported()
			if o.random.IntN(4) == 0 {
				stop(t, o.edge)
			} else {
				o.edge.KillGroup()
			}
			o.Cut("dock-1")
			o.forget()
			for o.random.IntN(2) == 0 { // again, during the boot
				o.bootAndKill(ctx)
				o.forget()
			}
			o.bootAlone(reported)
			o.Restore("dock-1")
		})
		o.settled()
	})
}

// bootAndKill starts the edge and kills it at a random moment of its boot.
func (o *outage) bootAndKill(ctx context.Context) {
	o.t.Helper()
	p, err := rig.Start(o.edge.Dir, "edgehub-"+o.edge.Name, nil, o.edge.Bin.Path("edgehub"), "run", "--config", o.edge.Config())
	if err != nil {
		o.t.Fatal(err)
	}
	o.pause(ctx, 500)
	select {
	case <-p.Done():
		o.t.Errorf("the edge does not boot after a power cut: %v\n%s", p.Err(), p.Tail(20))
	default:
		p.KillGroup()
	}
}

// enrolled is a box that has a credential and nothing else.
type enrolled struct {
	Edge  string `json:"edge"`
	Token string `json:"token"`
}

// enroll makes a credential as people do: once the command has ended, it counts.
func (o *outage) enroll(name string) enrolled {
	o.t.Helper()
	file, err := o.Hub.Enroll(o.t.Context(), name)
	if err != nil {
		o.t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		o.t.Fatal(err)
	}
	var c enrolled
	if err := yaml.Unmarshal(b, &c); err != nil || c.Token == "" {
		o.t.Fatal("read the credential:", err)
	}
	return c
}

// knownTo says whether the hub takes a credential: it answers that this edge has no such model, not that it is unknown.
func (c enrolled) knownTo(o *outage) error {
	url := "http://" + o.Hub.HTTP + "/models/sha256:" + strings.Repeat("0", 64)
	req, err := http.NewRequestWithContext(o.t.Context(), http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.Edge+":"+c.Token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusForbidden {
		return fmt.Errorf("%s, enrolled before a power cut, is answered %s", c.Edge, res.Status)
	}
	return nil
}

// G3 and G6: the power of a cloud hub with a folder and the embedded sink is cut under load, sometimes after a shutdown in order.
// What was acknowledged to an edge, which forgot it, is in the sink, once; who was enrolled stays so; edges still believe it, so
// its key and its cluster are the same; and the last good content of a file that was broken meanwhile still holds.
func TestG3G6PowerCutsOfTheHub(t *testing.T) {
	var boxes []enrolled
	cuts(t, 3, func(seed uint64) *outage {
		o := newOutage(t, seed)
		o.mount(o.Hub.Data(), seed)
		o.edge = o.Edge("dock-1", rigtest.Readings)
		o.forget() // nobody had started the hub yet
		o.StartHub()
		o.change()
		o.Start(o.edge)
		o.devices(8 << 10)
		return o
	}, func(o *outage) {
		reported := 0
		o.underLoad(func(ctx context.Context) {
			for range 2 {
				o.change()
				o.pause(ctx, 800)
			}
			if o.random.IntN(2) == 0 {
				boxes = append(boxes, o.enroll(fmt.Sprintf("box-%d", len(boxes)+1)))
			}
			reported = o.reported()
			if o.random.IntN(4) == 0 {
				if err := o.Hub.Stop(rigtest.Soon); err != nil {
					t.Fatal(err)
				}
			} else {
				o.Hub.Kill()
			}
			o.forget()
			o.Write("pods.yaml", "this: [is broken")
			o.StartHub()
			for _, c := range boxes {
				if err := c.knownTo(o); err != nil {
					t.Error(err)
				}
			}
		})
		rigtest.Eventually(t, "the last good manifests hold", func() error {
			st, err := o.edge.Status(t.Context())
			if err == nil && !st.List.Synced {
				err = fmt.Errorf("the edge is not synced: %s %s", st.Link.State, st.Link.Error)
			}
			if err != nil {
				return err
			}
			return holdsSince(st, reported)
		})
		o.change()
		o.settled()
	})
}
