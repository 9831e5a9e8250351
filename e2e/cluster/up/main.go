// Command up starts a real Kubernetes control plane on this machine, prints the path of its kubeconfig on standard output
// when it is ready, and stops it on SIGINT or SIGTERM. It has no nodes: they come with a cloud hub and its edges.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/longshore-edge/longshore/e2e/cluster"
)

func main() {
	dir := flag.String("dir", "", "folder for the data, kept for the next start (default: a temporary one, removed at the end)")
	build := flag.Bool("build", false, "only build the control plane into the cache")
	flag.Parse()
	if err := run(*dir, *build); err != nil {
		fmt.Fprintln(os.Stderr, "up:", err)
		os.Exit(1)
	}
}

func run(dir string, build bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if build {
		_, err := cluster.Binary(ctx, os.Stderr)
		return err
	}
	if dir == "" {
		temporary, err := os.MkdirTemp("", "longshore-cluster-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(temporary)
		dir = temporary
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	c, err := cluster.Open(ctx, dir, os.Stderr)
	if err != nil {
		return err
	}
	fmt.Println(c.Kubeconfig)
	<-ctx.Done()
	return c.Stop()
}
