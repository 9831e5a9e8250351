// Package cluster starts a real Kubernetes control plane for tests and demonstrations.
package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Limits of the control plane's life; generous, as many tests may share two cores.
const (
	startLimit = 3 * time.Minute
	stopLimit  = 30 * time.Second
)

// Cluster is one control plane: API server, controllers and scheduler on the loopback interface, with no nodes. Its methods
// must not be called concurrently.
type Cluster struct {
	// Kubeconfig is the path of the administrator's kubeconfig; the same after a restart.
	Kubeconfig string
	// Kubectl is the path of a kubectl of the control plane's version.
	Kubectl string
	// Log is the path of what the control plane writes to standard error.
	Log string

	binary, dir string
	port        int
	process     *process
}

// process is one run of the binary. It ends when stdin closes, so also with this process.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	ended chan error
}

// Start gives a test a control plane of its own, which ends with the test.
func Start(t testing.TB) *Cluster {
	t.Helper()
	c, err := Open(t.Context(), t.TempDir(), os.Stderr)
	if err != nil {
		t.Fatalf("start a control plane: %v", err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Errorf("stop the control plane: %v", err)
		}
	})
	return c
}

// Open starts a control plane that keeps its data in dir and waits until it is ready, building the binary first if this
// machine's cache lacks it, and telling progress. The caller calls Stop.
func Open(ctx context.Context, dir string, progress io.Writer) (*Cluster, error) {
	binary, err := Binary(ctx, progress)
	if err != nil {
		return nil, err
	}
	kubectl, err := linkKubectl(binary)
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		Kubeconfig: filepath.Join(dir, "admin.kubeconfig"),
		Kubectl:    kubectl,
		Log:        filepath.Join(dir, "controlplane.log"),
		binary:     binary, dir: dir, port: port,
	}
	return c, c.start(ctx)
}

// Stop ends the control plane in good order and keeps its data. Stopping a stopped one does nothing.
func (c *Cluster) Stop() error {
	if c.process == nil {
		return nil
	}
	p := c.process
	c.process = nil
	p.stdin.Close()
	select {
	case <-p.ended: //nolint:errcheck // a controller that is still starting ends the whole process with 1 when it is asked to end
		return nil
	case <-time.After(stopLimit):
		return errors.Join(fmt.Errorf("the control plane did not end within %s", stopLimit), p.kill())
	}
}

// Kill ends the control plane at once, as a crash would (SIGKILL).
func (c *Cluster) Kill() error {
	if c.process == nil {
		return nil
	}
	p := c.process
	c.process = nil
	return p.kill()
}

// Restart stops the control plane, if it runs, and starts it again on the same data and port.
func (c *Cluster) Restart(ctx context.Context) error {
	if err := c.Stop(); err != nil {
		return err
	}
	return c.start(ctx)
}

func (c *Cluster) start(ctx context.Context) error {
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(c.binary, "--dir", c.dir, "--port", strconv.Itoa(c.port), "--with-parent")
	// A process group of its own: an interrupt at the terminal reaches us, and we end it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stderr = log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	p := &process{cmd: cmd, stdin: stdin, ended: make(chan error, 1)}
	ready := make(chan struct{})
	go func() {
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "ready ") {
				close(ready)
			}
		}
		p.ended <- cmd.Wait()
	}()
	select {
	case <-ready:
		c.process = p
		return nil
	case err := <-p.ended:
		return fmt.Errorf("the control plane ended at its start (%w); its log: %s", err, lastLines(c.Log))
	case <-time.After(startLimit):
		err = fmt.Errorf("the control plane is not ready after %s; its log: %s", startLimit, lastLines(c.Log))
	case <-ctx.Done():
		err = ctx.Err()
	}
	return errors.Join(err, p.kill())
}

func (p *process) kill() error {
	_ = p.stdin.Close()
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.ended //nolint:errcheck // that it was killed is no news
	return nil
}

// freePort finds a port that nothing uses now. Another process could take it before the API server does; then the start
// fails, with the reason in its log.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func lastLines(path string) string {
	const most = 4 << 10
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-most):])
}
