package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/longshore-edge/longshore/"

// layers say what each folder may import of this module: itself, and the folders named. The longest prefix of a package decides.
var layers = map[string][]string{
	"proto/longshorepb": {},
	"proto/onnxfile":    {},
	"sync/topic":        {},
	"sync/space":        {},
	"sync":              {"proto", "sync"},
	"broker":            {"proto", "sync", "broker"},
	"broker/mqttconn":   {"proto", "sync"},
	"cloudhub":          {"proto", "sync", "broker", "cloudhub", "deploy"},
	"edgehub":           {"proto", "sync", "broker", "edgehub"},
	"edgehub/worker":    {"edgehub/worker", "edgehub/internal/oip", "proto/onnxfile"},
	"deploy":            {},
	"e2e":               {"e2e", "proto"},
	// Thousands of edges fit one machine only as the parts that speak to the hub, without a process each.
	"e2e/bench": {"e2e", "proto", "sync", "broker"},
}

// owners are the only folders that may import a library directly.
var owners = map[string][]string{
	"github.com/eclipse/paho.mqtt.golang": {"broker/mqttconn"},
	"github.com/mochi-mqtt/server/v2":     {"broker"},
	"k8s.io/client-go":                    {"cloudhub/internal/kube"},
	"github.com/ebitengine/purego":        {"edgehub/worker"},
	"github.com/gomlx":                    {"edgehub/worker", "e2e/bearing"},
	"github.com/hanwen/go-fuse/v2":        {"e2e/powerdisk"},
}

// never are libraries that a command must not link, not even through others: they would cost every small box their memory.
var never = map[string][]string{
	"edgehub":        {"k8s.io/client-go", "github.com/gomlx", "github.com/ebitengine/purego"},
	"edgehub/worker": {"k8s.io/api", "k8s.io/apimachinery", "k8s.io/client-go", "github.com/dgraph-io/badger", "github.com/mochi-mqtt"},
}

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

// The two hubs must be able to change apart from each other, and an edge must stay small: both rest on who imports whom.
func TestImportArrows(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...")
	cmd.Dir = ".."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal("go list:", err)
	}
	seen := 0
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		check(t, p)
	}
	if seen < 15 {
		t.Errorf("only %d packages were seen", seen)
	}
}

func check(t *testing.T, p listed) {
	name := strings.TrimPrefix(p.ImportPath, module)
	allowed, ok := layers[longest(name)]
	if !ok {
		t.Errorf("%s belongs to no layer: docs/ARCHITECTURE.md says which there are", name)
	}
	for _, imp := range p.Imports {
		if own, ours := strings.CutPrefix(imp, module); ours && !below(own, allowed) {
			t.Errorf("%s imports %s: the arrows run proto, sync, broker, hubs", name, own)
		}
		for lib, folders := range owners {
			if below(imp, []string{lib}) && !below(name, folders) {
				t.Errorf("%s imports %s: only %v may", name, imp, folders)
			}
		}
	}
	for _, dep := range p.Deps {
		if below(dep, never[name]) {
			t.Errorf("%s links %s", name, dep)
		}
	}
}

func longest(name string) string {
	for ; name != "."; name = path.Dir(name) {
		if _, ok := layers[name]; ok {
			return name
		}
	}
	return ""
}

func below(name string, folders []string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return name == f || strings.HasPrefix(name, f+"/") })
}
