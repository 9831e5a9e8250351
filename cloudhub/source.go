package main

import (
	"cmp"
	"context"
	"os"

	"github.com/longshore-edge/longshore/cloudhub/internal/kube"
	"github.com/longshore-edge/longshore/cloudhub/internal/manifest"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

// source is where specs come from and reports go.
type source interface {
	mirror.Upstream
	Run(ctx context.Context) error
	// Ready reports why the source cannot be trusted to be up to date, nil if it can.
	Ready() error
	ClusterUID(ctx context.Context) (string, error)
}

func (h *hub) newSource() (source, error) {
	log := h.log.With("part", h.cfg.Source)
	if h.cfg.Source == "kubernetes" {
		return kube.New(kube.Config{Kubeconfig: cmp.Or(h.cfg.Kubeconfig, os.Getenv("KUBECONFIG")), HubName: h.cfg.HubName, Logger: log, Cache: h.cache})
	}
	return manifest.New(manifest.Config{Dir: h.cfg.Manifests, Logger: log, Cache: h.cache, DataDir: h.cfg.Data})
}
