package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/edgehub/internal/infer"
	"github.com/longshore-edge/longshore/edgehub/internal/local"
	"github.com/longshore-edge/longshore/edgehub/internal/reconcile"
	"github.com/longshore-edge/longshore/edgehub/internal/uplink"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/outbox"
)

// agent is the whole edge hub. Create it with newAgent, then call Run once.
type agent struct {
	cfg     Config
	cred    credential
	log     *slog.Logger
	logs    *logRing
	started time.Time
	// warnings are what the agent met at its start and went on from, for people.
	warnings []string

	lock      *os.File
	store     *desired.Store
	outbox    *outbox.Log
	models    *infer.Manager
	runtime   reconcile.Runtime
	reconcile *reconcile.Reconciler
	broker    *local.Broker
	uplink    *uplink.Uplink
	node      *longshorepb.NodeReport
	http      net.Listener // the door on the network
	control   net.Listener // the Unix socket
}

// newAgent opens everything the agent needs, so that what is in the way is an error here. It starts nothing. The
// configuration is valid.
func newAgent(cfg Config, log *slog.Logger, logs *logRing) (a *agent, err error) {
	a = &agent{cfg: cfg, log: log, logs: logs, started: time.Now(), runtime: reconcile.None{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	if a.cred, err = readCredential(cfg.Credential); err != nil {
		return a, err
	}
	hubTLS, err := readCA(cfg.Hub.CA)
	if err != nil {
		return a, err
	}
	state := stateDir(cfg.State)
	if a.lock, err = state.open(); err != nil {
		return a, err
	}
	if err := a.openState(state); err != nil {
		return a, err
	}
	a.reconcile = reconcile.New(reconcile.Config{
		Logger: log.With("part", "reconcile"), Store: a.store, Models: a.models, Runtime: a.runtime,
	})
	a.uplink, err = uplink.New(uplink.Config{
		Logger: log.With("part", "uplink"),
		Edge:   a.cred.Edge, Token: a.cred.Token, EdgeKey: a.cred.Key, HubKeys: a.cred.HubKeys, AgentVersion: versionString(),
		URL: cfg.Hub.URL, FilesURL: cfg.Hub.Files, TLS: hubTLS, Store: a.store, Outbox: a.outbox,
		Account: a.account, AccountChanged: a.reconcile.Changed(),
		Committed: a.reconcile.Wake, LinkUp: a.models.LinkUp, BacklogRate: int64(cfg.Telemetry.BacklogRate),
	})
	if err != nil {
		return a, err
	}
	return a, a.openDoors(state)
}

// outboxReserve is the free space that telemetry leaves on the disk. It is more than the store of desired state needs to
// begin a session: a disk that telemetry could fill to the end would keep the link down that takes the telemetry away.
const outboxReserve = 48 << 20

// openState opens what is kept on disk.
func (a *agent) openState(state stateDir) error {
	var moved string
	var err error
	if a.store, moved, err = desired.OpenStore(state.desired(), a.log.With("part", "store")); err != nil {
		return explainDisk(fmt.Errorf("open desired state: %w", err))
	}
	if moved != "" {
		a.warn("desired state was unreadable and was moved aside; everything is fetched again from the hub", "moved", moved)
	}
	a.outbox, err = outbox.Open(state.outbox(), outbox.Config{Logger: a.log.With("part", "outbox"), Quotas: a.cfg.quotas(), Reserve: outboxReserve})
	if err != nil {
		return explainDisk(fmt.Errorf("open outbox: %w", err))
	}
	a.node = describeNode(a.runtime.Version())
	a.models, err = infer.New(infer.Config{
		Logger: a.log.With("part", "models"), Dir: state.models(), Worker: a.cfg.Models.Worker, ORTLibrary: a.cfg.Models.ORTLibrary,
		DiskQuota: int64(a.cfg.Models.DiskQuota), DownloadRate: int64(a.cfg.Models.DownloadRate),
		MemoryLimit: int64(a.cfg.Models.MemoryLimit), KV: a.store, Fetcher: fetcher{a}, Publish: a.publish, Append: a.append,
	})
	if err != nil {
		return explainDisk(fmt.Errorf("open models: %w", err))
	}
	if _, err := os.Stat(a.cfg.Models.Worker); err != nil {
		a.warn("worker program not found, so no model can serve: install it there or set models.worker", "worker", a.cfg.Models.Worker)
	}
	return nil
}

// openDoors opens every listener.
func (a *agent) openDoors(state stateDir) error {
	var err error
	if a.http, err = net.Listen("tcp", a.cfg.HTTP.Listen); err != nil {
		return fmt.Errorf("http.listen: %w: stop what uses this address, or set another (--http-listen)", err)
	}
	if err := os.RemoveAll(state.socket()); err != nil {
		return state.explain(err)
	}
	if a.control, err = net.Listen("unix", state.socket()); err != nil {
		return fmt.Errorf("open the agent's own socket: %w", err)
	}
	// The broker comes last: it closes its listener only when it runs.
	streams := make([]local.Stream, len(a.cfg.Streams))
	for i, s := range a.cfg.Streams {
		streams[i] = local.Stream{Name: s.Name, Topics: s.Topics}
	}
	a.broker, err = local.New(local.Config{
		Logger: a.log.With("part", "broker"), Listen: a.cfg.Broker.Listen, MaxConnections: int(a.cfg.Broker.MaxConnections),
		Streams: streams, Outbox: a.outbox, Offer: a.models.Message,
	})
	if err != nil {
		return fmt.Errorf("broker.listen: %w", err)
	}
	return nil
}

// warn notes what the status shows for as long as the agent runs.
func (a *agent) warn(msg, key, value string) {
	a.log.Warn(msg, key, value)
	a.warnings = append(a.warnings, msg+" ("+key+" "+value+")")
}

// readCA returns nil for an empty file: the system's authorities.
func readCA(file string) (*tls.Config, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("hub.ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("hub.ca: %s holds no PEM certificate", file)
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// Run works until ctx ends, then stops everything, workers included, and closes what newAgent opened.
func (a *agent) Run(ctx context.Context) error {
	a.log.Info("agent started", "edge", a.cred.Edge, "version", versionString(), "state", a.cfg.State, "hub", a.cfg.Hub.URL,
		"devices", a.broker.Addr().String(), "http", a.http.Addr().String())
	g, ctx := errgroup.WithContext(ctx)
	for part, run := range map[string]func(context.Context) error{
		"outbox": a.outbox.Run, "models": a.models.Run, "reconcile": a.reconcile.Run, "broker": a.broker.Run, "uplink": a.uplink.Run,
		"http":    func(ctx context.Context) error { return serveHTTP(ctx, a.http, a.publicDoor(), a.log) },
		"control": func(ctx context.Context) error { return serveHTTP(ctx, a.control, a.controlDoor(), a.log) },
	} {
		g.Go(func() error {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", part, err)
			}
			return nil
		})
	}
	err := errors.Join(g.Wait(), a.close())
	a.log.Info("agent stopped")
	return err
}

// close closes what is open, the lock last.
func (a *agent) close() error {
	var errs []error
	if a.http != nil {
		errs = append(errs, ignoreClosed(a.http.Close()))
	}
	if a.control != nil {
		errs = append(errs, ignoreClosed(a.control.Close()))
	}
	if a.outbox != nil {
		errs = append(errs, a.outbox.Close())
	}
	if a.store != nil {
		errs = append(errs, a.store.Close())
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(errs...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// account is what the uplink reports.
func (a *agent) account() uplink.Account {
	node := proto.CloneOf(a.node)
	node.DiskBytes, node.DiskFreeBytes = diskOf(a.cfg.State)
	for _, s := range a.outboxStatus().Streams {
		node.BacklogRecords += s.Held
		node.BacklogBytes += uint64(s.HeldBytes)
	}
	return uplink.Account{Pods: a.reconcile.Pods(), Models: a.models.Reports(), Node: node}
}

// publish is how models answer devices.
func (a *agent) publish(ctx context.Context, topic string, payload []byte) error {
	return a.broker.Publish(ctx, topic, payload)
}

// append is how models write telemetry.
func (a *agent) append(ctx context.Context, stream, topic string, payload []byte) error {
	verdicts, err := a.outbox.Append(ctx, []outbox.Record{{Stream: stream, Topic: topic, Payload: payload}})
	if err != nil {
		return err
	}
	return verdicts[0]
}
