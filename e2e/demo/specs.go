package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/longshore-edge/longshore/e2e/cluster"
	"github.com/longshore-edge/longshore/e2e/rig"
)

const modelName = "bearing"

// The edges, and the simulated machines that stand at them: two on which version 2 hears more than version 1.
var (
	edgeNames    = []string{"dock-hamburg", "dock-oslo"}
	machineSeeds = []uint64{5, 13}
)

// file is a model file.
type file struct {
	name, digest string
	size         int
}

// copyModels puts the committed model files into the hub's folder.
func copyModels(into string) (map[string]file, error) {
	models := map[string]file{}
	for _, version := range []string{"1", "2"} {
		name := "bearing-" + version + ".onnx"
		b, err := os.ReadFile(filepath.Join("e2e", "bearing", name))
		if err != nil {
			return nil, fmt.Errorf("%w (run the demo from the top of the repository)", err)
		}
		models[version] = file{name, fmt.Sprintf("sha256:%x", sha256.Sum256(b)), len(b)}
		if err := os.WriteFile(filepath.Join(into, name), b, 0o644); err != nil {
			return nil, err
		}
	}
	return models, nil
}

const streamsYAML = `streams:
- name: temperature
  topics: ["machines/+/temperature"]
- name: faults
`

const edgesYAML = `apiVersion: longshore.dev/v1alpha1
kind: Edge
metadata:
  name: dock-hamburg
  labels: {line: crane}
spec: {pods: true}
---
apiVersion: longshore.dev/v1alpha1
kind: Edge
metadata:
  name: dock-oslo
  labels: {line: crane}
spec: {pods: true}
`

func (d *demo) modelYAML(version string) string {
	f := d.models[version]
	return fmt.Sprintf(`apiVersion: longshore.dev/v1alpha1
kind: Model
metadata: {name: %s, namespace: default}
spec:
  version: "%s"
  edgeSelector: {matchLabels: {line: crane}}
  variants:
  - name: fp32
    format: onnx
    precision: fp32
    source: {uri: "file:%s"}
    digest: %s
    sizeBytes: %d
  bindings:
  - input: machines/+/vibration
    output: machines/{1}/verdict
    stream: faults
`, modelName, version, f.name, f.digest, f.size)
}

const podSpec = `
    containers:
    - name: main
      image: example.com/crane-ui:1.0
      envFrom: [{configMapRef: {name: crane-ui}}]
`

const configMapYAML = `apiVersion: v1
kind: ConfigMap
metadata: {name: crane-ui, namespace: default}
data: {LANGUAGE: en}
---
`

// workload is one pod on each edge: a DaemonSet where there is somebody to schedule it, Pods with a nodeName otherwise.
func (d *demo) workload() string {
	if d.kube {
		return configMapYAML + `apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: longshore-objects, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: longshore-objects}
subjects: [{kind: ServiceAccount, name: cloudhub, namespace: longshore-system}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: crane-ui, namespace: default}
spec:
  selector: {matchLabels: {app: crane-ui}}
  template:
    metadata: {labels: {app: crane-ui}}
    spec:
      automountServiceAccountToken: false
      nodeSelector: {node-role.kubernetes.io/edge: ""}
      tolerations: [{key: longshore.dev/edge, operator: Exists, effect: NoSchedule}]
` + indent(podSpec, "  ")
	}
	text := configMapYAML
	for i, edge := range edgeNames {
		if i > 0 {
			text += "---\n"
		}
		text += fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: crane-ui-%s}\nspec:\n    nodeName: %s%s", edge, edge, podSpec)
	}
	return text
}

func indent(text, by string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.Trim(text, "\n")) {
		b.WriteString(by + line)
	}
	return b.String() + "\n"
}

// apply hands a manifest to the source: a file in the watched folder, or kubectl apply.
func (d *demo) apply(ctx context.Context, name, text string) error {
	if !d.kube {
		return d.hub.Write(name, text)
	}
	_, err := d.kubectl(ctx, text, "apply", "--server-side", "-f", "-")
	return err
}

func (d *demo) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.cluster.Kubectl, append([]string{"--kubeconfig", d.cluster.Kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// showKube prints what a cloud team would look at, once the cluster has what the edges reported.
func (d *demo) showKube(ctx context.Context, kinds string) error {
	if !d.kube {
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, w := range [][3]string{{"model/" + modelName, "serving", "2"}, {"edge/" + edgeNames[0], "synced", "true"}, {"edge/" + edgeNames[1], "synced", "true"}} {
		err := rig.Until(wait, func() error {
			got, err := d.kubectl(wait, "", "get", w[0], "-o", "jsonpath={.status."+w[1]+"}")
			if err == nil && got != w[2] {
				err = fmt.Errorf("%s of %s is %q, not %s", w[1], w[0], got, w[2])
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	out, err := d.kubectl(ctx, "", "get", kinds)
	if err == nil {
		d.console.show("kubectl get "+kinds, out)
	}
	return err
}

func (d *demo) startCluster(ctx context.Context, dir string) error {
	data := filepath.Join(dir, "cluster")
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	var err error
	if d.cluster, err = cluster.Open(ctx, data, os.Stderr); err != nil {
		return err
	}
	crds, err := d.hub.Bin.Run(ctx, "cloudhub", "crds")
	if err != nil {
		return err
	}
	if err := d.apply(ctx, "", crds); err != nil {
		return err
	}
	if _, err := d.kubectl(ctx, "", "wait", "--for=condition=Established", "crd/edges.longshore.dev", "crd/models.longshore.dev"); err != nil {
		return err
	}
	for _, name := range []string{"namespace.yaml", "rbac.yaml"} {
		text, err := os.ReadFile(filepath.Join("deploy", name))
		if err != nil {
			return err
		}
		if err := d.apply(ctx, name, string(text)); err != nil {
			return err
		}
	}
	if d.hub.Kubeconfig, err = d.hubKubeconfig(ctx, dir); err != nil {
		return err
	}
	d.console.fact("kube-apiserver, controller-manager and scheduler run; CRDs and the hub's own rights are applied")
	return nil
}

// hubKubeconfig gives the hub the rights of deploy/rbac.yaml and no others.
func (d *demo) hubKubeconfig(ctx context.Context, dir string) (string, error) {
	answer, err := d.kubectl(ctx, "{}", "create", "--raw", "/api/v1/namespaces/longshore-system/serviceaccounts/cloudhub/token", "-f", "-")
	if err != nil {
		return "", err
	}
	var request struct{ Status struct{ Token string } }
	if err := json.Unmarshal([]byte(answer), &request); err != nil {
		return "", fmt.Errorf("token of the hub's service account: %w", err)
	}
	b, err := os.ReadFile(d.cluster.Kubeconfig)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "cloudhub.kubeconfig")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return "", err
	}
	for _, args := range [][]string{
		{"set-credentials", "cloudhub", "--token", request.Status.Token},
		{"set-context", "--current", "--user", "cloudhub"},
	} {
		cmd := exec.CommandContext(ctx, d.cluster.Kubectl, append([]string{"--kubeconfig", path, "config"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("kubectl config %s: %w: %s", args[0], err, out)
		}
	}
	return path, nil
}

// verdicts compares a model version's verdicts in the sink with what the sensor knows was true.
func (d *demo) verdicts(ctx context.Context, e *dock, version string) (right, all int, err error) {
	records, err := d.hub.Records(ctx, e.Name, "faults")
	if err != nil {
		return 0, 0, err
	}
	for _, r := range records {
		var v struct {
			ID      string
			Version string
			Outputs struct{ Probabilities []float64 }
		}
		if err := json.Unmarshal([]byte(r.Payload), &v); err != nil {
			return 0, 0, fmt.Errorf("%s: verdict %q: %w", e.Name, r.Payload, err)
		}
		truth, known := e.sensor.truth(v.ID)
		if v.Version != version || !known {
			continue
		}
		best := 0
		for i, p := range v.Outputs.Probabilities {
			if p > v.Outputs.Probabilities[best] {
				best = i
			}
		}
		all++
		if best == int(truth) {
			right++
		}
	}
	return right, all, nil
}
