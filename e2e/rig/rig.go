package rig

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Bin is the folder of the built commands.
type Bin string

// Path of a command.
func (b Bin) Path(name string) string { return filepath.Join(string(b), name) }

// Build builds the commands into a folder; extra are more flags of go build, such as -race.
func Build(ctx context.Context, repo, into string, extra ...string) (Bin, error) {
	for out, pkg := range map[string]string{"cloudhub": "./cloudhub", "edgehub": "./edgehub", "longshore-worker": "./edgehub/worker"} {
		args := append([]string{"build", "-o", filepath.Join(into, out)}, extra...)
		cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
		cmd.Dir = repo
		if b, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w\n%s", pkg, err, b)
		}
	}
	return Bin(into), nil
}

// Run runs a command to its end and returns what it printed on standard output.
func (b Bin) Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, b.Path(name), args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return string(out), nil
}

// Hub is a cloud hub with everything it owns below Dir.
type Hub struct {
	Bin Bin
	Dir string
	// MQTT and HTTP are its doors; they stay over restarts.
	MQTT, HTTP string
	// Kubeconfig selects the Kubernetes source; empty: the folder.
	Kubeconfig string
	// Args are further arguments of "cloudhub run"; of a flag given twice the later counts.
	Args []string
	// Prefix precedes the command, such as "ip netns exec N".
	Prefix []string
	*Process
}

// NewHub makes the folders and picks the doors. It starts nothing.
func NewHub(bin Bin, dir string) (*Hub, error) {
	h := &Hub{Bin: bin, Dir: dir}
	for _, d := range []string{h.Manifests(), h.Models(), h.Data()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	var err error
	if h.MQTT, err = FreeAddress(); err != nil {
		return nil, err
	}
	h.HTTP, err = FreeAddress()
	return h, err
}

// Manifests is the watched folder.
func (h *Hub) Manifests() string { return filepath.Join(h.Dir, "manifests") }

// Models is the folder of model files.
func (h *Hub) Models() string { return filepath.Join(h.Dir, "models") }

// Data is the hub's own folder.
func (h *Hub) Data() string { return filepath.Join(h.Dir, "data") }

// Start runs the hub and waits until it is ready.
func (h *Hub) Start(ctx context.Context) error {
	args := append(slices.Clip(h.Prefix), h.Bin.Path("cloudhub"), "run", "--data", h.Data(), "--models", h.Models(), "--mqtt", h.MQTT, "--http", h.HTTP)
	if h.Kubeconfig != "" {
		args = append(args, "--source", "kubernetes", "--kubeconfig", h.Kubeconfig)
	} else {
		args = append(args, "--source", "folder", "--manifests", h.Manifests())
	}
	var err error
	if h.Process, err = Start(h.Dir, "cloudhub", nil, append(args, h.Args...)...); err != nil {
		return err
	}
	return h.waitFor(ctx, "http://"+h.HTTP+"/readyz")
}

// waitFor polls a URL of the process until it answers 200.
func (p *Process) waitFor(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := Until(ctx, func() error {
		select {
		case <-p.Done():
			cancel()
			return fmt.Errorf("%s ended: %w", p.Name, p.Err())
		default:
		}
		_, err := Get(ctx, url)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w; the end of its log:\n%s", err, p.Tail(20))
	}
	return nil
}

// Enroll makes a credential for an edge and returns the path of its file.
func (h *Hub) Enroll(ctx context.Context, edge string) (string, error) {
	file := filepath.Join(h.Dir, edge+".credential.yaml")
	_, err := h.Bin.Run(ctx, "cloudhub", "edges", "enroll", edge, "--data", h.Data(), "-o", file)
	return file, err
}

// Write puts a manifest into the watched folder, replacing the file at once.
func (h *Hub) Write(name, text string) error {
	path := filepath.Join(h.Manifests(), name)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// Edge is an edge hub with everything it owns below Dir.
type Edge struct {
	Bin  Bin
	Name string
	Dir  string
	// Broker is the door for devices, HTTP the one for inference, status and metrics.
	Broker, HTTP string
	// Env is added to the process's environment.
	Env []string
	*Process
}

// NewEdge writes the edge's configuration. hub and files are the addresses to dial; extra is YAML to add.
func NewEdge(bin Bin, dir, name, credential, hub, files, extra string) (*Edge, error) {
	e := &Edge{Bin: bin, Name: name, Dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if e.Broker, err = FreeAddress(); err != nil {
		return nil, err
	}
	if e.HTTP, err = FreeAddress(); err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`state: %s
credential: %s
hub:
  url: tcp://%s
  files: http://%s
broker:
  listen: %s
http:
  listen: %s
`, e.State(), credential, hub, files, e.Broker, e.HTTP) + extra
	return e, os.WriteFile(e.Config(), []byte(config), 0o600)
}

// Config is the path of the configuration.
func (e *Edge) Config() string { return filepath.Join(e.Dir, "edgehub.yaml") }

// State is the state folder.
func (e *Edge) State() string { return filepath.Join(e.Dir, "state") }

// Start runs the edge and waits until it is alive (with or without a link). prefix precedes the command, such as
// "ip netns exec N".
func (e *Edge) Start(ctx context.Context, prefix ...string) error {
	var err error
	argv := append(slices.Clip(prefix), e.Bin.Path("edgehub"), "run", "--config", e.Config())
	if e.Process, err = Start(e.Dir, "edgehub-"+e.Name, e.Env, argv...); err != nil {
		return err
	}
	if len(prefix) > 0 {
		return nil // its loopback is not ours
	}
	return e.waitFor(ctx, "http://"+e.HTTP+"/healthz")
}

// Get returns the body of a URL, or an error for any status but 200.
func Get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, res.Status, strings.TrimSpace(string(b)))
	}
	return b, err
}

// GetJSON decodes a URL's body into v.
func GetJSON(ctx context.Context, url string, v any) error {
	b, err := Get(ctx, url)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
