package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/longshore-edge/longshore/e2e/bearing"
	"github.com/longshore-edge/longshore/e2e/cluster"
	"github.com/longshore-edge/longshore/e2e/rig"
)

// demo is everything that runs.
type demo struct {
	console    *console
	kube, keep bool

	hub     *rig.Hub
	cluster *cluster.Cluster
	edges   []*dock
	models  map[string]file // by version
}

// dock is one edge with its links and its sensor.
type dock struct {
	*rig.Edge
	link, files *rig.Link
	sensor      *machine
}

func (d *dock) cut()     { d.link.Cut(); d.files.Cut() }
func (d *dock) restore() { d.link.Restore(); d.files.Restore() }

// play tells the story; an error is where it did not hold.
func (d *demo) play(ctx context.Context, bin, dir string) error {
	for _, act := range []func(context.Context) error{
		func(ctx context.Context) error { return d.setUp(ctx, rig.Bin(bin), dir) },
		d.mirrored, d.inferring, d.cutLinks, d.newVersion, d.coldBoot, d.linkBack, d.sumUp,
	} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) setUp(ctx context.Context, bin rig.Bin, dir string) error {
	source := "a folder of YAML"
	if d.kube {
		source = "a real Kubernetes API server"
	}
	d.console.step("A cloud hub on %s, two edges behind links of their own, a vibration sensor at each", source)
	var err error
	if d.hub, err = rig.NewHub(bin, filepath.Join(dir, "hub")); err != nil {
		return err
	}
	if d.kube {
		if err := d.startCluster(ctx, dir); err != nil {
			return err
		}
	}
	if d.models, err = copyModels(d.hub.Models()); err != nil {
		return err
	}
	if err := d.apply(ctx, "edges.yaml", edgesYAML); err != nil {
		return err
	}
	if err := d.apply(ctx, "workload.yaml", d.workload()); err != nil {
		return err
	}
	if err := d.apply(ctx, "model.yaml", d.modelYAML("1")); err != nil {
		return err
	}
	if err := d.hub.Start(ctx); err != nil {
		return err
	}
	for i, name := range edgeNames {
		e, err := d.newDock(ctx, bin, dir, name, machineSeeds[i])
		if err != nil {
			return err
		}
		d.edges = append(d.edges, e)
	}
	d.console.fact("hub: MQTT %s, HTTP %s", d.hub.MQTT, d.hub.HTTP)
	for _, e := range d.edges {
		d.console.fact("%s: broker for devices %s, inference http://%s/v2", e.Name, e.Broker, e.HTTP)
	}
	return nil
}

func (d *demo) newDock(ctx context.Context, bin rig.Bin, dir, name string, seed uint64) (*dock, error) {
	credential, err := d.hub.Enroll(ctx, name)
	if err != nil {
		return nil, err
	}
	e := &dock{}
	if e.link, err = rig.NewLink(d.hub.MQTT); err != nil {
		return nil, err
	}
	if e.files, err = rig.NewLink(d.hub.HTTP); err != nil {
		return nil, err
	}
	if e.Edge, err = rig.NewEdge(bin, filepath.Join(dir, name), name, credential, e.link.Addr(), e.files.Addr(), streamsYAML); err != nil {
		return nil, err
	}
	if err := e.Start(ctx); err != nil {
		return nil, err
	}
	e.sensor = startMachine(e.Broker, name, seed)
	return e, nil
}

// all waits until every edge's status satisfies cond.
func (d *demo) all(ctx context.Context, cond func(rig.EdgeStatus) error) error {
	for _, e := range d.edges {
		if err := until(ctx, e.Edge, cond); err != nil {
			return err
		}
	}
	return nil
}

// until waits until an edge's status satisfies cond.
func until(ctx context.Context, e *rig.Edge, cond func(rig.EdgeStatus) error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := rig.Until(ctx, func() error {
		st, err := e.Status(ctx)
		if err != nil {
			return err
		}
		return cond(st)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", e.Name, err)
	}
	return nil
}

func serving(version string) func(rig.EdgeStatus) error {
	return func(st rig.EdgeStatus) error {
		m, err := st.Model(modelName)
		if err == nil && m.ServingVersion != version {
			err = fmt.Errorf("serves version %q (%s %s %s), not %s", m.ServingVersion, m.State, m.Reason, m.Message, version)
		}
		return err
	}
}

func (d *demo) mirrored(ctx context.Context) error {
	d.console.step("Specs are mirrored")
	err := d.all(ctx, func(st rig.EdgeStatus) error {
		if !st.List.Synced || len(st.Pods) != 1 {
			return fmt.Errorf("synced %t, %d pods, link %s %s", st.List.Synced, len(st.Pods), st.Link.State, st.Link.Error)
		}
		return serving("1")(st)
	})
	if err != nil {
		return err
	}
	for _, e := range d.edges {
		st, err := e.Status(ctx)
		if err != nil {
			return err
		}
		m, err := st.Model(modelName)
		if err != nil {
			return err
		}
		d.console.fact("%s holds pod %s (%s, %s), serves model %s version %s on %s", e.Name, st.Pods[0].Name, st.Pods[0].Phase, st.Pods[0].Reason, m.Name, m.ServingVersion, m.Engine)
	}
	return d.showKube(ctx, "nodes,edges,models")
}

func (d *demo) inferring(ctx context.Context) error {
	d.console.step("Inference runs: sensors publish vibration to their edge's broker, verdicts come back and go to the cloud")
	before, err := d.delivered(ctx, "faults")
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = rig.Until(wait, func() error {
		now, err := d.delivered(ctx, "faults")
		for i, e := range d.edges {
			if err == nil && now[i] < before[i]+20 {
				err = fmt.Errorf("%s: %d verdicts in the cloud", e.Name, now[i])
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, e := range d.edges {
		right, all, err := d.verdicts(ctx, e, "1")
		if err != nil {
			return err
		}
		d.console.fact("%s: %d of the first %d verdicts of version 1 are right (the bearing is %s)", e.Name, right, all, e.sensor.condition())
	}
	return nil
}

func (d *demo) delivered(ctx context.Context, stream string) ([]uint64, error) {
	counts := make([]uint64, len(d.edges))
	for i, e := range d.edges {
		sum, err := d.hub.Sum(ctx, e.Name, stream)
		if err != nil {
			return nil, err
		}
		counts[i] = sum.Delivered
	}
	return counts, nil
}

func (d *demo) cutLinks(ctx context.Context) error {
	d.console.step("The links are cut")
	for _, e := range d.edges {
		e.cut()
	}
	err := d.all(ctx, func(st rig.EdgeStatus) error {
		if st.Link.State != "down" {
			return fmt.Errorf("link is %s", st.Link.State)
		}
		return serving("1")(st)
	})
	if err != nil {
		return err
	}
	for _, e := range d.edges {
		e.sensor.breakDown(bearing.InnerRace)
	}
	d.console.fact("both edges go on serving version 1; now a bearing breaks at each machine")
	return nil
}

func (d *demo) newVersion(ctx context.Context) error {
	d.console.step("Meanwhile the cloud team ships version 2 of the model")
	if err := d.apply(ctx, "model.yaml", d.modelYAML("2")); err != nil {
		return err
	}
	// The edges cannot know: they must stay as they are while their sensors go on.
	target := d.edges[0].sensor.count() + 50
	if err := d.edges[0].sensor.wait(ctx, target); err != nil {
		return err
	}
	if err := d.all(ctx, serving("1")); err != nil {
		return err
	}
	d.console.fact("the edges cannot know it yet: version 1 serves on, and verdicts are kept on disk")
	return nil
}

func (d *demo) coldBoot(ctx context.Context) error {
	e := d.edges[0]
	d.console.step("%s loses power: the agent and its workers are killed, and it boots without a link", e.Name)
	workers := children(e.PID())
	before := e.sensor.count()
	e.KillGroup()
	for _, pid := range workers {
		if err := gone(ctx, pid); err != nil {
			return err
		}
	}
	d.console.fact("killed the agent (process %d) and its workers %v", e.PID(), workers)
	if len(workers) == 0 {
		return errors.New("there was no worker process to kill")
	}
	if err := e.Start(ctx); err != nil {
		return err
	}
	if err := until(ctx, e.Edge, serving("1")); err != nil {
		return err
	}
	st, err := e.Status(ctx)
	if err != nil {
		return err
	}
	if st.Link.State != "down" || len(st.Pods) != 1 {
		return fmt.Errorf("after the cold boot: link %s, %d pods", st.Link.State, len(st.Pods))
	}
	if err := e.sensor.wait(ctx, before+30); err != nil {
		return err
	}
	if err := until(ctx, e.Edge, func(now rig.EdgeStatus) error {
		if now.Stream("faults").Held < st.Stream("faults").Held+20 {
			return errors.New("no new verdicts")
		}
		return nil
	}); err != nil {
		return err
	}
	out, err := d.hub.Bin.Run(ctx, "edgehub", "status", "--state", e.State())
	if err != nil {
		return err
	}
	d.console.fact("from its own disk: the pod is known again, version 1 serves, new verdicts are recorded")
	d.console.show("edgehub status", out)
	return nil
}

func (d *demo) linkBack(ctx context.Context) error {
	var backlog uint64
	for _, e := range d.edges {
		st, err := e.Status(ctx)
		if err != nil {
			return err
		}
		for _, s := range st.Outbox.Streams {
			backlog += s.Held
		}
	}
	d.console.step("The links are back, with a backlog of %d records", backlog)
	for _, e := range d.edges {
		e.restore()
	}
	if err := d.all(ctx, serving("2")); err != nil {
		return err
	}
	d.console.fact("version 2 was downloaded, verified, warmed up, and serves on both edges")
	target := d.edges[0].sensor.count() + 30
	for _, e := range d.edges {
		if err := e.sensor.wait(ctx, target); err != nil {
			return err
		}
		e.sensor.stop()
	}
	err := d.all(ctx, func(st rig.EdgeStatus) error {
		for _, s := range st.Outbox.Streams {
			if s.Held > 0 {
				return fmt.Errorf("stream %s still holds %d records", s.Stream, s.Held)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.console.fact("the backlog is replayed: the edges hold nothing that the cloud does not have")
	for _, e := range d.edges {
		right, all, err := d.verdicts(ctx, e, "2")
		if err != nil {
			return err
		}
		if all == 0 {
			return fmt.Errorf("%s: no verdict of version 2 in the cloud", e.Name)
		}
		d.console.fact("%s: %d of %d verdicts of version 2 are right (the bearing is %s)", e.Name, right, all, e.sensor.condition())
	}
	return d.showKube(ctx, "edges,models")
}

func (d *demo) sumUp(ctx context.Context) error {
	d.console.step("The sum: every record that was accepted is delivered or stands in the loss ledger, none twice")
	sums, err := d.hub.Sums(ctx)
	if err != nil {
		return err
	}
	var text strings.Builder
	t := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "edge\tstream\taccepted\tdelivered\tledgered\tduplicates\t")
	var total rig.Sum
	balanced := len(sums) > 0
	for _, s := range sums {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t\n", s.Edge, s.Stream, s.Accepted, s.Delivered, s.Ledgered, s.Duplicates)
		total.Accepted += s.Accepted
		total.Delivered += s.Delivered
		total.Ledgered += s.Ledgered
		total.Duplicates += s.Duplicates
		balanced = balanced && s.Balanced()
	}
	if err := t.Flush(); err != nil {
		return err
	}
	d.console.lines("", text.String())
	if !balanced {
		return errors.New("the sum does not hold")
	}
	for _, e := range d.edges {
		if err := d.checkReadings(ctx, e); err != nil {
			return err
		}
	}
	d.console.fact("accepted %d = delivered %d + ledgered %d, duplicates %d", total.Accepted, total.Delivered, total.Ledgered, total.Duplicates)
	return nil
}

// checkReadings holds the sink against what the sensor itself knows was acknowledged.
func (d *demo) checkReadings(ctx context.Context, e *dock) error {
	records, err := d.hub.Records(ctx, e.Name, "temperature")
	if err != nil {
		return err
	}
	times := map[int]int{}
	for _, r := range records {
		n, err := strconv.Atoi(r.Payload)
		if err != nil {
			return fmt.Errorf("%s: reading %q in the sink was never sent", e.Name, r.Payload)
		}
		times[n]++
	}
	acked := e.sensor.acknowledged()
	for n, again := range acked {
		if times[n] == 0 || times[n] > 1 && !again {
			return fmt.Errorf("%s: reading %d, which was acknowledged, is %d times in the sink", e.Name, n, times[n])
		}
	}
	d.console.fact("%s: all %d temperature readings that the sensor got a PUBACK for are in the cloud", e.Name, len(acked))
	return nil
}

// stay keeps everything running for a look around.
func (d *demo) stay(ctx context.Context) {
	d.console.step("Everything stays up until Ctrl-C; to look around:")
	for _, line := range []string{
		d.hub.Bin.Path("cloudhub") + " edges --hub http://" + d.hub.HTTP,
		d.hub.Bin.Path("cloudhub") + " telemetry --hub http://" + d.hub.HTTP + " --stream faults --limit 5",
		d.hub.Bin.Path("edgehub") + " status --state " + d.edges[0].State(),
		"mosquitto_sub -p " + strings.Split(d.edges[0].Broker, ":")[1] + " -v -t '#'",
		"edit the specs in " + d.hub.Manifests(),
	} {
		d.console.lines("  ", line)
	}
	<-ctx.Done()
}

// stop ends everything, edges first.
func (d *demo) stop() error {
	var errs []error
	for _, e := range d.edges {
		e.sensor.stop()
		errs = append(errs, stopProcess(e.Process))
		e.link.Close()
		e.files.Close()
	}
	if d.hub != nil {
		errs = append(errs, stopProcess(d.hub.Process))
	}
	if d.cluster != nil {
		errs = append(errs, d.cluster.Stop())
	}
	return errors.Join(errs...)
}

func stopProcess(p *rig.Process) error {
	if p == nil {
		return nil
	}
	select {
	case <-p.Done():
		return p.Err()
	default:
		return p.Stop(20 * time.Second)
	}
}

// children returns the processes whose parent is pid.
func children(pid int) []int {
	var pids []int
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// pid (name) state ppid …; the name may hold anything.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, child)
		}
	}
	return pids
}

// gone waits until a process has ended.
func gone(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return rig.Until(ctx, func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			return fmt.Errorf("worker %d outlived its agent", pid)
		}
		return nil
	})
}
