package cluster_test

import (
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/e2e/cluster"
)

// Every test about Kubernetes stands on this: a control plane that comes back on its own data, after an orderly stop and after a
// crash. If it lost its data in between, the tests of hub restarts and API server restarts would prove nothing.
func TestClusterComesBackOnItsData(t *testing.T) {
	c := cluster.Start(t)
	first, err := os.ReadFile(c.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func() error{"stop": c.Stop, "kill": c.Kill} {
		if err := end(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if resp, err := http.Get(server(first)); err == nil {
			resp.Body.Close()
			t.Fatalf("after %s the API server still answers", name)
		}
		if err := c.Restart(t.Context()); err != nil {
			t.Fatalf("restart after %s: %v", name, err)
		}
		again, err := os.ReadFile(c.Kubeconfig)
		if err != nil {
			t.Fatal(err)
		}
		if string(again) != string(first) {
			t.Fatalf("after %s and a restart the kubeconfig is another one", name)
		}
	}
}

func server(kubeconfig []byte) string {
	_, after, _ := strings.Cut(string(kubeconfig), "server: \"")
	url, _, _ := strings.Cut(after, "\"")
	return url
}
