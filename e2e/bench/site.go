package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// patience bounds every wait that is not itself what is measured.
const patience = 3 * time.Minute

// site is a hub on a folder, with its edges.
type site struct {
	hub   *rig.Hub
	dir   string
	boxes []*box
}

// box is a full edge hub behind links of its own.
type box struct {
	*rig.Edge
	link, files *rig.Link
}

func (b *bench) newSite(name string) (*site, error) {
	dir := filepath.Join(b.dir, name)
	hub, err := rig.NewHub(b.bin, filepath.Join(dir, "hub"))
	if err != nil {
		return nil, err
	}
	hub.Args = []string{"--log-level", "warn"}
	return &site{hub: hub, dir: dir}, nil
}

// box enrolls an edge and starts it. extra is YAML for its configuration, env is for its environment.
func (s *site) box(ctx context.Context, name, extra string, env ...string) (*box, error) {
	credential, err := s.hub.Enroll(ctx, name)
	if err != nil {
		return nil, err
	}
	e := &box{}
	if e.link, err = rig.NewLink(s.hub.MQTT); err != nil {
		return nil, err
	}
	if e.files, err = rig.NewLink(s.hub.HTTP); err != nil {
		e.link.Close()
		return nil, err
	}
	s.boxes = append(s.boxes, e)
	if e.Edge, err = rig.NewEdge(s.hub.Bin, filepath.Join(s.dir, name), name, credential, e.link.Addr(), e.files.Addr(), extra); err != nil {
		return nil, err
	}
	e.Env = env
	return e, e.Start(ctx)
}

// close ends everything, edges first, and keeps what went wrong before in front.
func (s *site) close(err *error) {
	errs := []error{*err}
	for _, e := range s.boxes {
		if e.Edge != nil {
			errs = append(errs, end(e.Process))
		}
		e.link.Close()
		e.files.Close()
	}
	*err = errors.Join(append(errs, end(s.hub.Process))...)
}

func end(p *rig.Process) error {
	if p == nil {
		return nil
	}
	select {
	case <-p.Done():
		return nil
	default:
		return p.Stop(30 * time.Second)
	}
}

func (e *box) cut()     { e.link.Cut(); e.files.Cut() }
func (e *box) restore() { e.link.Restore(); e.files.Restore() }

// poll calls cond until it returns nil, as often as the figure needs it.
func poll(ctx context.Context, every time.Duration, cond func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// pause lets a set-up come to rest.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// synced waits until an edge holds the newest list with so many pods and models, all models serving, and the hub knows it.
func (s *site) synced(ctx context.Context, e *box, pods, models int) error {
	err := poll(ctx, 50*time.Millisecond, func() error {
		st, err := e.Status(ctx)
		if err != nil {
			return err
		}
		serving := 0
		for _, m := range st.Models {
			if m.ServingVersion != "" {
				serving++
			}
		}
		edges, err := s.hub.Edges(ctx)
		if err != nil {
			return err
		}
		if !st.List.Synced || len(st.Pods) != pods || serving != models || !edges[e.Name].Synced {
			return fmt.Errorf("%s: synced %t, at the hub %t, %d pods, %d models serve, link %s %s", e.Name, st.List.Synced, edges[e.Name].Synced, len(st.Pods), serving, st.Link.State, st.Link.Error)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait until in sync: %w", err)
	}
	return nil
}

// edgeManifest is an Edge with pods. The tag of the first pod's image makes one manifest differ from the next.
func edgeManifest(edge string, pods int, tag string) string {
	var y strings.Builder
	fmt.Fprintf(&y, "apiVersion: longshore.dev/v1alpha1\nkind: Edge\nmetadata: {name: %s, labels: {bench: \"true\"}}\nspec: {pods: true}\n", edge)
	for i := range pods {
		version := "1"
		if i == 0 {
			version = tag
		}
		fmt.Fprintf(&y, `---
apiVersion: v1
kind: Pod
metadata: {name: app-%d-%s, labels: {app: app-%d}}
spec:
  nodeName: %s
  containers:
  - name: main
    image: registry.example.com/plant/app-%d:%s
    args: ["--listen", ":8080", "--line", "crane"]
    env: [{name: MODE, value: production}, {name: REGION, value: north}]
    resources: {requests: {cpu: 50m, memory: 64Mi}, limits: {memory: 128Mi}}
`, i, edge, i, edge, i, version)
	}
	return y.String()
}
