package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/longshore-edge/longshore/e2e/cluster"
)

const (
	// kubeEdges is the size of the fleet KubeEdge was measured with.
	kubeEdges = 41
	podsPath  = "/api/v1/namespaces/default/pods"
	edgesPath = "/apis/longshore.dev/v1alpha1/edges"
	// creators of pods at the same time.
	creators = 16
)

// kubeSite is a hub at a real API server, with hollow edges.
type kubeSite struct {
	*fleetSite
	cluster *cluster.Cluster
	api     *apiServer
}

// kubernetes measures what goes through a real API server, with its scheduler and controllers on the same cores: first with
// the fleet that KubeEdge was measured with, then with many edges.
func kubernetes(ctx context.Context, b *bench) (err error) {
	s, err := b.newSite("kubernetes")
	if err != nil {
		return err
	}
	defer s.close(&err)
	k := &kubeSite{fleetSite: &fleetSite{site: s, herd: newHerd(ctx), source: "kubernetes"}}
	defer func() { err = errors.Join(err, k.stop()) }()
	if k.cluster, err = cluster.Open(ctx, s.dir, os.Stderr); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.cluster.Stop()) }()
	if err := k.prepare(ctx); err != nil {
		return err
	}
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	idle, err := rss(k.hub.PID())
	if err != nil {
		return err
	}
	b.record(figure{Name: "hub-idle", What: "RSS of a hub without edges", Unit: "MiB", Compare: "72 MB"}, float64(idle)/mib)
	if err := k.reconnectRequests(ctx, b); err != nil {
		return err
	}
	if err := k.grow(ctx, kubeEdges); err != nil {
		return err
	}
	for run := range b.runs {
		if err := k.burst(ctx, b, fmt.Sprintf("run-%d", run)); err != nil {
			return err
		}
	}
	if err := k.grow(ctx, b.hollow); err != nil {
		return err
	}
	if _, err := k.createPods(ctx, "fleet"); err != nil {
		return err
	}
	if err := k.wait(ctx, time.Time{}, fleetPods); err != nil {
		return err
	}
	// Statuses go to Kubernetes at a bounded rate; they must not compete with what is measured.
	if err := k.running(ctx, "fleet", fleetPods*len(k.edges)); err != nil {
		return err
	}
	for range b.runs {
		if err := k.changes(ctx, b, "fleet"); err != nil {
			return err
		}
	}
	for range b.runs {
		if err := k.restart(ctx, b); err != nil {
			return err
		}
	}
	return k.memory(ctx, b, idle)
}

// memory of the hub per edge, once the hub has come to rest; idle is what it took before there was any, in KiB.
func (k *kubeSite) memory(ctx context.Context, b *bench, idle int64) error {
	if err := pause(ctx, b.rest); err != nil {
		return err
	}
	for range b.runs {
		now, err := rss(k.hub.PID())
		if err != nil {
			return err
		}
		b.record(figure{
			Name: "hub-memory", What: fmt.Sprintf("hub RSS over idle per connected edge with %d pods, %s edges", fleetPods, number(float64(k.size()))),
			Unit: "KiB", Reach: atMost(60), Compare: "about 0.5 MB",
		}, float64(now-idle)/float64(k.size()))
		if err := pause(ctx, b.settle/4); err != nil {
			return err
		}
	}
	return nil
}

// prepare starts the hub on the API server.
func (k *kubeSite) prepare(ctx context.Context) (err error) {
	if k.api, err = openAPIServer(k.cluster.Kubeconfig); err != nil {
		return err
	}
	crds, err := k.hub.Bin.Run(ctx, "cloudhub", "crds")
	if err != nil {
		return err
	}
	for _, c := range []struct {
		stdin string
		args  []string
	}{
		{crds, []string{"apply", "--server-side", "-f", "-"}},
		{"", []string{"wait", "--for=condition=Established", "crd/edges.longshore.dev", "crd/models.longshore.dev"}},
		{"", []string{"apply", "-f", filepath.Join("deploy", "namespace.yaml")}},
	} {
		cmd := exec.CommandContext(ctx, k.cluster.Kubectl, append([]string{"--kubeconfig", k.cluster.Kubeconfig}, c.args...)...)
		cmd.Stdin = strings.NewReader(c.stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %v: %w: %s", c.args, err, out)
		}
	}
	k.hub.Kubeconfig = k.cluster.Kubeconfig
	return k.hub.Start(ctx)
}

// object is a Kubernetes object in the making.
type object = map[string]any

// grow makes edges up to a number, connects them, and waits until each has a Node.
func (k *kubeSite) grow(ctx context.Context, count int) error {
	var names []string
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(creators)
	for i := len(k.edges); i < count; i++ {
		name := fmt.Sprintf("hollow-%04d", i)
		names = append(names, name)
		g.Go(func() error {
			return k.api.create(gctx, edgesPath, object{
				"apiVersion": "longshore.dev/v1alpha1", "kind": "Edge", "metadata": object{"name": name}, "spec": object{"pods": true},
			})
		})
	}
	if err := g.Wait(); err != nil || len(names) == 0 {
		return err
	}
	edges, err := enrollHollow(ctx, k.hub, names)
	if err != nil {
		return err
	}
	k.join(edges)
	if err := k.wait(ctx, time.Time{}, 0); err != nil {
		return err
	}
	return poll(ctx, 200*time.Millisecond, func() error { return k.nodes(ctx, count) })
}

// nodes says whether so many Nodes are ready, without a taint that would evict pods.
func (k *kubeSite) nodes(ctx context.Context, count int) error {
	var list struct {
		Items []struct {
			Spec   struct{ Taints []struct{ Effect string } }
			Status struct {
				Conditions []struct{ Type, Status string }
			}
		}
	}
	if err := k.api.do(ctx, http.MethodGet, "/api/v1/nodes", jsonType, nil, &list); err != nil {
		return err
	}
	ready := 0
	for _, n := range list.Items {
		evicts := false
		for _, t := range n.Spec.Taints {
			evicts = evicts || t.Effect == "NoExecute"
		}
		for _, c := range n.Status.Conditions {
			if c.Type == "Ready" && c.Status == "True" && !evicts {
				ready++
			}
		}
	}
	if ready < count {
		return fmt.Errorf("%d of %d Nodes are ready", ready, count)
	}
	return nil
}

// burst creates ten pods for each edge and waits until Kubernetes shows all as running, which needs each to be applied on its
// edge and reported; then it deletes them.
func (k *kubeSite) burst(ctx context.Context, b *bench, run string) error {
	statusBefore, othersBefore, err := k.api.podWrites(ctx)
	if err != nil {
		return err
	}
	pods := len(k.edges) * fleetPods
	g, gctx := errgroup.WithContext(ctx)
	var running time.Time
	g.Go(func() error {
		err := k.running(gctx, run, pods)
		running = time.Now()
		return err
	})
	begin := time.Now()
	var last time.Time
	g.Go(func() (err error) {
		last, err = k.createPods(gctx, run)
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	status, others, err := k.api.podWrites(ctx)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%d pods created for %d hollow edges: ", pods, len(k.edges))
	b.record(figure{Name: "kubernetes-burst", What: what + "from the last create until all are applied and Kubernetes shows them running", Unit: "s", Reach: atMost(2)}, running.Sub(last).Seconds())
	b.record(figure{Name: "kubernetes-burst-all", What: what + "from the first create", Unit: "s", Compare: "24 s"}, running.Sub(begin).Seconds())
	b.record(figure{Name: "kubernetes-writes", What: "writes per pod for delivery: all writes to pods that are neither our creates nor statuses", Unit: "writes", Reach: atMost(0), Compare: "4.2"},
		float64(others-othersBefore-pods)/float64(pods))
	b.record(figure{Name: "kubernetes-statuses", What: "status writes per pod, until all ran", Unit: "writes"}, float64(status-statusBefore)/float64(pods))
	if err := k.api.do(ctx, http.MethodDelete, podsPath+"?gracePeriodSeconds=0", jsonType, nil, nil); err != nil {
		return err
	}
	return k.wait(ctx, time.Time{}, 0)
}

// running waits until so many pods of a run are shown as running.
func (k *kubeSite) running(ctx context.Context, run string, pods int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	seen := map[string]bool{}
	err := k.api.watchPods(ctx, "run%3D"+run, func(name, phase string) bool {
		if phase == "Running" {
			seen[name] = true
		}
		return len(seen) == pods
	})
	if err != nil {
		err = fmt.Errorf("%d of %d pods run: %w", len(seen), pods, err)
	}
	return err
}

// createPods returns when the last of them was created.
func (k *kubeSite) createPods(ctx context.Context, run string) (last time.Time, err error) {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(creators)
	var mu sync.Mutex
	for i := range fleetPods {
		for _, e := range k.edges {
			g.Go(func() error {
				err := k.api.create(ctx, podsPath, kubePod(run, e.name, i))
				mu.Lock()
				defer mu.Unlock()
				last = time.Now()
				return err
			})
		}
	}
	err = g.Wait()
	return last, err
}

func kubePod(run, edge string, i int) object {
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": podName(run, edge, i), "labels": object{"run": run, "app": fmt.Sprintf("app-%d", i)}},
		"spec": object{
			"nodeName": edge, "automountServiceAccountToken": false,
			"containers": []object{{
				"name": "main", "image": "registry.example.com/plant/app:1", "args": []string{"--listen", ":8080", "--line", "crane"},
				"env":       []object{{"name": "MODE", "value": "production"}, {"name": "REGION", "value": "north"}},
				"resources": object{"requests": object{"cpu": "50m", "memory": "64Mi"}, "limits": object{"memory": "128Mi"}},
			}},
		},
	}
}

func podName(run, edge string, i int) string { return fmt.Sprintf("app-%d-%s-%s", i, edge, run) }

// changes the image of one pod of one edge after the other, and notes the time from the request until the edge has applied it.
func (k *kubeSite) changes(ctx context.Context, b *bench, run string) error {
	const count = 200
	var took []float64
	for n := range count {
		e := k.edges[n*(len(k.edges)-1)/count]
		before, _ := e.held()
		k.tag++
		patch := fmt.Sprintf(`{"spec":{"containers":[{"name":"main","image":"registry.example.com/plant/app:1.%d"}]}}`, k.tag)
		begin := time.Now()
		if err := k.api.do(ctx, http.MethodPatch, podsPath+"/"+podName(run, e.name, n%fleetPods), patchType, []byte(patch), nil); err != nil {
			return err
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
		if err != nil {
			return err
		}
		took = append(took, ms(at.Sub(begin)))
	}
	slices.Sort(took)
	what := fmt.Sprintf("change of a pod in Kubernetes → applied on its hollow edge, %s edges connected, %d pods each", number(float64(k.size())), fleetPods)
	b.record(figure{Name: "kubernetes-change-p50", What: what + ", median of each run", Unit: "ms"}, quantile(took, 0.5))
	b.record(figure{Name: "kubernetes-change-p99", What: what + ", p99 of each run", Unit: "ms", Reach: atMost(250)}, quantile(took, 0.99))
	return nil
}
