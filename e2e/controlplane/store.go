package main

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/k3s-io/kine/pkg/endpoint"
	"github.com/sirupsen/logrus"
)

// store is kine on SQLite behind a Unix socket.
type store struct {
	endpoints []string
	running   *sync.WaitGroup
}

func (s *store) wait() { s.running.Wait() }

func startStore(ctx context.Context, cfg config) (*store, error) {
	if err := os.MkdirAll(cfg.path("db"), 0o700); err != nil {
		return nil, err
	}
	logrus.SetLevel(logrus.WarnLevel)
	s := &store{running: new(sync.WaitGroup)}
	c := endpoint.Config{
		WaitGroup: s.running,
		Listener:  "unix://" + cfg.path("kine.sock"),
		Endpoint: "sqlite://" + cfg.path("db/state.db") +
			"?_journal_mode=WAL&_busy_timeout=30000&_synchronous=NORMAL&_txlock=immediate&_stmt_cache_size=20&cache=shared",
		// Without these two, which the library leaves empty, the API server offers no watch-list.
		NotifyInterval:      5 * time.Second,
		EmulatedETCDVersion: "3.6.11",
		CompactTimeout:      5 * time.Second,
		CompactMinRetain:    1000,
		CompactBatchSize:    1000,
		PollBatchSize:       500,
		PollInterval:        time.Second,
	}
	c.ConnectionPoolConfig.MaxIdle = 20
	c.ConnectionPoolConfig.MaxIdleTime = 2 * time.Minute
	etcd, err := endpoint.Listen(ctx, c)
	if err != nil {
		return nil, err
	}
	s.endpoints = etcd.Endpoints
	return s, nil
}
