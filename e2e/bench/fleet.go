package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// fleetPods is how many pods each edge of the fleet should run.
const fleetPods = 10

// downtime of the hub in the restart figure.
const downtime = 800 * time.Millisecond

// fleetSite is a hub with a few full edges and many hollow ones.
type fleetSite struct {
	*site
	*herd
	// source of the specs, for names: "folder" or "kubernetes".
	source string
	tag    int // of the newest image
}

// fleet measures, with a folder as source, how soon a change is applied and how soon all is well after a restart of the hub.
func fleet(ctx context.Context, b *bench) (err error) {
	s, err := b.newSite("fleet")
	if err != nil {
		return err
	}
	defer s.close(&err)
	if err := s.hub.Start(ctx); err != nil {
		return err
	}
	f := &fleetSite{site: s, herd: newHerd(ctx), source: "folder"}
	defer func() { err = errors.Join(err, f.stop()) }()
	if err := f.populate(ctx, b); err != nil {
		return err
	}
	for range b.runs {
		if err := f.changes(ctx, b); err != nil {
			return err
		}
	}
	for range b.runs {
		if err := f.restart(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

func (f *fleetSite) size() int { return len(f.boxes) + len(f.edges) }

// populate makes the edges with their pods, and waits until all are in sync.
func (f *fleetSite) populate(ctx context.Context, b *bench) error {
	var names []string
	for i := range b.beside {
		names = append(names, fmt.Sprintf("hollow-%04d", i))
	}
	edges, err := enrollHollow(ctx, f.hub, names)
	if err != nil {
		return err
	}
	for i := range b.edges {
		names = append(names, fmt.Sprintf("dock-%d", i))
	}
	for _, name := range names {
		if err := f.write(name); err != nil {
			return err
		}
	}
	for _, name := range names[len(edges):] {
		if _, err := f.box(ctx, name, ""); err != nil {
			return err
		}
	}
	f.join(edges)
	if err := f.wait(ctx, time.Time{}, fleetPods); err != nil {
		return err
	}
	for _, e := range f.boxes {
		if err := f.synced(ctx, e, fleetPods, 0); err != nil {
			return err
		}
	}
	return nil
}

// write the manifest of an edge with a new image tag.
func (f *fleetSite) write(edge string) error {
	f.tag++
	return f.hub.Write(edge+".yaml", edgeManifest(edge, fleetPods, strconv.Itoa(f.tag)))
}

// changes one pod's image at one edge after the other, and notes the time until the edge has the new list on disk (a hollow
// edge: in memory).
func (f *fleetSite) changes(ctx context.Context, b *bench) error {
	const each = 10 // changes of a full edge, and of as many hollow ones
	var full, hollow []float64
	for n := range each * len(f.boxes) {
		took, err := f.changeFull(ctx, f.boxes[n%len(f.boxes)])
		if err != nil {
			return err
		}
		full = append(full, ms(took))
		if took, err = f.changeHollow(ctx, f.edges[n*(len(f.edges)-1)/(each*len(f.boxes))]); err != nil {
			return err
		}
		hollow = append(hollow, ms(took))
	}
	others := number(float64(f.size()))
	for _, kind := range []struct {
		name, what string
		took       []float64
	}{
		{"folder-change-full", "change in the folder → on the disk of a full edge", full},
		{"folder-change-hollow", "change in the folder → applied on a hollow edge", hollow},
	} {
		slices.Sort(kind.took)
		what := fmt.Sprintf("%s, %s edges connected, %d pods each", kind.what, others, fleetPods)
		b.record(figure{Name: kind.name + "-p50", What: what + ", median of each run", Unit: "ms"}, quantile(kind.took, 0.5))
		b.record(figure{Name: kind.name + "-p99", What: what + ", p99 of each run", Unit: "ms", Reach: atMost(250)}, quantile(kind.took, 0.99))
	}
	return nil
}

func (f *fleetSite) changeFull(ctx context.Context, e *box) (time.Duration, error) {
	before, err := e.Status(ctx)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := f.write(e.Name); err != nil {
		return 0, err
	}
	err = poll(ctx, 2*time.Millisecond, func() error {
		now, err := e.Status(ctx)
		if err == nil && now.List.Committed == before.List.Committed {
			err = fmt.Errorf("%s does not have the change", e.Name)
		}
		return err
	})
	return time.Since(begin), err
}

func (f *fleetSite) changeHollow(ctx context.Context, e *hollow) (time.Duration, error) {
	before, _ := e.held()
	begin := time.Now()
	if err := f.write(e.name); err != nil {
		return 0, err
	}
	var at time.Time
	err := poll(ctx, 2*time.Millisecond, func() error {
		list, since := e.held()
		if list == before {
			return fmt.Errorf("%s does not have the change", e.name)
		}
		at = since
		return nil
	})
	return at.Sub(begin), err
}

// restart kills the hub, starts it again, and notes when each edge is in sync again and when the hub knows all to be.
func (f *fleetSite) restart(ctx context.Context, b *bench) error {
	begin := time.Now()
	f.hub.Kill()
	if err := pause(ctx, downtime-time.Since(begin)); err != nil {
		return err
	}
	if err := f.hub.Start(ctx); err != nil {
		return err
	}
	ready := time.Since(begin).Seconds()
	if err := f.wait(ctx, begin, fleetPods); err != nil {
		return err
	}
	err := poll(ctx, 20*time.Millisecond, func() error {
		in, err := f.inSync(ctx)
		if err == nil && in < f.size() {
			err = fmt.Errorf("the hub has %d of %d edges in sync", in, f.size())
		}
		return err
	})
	if err != nil {
		return err
	}
	all := time.Since(begin).Seconds()
	var took []float64
	for _, e := range f.edges {
		took = append(took, e.synced().Sub(begin).Seconds())
	}
	slices.Sort(took)
	what := fmt.Sprintf("hub killed and back after %v, %s edges, source %s: ", downtime, number(float64(f.size())), f.source)
	compare := "28.8 to 37.0 s, 41 nodes"
	b.record(figure{Name: f.source + "-restart-ready", What: what + "from the kill until the hub is ready", Unit: "s"}, ready)
	b.record(figure{Name: f.source + "-restart-p50", What: what + "until a hollow edge is in sync, median", Unit: "s", Compare: compare}, quantile(took, 0.5))
	b.record(figure{Name: f.source + "-restart-p99", What: what + "the same, p99", Unit: "s", Reach: atMost(5), Compare: compare}, quantile(took, 0.99))
	b.record(figure{Name: f.source + "-restart-all", What: what + "until the hub knows all, full edges too, to be in sync", Unit: "s", Compare: compare}, all)
	return pause(ctx, b.settle/4)
}

// inSync asks the hub how many edges hold the newest list.
func (f *fleetSite) inSync(ctx context.Context) (int, error) {
	b, err := rig.Get(ctx, "http://"+f.hub.HTTP+"/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, "longshore_sessions_in_sync "); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, errors.New("the hub's metrics have no longshore_sessions_in_sync")
}
