package rigtest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// Soon bounds every wait: generous, since nothing here measures speed.
const Soon = 90 * time.Second

// Readings is configuration of an edge: a stream of what devices publish below sensors/.
const Readings = "streams:\n- name: readings\n  topics: [\"sensors/#\"]\n"

// Main builds the commands of repo with the race detector, runs the tests and returns the exit code. With BIN, the path of a
// folder, the commands there are taken: a soak tells what they use as they are installed.
func Main(m *testing.M, repo string, bin *rig.Bin) int {
	if built := os.Getenv("BIN"); built != "" {
		*bin = rig.Bin(built)
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "longshore-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	if *bin, err = rig.Build(ctx, repo, dir, "-race"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// Eventually waits for cond to return nil.
func Eventually(t *testing.T, what string, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Soon)
	defer cancel()
	if err := rig.Until(ctx, cond); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// Need fails the test when a command of the system is missing: a test that is skipped proves nothing.
func Need(t *testing.T, command string) string {
	t.Helper()
	path, err := exec.LookPath(command)
	if err != nil {
		if path, err = exec.LookPath(filepath.Join("/usr/sbin", command)); err != nil {
			t.Fatalf("%s is missing: run e2e/install.sh as root", command)
		}
	}
	return path
}

// NeedRoot fails the test unless it runs as root.
func NeedRoot(t *testing.T, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatalf("this test needs root for %s", why)
	}
}

// Mosquitto runs one of mosquitto's clients and returns what it printed.
func Mosquitto(ctx context.Context, t *testing.T, address, command string, args ...string) (string, error) {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, Need(t, command), append([]string{"-h", host, "-p", port}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}

// PodManifest is a pod bound to an edge; the tag of its image makes one version differ from the next.
func PodManifest(name, edge, tag string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n  nodeName: %s\n  automountServiceAccountToken: false\n  containers:\n  - name: main\n    image: example.com/app:%s\n", name, edge, tag)
}

// Noise is text that does not compress well: every run is another part of a linear congruence.
func Noise(n int) string {
	var b strings.Builder
	x := uint64(time.Now().UnixNano())
	for range n {
		x = x*6364136223846793005 + 1442695040888963407
		b.WriteByte('!' + byte(x>>33)%90)
	}
	return b.String()
}
