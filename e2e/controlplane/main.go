// Command controlplane runs a Kubernetes control plane in one process, for tests and demonstrations: kine with SQLite (as in
// K3s), kube-apiserver, kube-controller-manager and kube-scheduler, all on the loopback interface. It has no nodes.
//
// Everything it keeps is in one folder, so that it can be stopped, killed and started again on the same data. When it is
// ready it prints one line, "ready <path of the administrator's kubeconfig>", on standard output; it ends on SIGTERM, SIGINT
// and, with --with-parent, when standard input ends.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

// shutdownLimit bounds how long the components may take to end: the API server waits for clients that keep watches open.
const shutdownLimit = 3 * time.Second

type config struct {
	// dir is absolute.
	dir  string
	port int
}

func (c config) path(name string) string { return filepath.Join(c.dir, name) }
func (c config) url() string             { return "https://127.0.0.1:" + strconv.Itoa(c.port) }

func main() {
	if filepath.Base(os.Args[0]) == "kubectl" {
		kubectl()
		return
	}
	dir := flag.String("dir", "", "folder for all data (required)")
	port := flag.Int("port", 6443, "port of the API server on 127.0.0.1")
	withParent := flag.Bool("with-parent", false, "end when standard input ends")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if *withParent {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			stop()
		}()
	}
	if err := run(ctx, *dir, *port); err != nil {
		fmt.Fprintln(os.Stderr, "controlplane:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, port int) error {
	if dir == "" {
		return errors.New("--dir is missing: name a folder for the data")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	cfg := config{dir: dir, port: port}
	keys, err := ensurePKI(cfg)
	if err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}

	// The store outlives the API server, which still writes while it shuts down.
	storeCtx, stopStore := context.WithCancel(context.WithoutCancel(ctx))
	store, err := startStore(storeCtx, cfg)
	if err != nil {
		stopStore()
		return fmt.Errorf("start the store: %w", err)
	}
	defer func() {
		stopStore()
		store.wait()
	}()

	// Each component sends exactly one result.
	running := 0
	ended := make(chan error, 3)
	start := func(name string, component func(context.Context) error) {
		running++
		go func() {
			if err := component(ctx); err != nil {
				ended <- fmt.Errorf("%s: %w", name, err)
				return
			}
			ended <- nil
		}()
	}

	apiServer, err := newAPIServer(ctx, cfg, store.endpoints)
	if err != nil {
		return fmt.Errorf("kube-apiserver: %w", err)
	}
	start("kube-apiserver", apiServer)
	if err := waitReady(ctx, cfg, keys, ended); err != nil {
		return err
	}
	controllers, err := newControllerManager(ctx, cfg)
	if err != nil {
		return fmt.Errorf("kube-controller-manager: %w", err)
	}
	start("kube-controller-manager", controllers)
	scheduler, err := newScheduler(ctx, cfg)
	if err != nil {
		return fmt.Errorf("kube-scheduler: %w", err)
	}
	start("kube-scheduler", scheduler)
	fmt.Println("ready", cfg.path("admin.kubeconfig"))

	select {
	case err := <-ended:
		if ctx.Err() == nil {
			// The others go down with the process.
			return cmp.Or(err, errors.New("a component ended by itself"))
		}
		running--
	case <-ctx.Done():
	}
	// Asked to end: what the components return now (the scheduler calls every end an error) says nothing.
	for limit := time.After(shutdownLimit); running > 0; running-- {
		select {
		case <-ended:
		case <-limit:
			klog.InfoS("Components did not end in time: going without them", "components", running, "limit", shutdownLimit)
			running = 1
		}
	}
	klog.Flush()
	return nil
}
