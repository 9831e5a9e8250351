package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/cloudhub/internal/enrol"
	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/cloudhub/internal/modelfile"
	"github.com/longshore-edge/longshore/sync/durable"
)

// grace is how long requests under way may take when the hub is asked to end.
const grace = 3 * time.Second

func runCommand() *cobra.Command {
	var cfg config
	var file string
	settings := cfg.flags()
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run a cloud hub",
		Long: `Run a cloud hub until it gets SIGTERM or SIGINT.

With --source folder (the default) the specs are YAML files in a folder that is watched: save a file, and the edges it
concerns have it a moment later. With --source kubernetes they are the Edges, Models and pods of a cluster; "cloudhub crds"
prints the definitions it needs.

Every flag can also be set in the environment (--log-level is LONGSHORE_LOG_LEVEL) or in the YAML file that --config names
(log-level: debug). The command line wins over the environment, that over the file.`,
		Example: `  cloudhub run --manifests ./manifests --data ./hub
  cloudhub run --source kubernetes --kubeconfig ~/.kube/config --mqtt :8883 --tls-cert hub.pem --tls-key hub.key`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := load(settings, file); err != nil {
				return err
			}
			if err := cfg.validate(); err != nil {
				return err
			}
			h, err := newHub(cfg, cfg.logger(cmd.ErrOrStderr()))
			if err != nil {
				return err
			}
			defer h.close()
			limitGarbage()
			return h.run(cmd.Context())
		},
	}
	cmd.Flags().AddFlagSet(settings)
	cmd.Flags().StringVar(&file, "config", "", "YAML `file` with the flags below as keys (environment "+configVariable+")")
	return cmd
}

// hub is a cloud hub put together.
type hub struct {
	cfg    config
	log    *slog.Logger
	unlock func()
	token  string // for /api/; empty: none is needed

	tokens *enrol.Tokens
	cache  *mirror.Cache
	source source
	mirror *mirror.Mirror
	intake *intake.Intake
	files  *modelfile.Store
	broker *broker.Broker
	door   net.Listener
}

// newHub opens everything that can fail for reasons a user can mend. It starts nothing; the caller calls close in the end.
func newHub(cfg config, log *slog.Logger) (*hub, error) {
	h := &hub{cfg: cfg, log: log, cache: mirror.NewCache()}
	if err := h.open(); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *hub) open() error {
	cfg, log := h.cfg, h.log
	serverTLS, err := cfg.tls()
	if err != nil {
		return err
	}
	if h.token, err = cfg.apiToken(); err != nil {
		return err
	}
	if err := durable.MkdirAll(cfg.Data, 0o700); err != nil {
		return usagef("make the data folder: %w (choose another with --data, or run as a user that may write there)", err)
	}
	if h.unlock, err = lockData(cfg.Data); err != nil {
		return err
	}
	key, err := enrol.SigningKey(cfg.SigningKey)
	if err != nil {
		return err
	}
	if h.tokens, err = enrol.OpenTokens(cfg.TokenFile, log.With("part", "enrolment"), mirror.Access); err != nil {
		return err
	}
	if h.source, err = h.newSource(); err != nil {
		return err
	}
	if h.files, err = modelfile.New(modelfile.Config{
		Logger: log.With("part", "models"), Dir: cfg.Models, CacheDir: filepath.Join(cfg.Data, "models"), MaxBytes: int64(cfg.ModelCacheBytes),
	}); err != nil {
		return err
	}
	if h.intake, err = intake.Open(intake.Config{
		Logger: log.With("part", "telemetry"), Dir: filepath.Join(cfg.Data, "telemetry"), MaxAge: cfg.RetentionAge, MaxBytes: int64(cfg.RetentionBytes),
	}); err != nil {
		return err
	}
	if h.mirror, err = mirror.New(mirror.Config{
		Logger: log.With("part", "mirror"), HubName: cfg.HubName, Cluster: h.source.ClusterUID, Key: key,
		Cache: h.cache, Upstream: h.source, Intake: h.intake, Current: h.tokens.Current,
	}); err != nil {
		return err
	}
	if h.broker, err = broker.New(broker.Config{
		Logger: log.With("part", "broker"), Auth: h.tokens, Virtual: h.mirror,
		Listeners: []broker.Listener{{Name: "mqtt", Address: cfg.MQTT, TLS: serverTLS}},
	}); err != nil {
		return fmt.Errorf("--mqtt: %w", err)
	}
	if h.door, err = net.Listen("tcp", cfg.HTTP); err != nil {
		return fmt.Errorf("--http: %w (is another hub running? choose a free port)", err)
	}
	if serverTLS != nil {
		h.door = tls.NewListener(h.door, serverTLS)
	} else if !loopback(cfg.MQTT) {
		log.Warn("edges send their tokens unencrypted to an address that other machines reach: set --tls-cert and --tls-key", "mqtt", cfg.MQTT)
	}
	return nil
}

// lockData makes sure that one process uses a data folder.
func lockData(dir string) (unlock func(), err error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, usagef("lock the data folder: %w (choose another with --data, or run as a user that may write there)", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, usagef("another cloudhub uses the data folder %s: stop it, or choose another with --data", dir)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	return func() { f.Close() }, nil
}

// close gives back what open opened, as far as run has not done so.
func (h *hub) close() {
	if h.intake != nil {
		if err := h.intake.Close(); err != nil {
			h.log.Error("close the telemetry store", "err", err)
		}
	}
	if h.door != nil {
		h.door.Close()
	}
	if h.unlock != nil {
		h.unlock()
	}
}

// run serves until ctx ends. Telemetry ends last, so that everything received is committed.
func (h *hub) run(ctx context.Context) error {
	h.log.Info("cloud hub starts", "version", buildVersion(), "source", h.cfg.Source, "mqtt", h.broker.Addr("mqtt"), "http", h.door.Addr(), "data", h.cfg.Data)
	last, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	all, ctx := errgroup.WithContext(ctx)
	all.Go(func() error { return named("telemetry", h.intake.Run(last)) })
	all.Go(func() error {
		defer stop()
		parts, ctx := errgroup.WithContext(ctx)
		parts.Go(func() error { return named("source", h.source.Run(ctx)) })
		parts.Go(func() error { return named("mirror", h.mirror.Run(ctx)) })
		parts.Go(func() error { return named("token file", h.tokens.Run(ctx, h.mirror.Revoke)) })
		parts.Go(func() error { return named("broker", h.broker.Run(ctx)) })
		parts.Go(func() error { return named("model files", h.files.Run(ctx)) })
		parts.Go(func() error { h.wantFiles(ctx); return nil })
		parts.Go(func() error { paceGarbage(ctx); return nil })
		parts.Go(func() error { return named("http", h.serve(ctx)) })
		return parts.Wait()
	})
	err := all.Wait()
	h.log.Info("cloud hub ended", "err", err)
	return err
}

func named(part string, err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}

// wantFiles tells the file store which files Models name.
func (h *hub) wantFiles(ctx context.Context) {
	for {
		var want []modelfile.Source
		for _, s := range h.cache.ModelSources() {
			want = append(want, modelfile.Source{Digest: s.Digest, Size: s.SizeBytes, URI: s.URI})
		}
		h.files.Want(want)
		select {
		case <-ctx.Done():
			return
		case <-h.cache.ModelsChanged():
		}
	}
}

// serve answers HTTP until ctx ends.
func (h *hub) serve(ctx context.Context) error {
	server := &http.Server{
		Handler: h.handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(h.door) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	soon, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if server.Shutdown(soon) != nil {
		_ = server.Close()
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
