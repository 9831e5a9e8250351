// Command demo shows the main job in about a minute: specs mirrored to two edges, inference running, the link cut, a new
// model version pushed meanwhile, one edge killed and cold-booted without a link, the link back, the new version serving, the
// backlog replayed, and the sum that proves that nothing was lost in silence. It exits with 0 only if all of it holds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	kube := flag.Bool("kube", false, "use a real Kubernetes API server and kubectl instead of a folder of YAML")
	bin := flag.String("bin", "bin", "`folder` of the built commands")
	flag.Parse()
	d := &demo{console: newConsole(os.Stdout), kube: *kube, keep: os.Getenv("KEEP") != ""}
	if err := d.run(*bin); err != nil {
		d.console.fail(err)
		os.Exit(1)
	}
}

func (d *demo) run(bin string) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "ls-")
	if err != nil {
		return err
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.stop())
		if err != nil {
			fmt.Fprintf(os.Stderr, "logs and state are kept in %s\n", dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	// Everything but a first download or build is bounded.
	show, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := d.play(show, bin, dir); err != nil {
		return err
	}
	if d.keep {
		d.stay(ctx)
	}
	return nil
}
