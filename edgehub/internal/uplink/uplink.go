package uplink

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/outbox"
)

// Store is where desired state and small values are kept; *desired.Store is one.
type Store interface {
	Load() (desired.Stored, error)
	Apply(a desired.EdgeAction) error
	NextSession() (uint64, error)
	Get(key string) ([]byte, error)
	Put(key string, value []byte) error
}

// Account is everything an edge reports of itself. The messages in it are not changed after they were handed out.
type Account struct {
	Pods   []*longshorepb.PodReport
	Models []*longshorepb.ModelReport
	Node   *longshorepb.NodeReport
}

// Config of an Uplink.
type Config struct {
	Logger *slog.Logger
	// Edge and Token are the edge's name and secret; EdgeKey identifies the credential in signed heads.
	Edge, Token string
	EdgeKey     []byte
	// HubKeys are the public keys whose heads are believed.
	HubKeys      []ed25519.PublicKey
	AgentVersion string
	// URL of the hub's MQTT door (tcp, tls, ws or wss) and FilesURL of its model files (http or https; empty: none).
	URL, FilesURL string
	TLS           *tls.Config
	Store         Store
	Outbox        *outbox.Log
	// Account returns what is to be reported now; AccountChanged is a 1-slot signal to look again.
	Account        func() Account
	AccountChanged <-chan struct{}
	// Committed is called after a new list is on disk, LinkUp when a session begins. Neither may block.
	Committed, LinkUp func()
	// BacklogRate bounds the backlog lane in bytes per second; 0 is unlimited.
	BacklogRate int64
}

// Status says where the uplink stands.
type Status struct {
	Link mqttconn.State
	// Session is the number of the newest session, 0 before the first.
	Session uint64
	Replica desired.ReplicaStatus
	// BytesIn and BytesOut count what moved over the link since the agent started.
	BytesIn, BytesOut uint64
	// Window bounds telemetry bytes sent and not acknowledged; Outstanding is what there is of them now.
	Window, Outstanding int
	// Superseded: another agent with the same identity took over, this one stopped syncing.
	Superseded bool
	// StoreErr is why the newest session ended early: what arrived could not be stored.
	StoreErr error
	// Rejected counts messages from the hub that were not believed or not understood, RejectedErr is the newest reason.
	Rejected    uint64
	RejectedErr error
}

var (
	// ErrNoLink says that the hub cannot be reached now.
	ErrNoLink = errors.New("no link to the cloud hub")

	errSuperseded = errors.New("another agent with the same identity took over")
)

// storeError is a failure to store what arrived, such as a full disk.
type storeError struct{ err error }

func (e *storeError) Error() string { return "store desired state: " + e.err.Error() }
func (e *storeError) Unwrap() error { return e.err }

// storePauseMin and storePauseMax bound the doubling pause after what arrived could not be stored.
const (
	storePauseMin = time.Second
	storePauseMax = time.Minute
)

// complainPause is the least time between two log lines about rejected messages: whoever sits on the link must not be able
// to fill the box's disk with them.
const complainPause = 10 * time.Second

// Uplink is the edge's side of the link. Create it with New, then call Run once. Safe for concurrent use.
type Uplink struct {
	cfg      Config
	instance [16]byte
	clocks   *clocks
	files    *http.Client

	mu      sync.Mutex
	replica *desired.Replica  // guarded by mu; driven by the session's loop only
	conn    *mqttconn.Session // guarded by mu; nil without a session
	status  Status            // guarded by mu; bytes of ended connections only
	flow    *flow             // guarded by mu; of the newest session
	// reported is what hubs were told up to the last session that ended. Sessions follow each other; it is theirs alone.
	reported reported
	// complained is when a rejected message was last logged; guarded by mu.
	complained time.Time
}

// New reads what the store holds. It starts nothing.
func New(cfg Config) (*Uplink, error) {
	u := &Uplink{cfg: cfg, flow: newFlow(), files: newFilesClient(cfg.TLS)}
	if _, err := rand.Read(u.instance[:]); err != nil {
		return nil, fmt.Errorf("make an instance id: %w", err)
	}
	var err error
	if u.clocks, err = newClocks(cfg.Store, cfg.Logger); err != nil {
		return nil, err
	}
	stored, err := cfg.Store.Load()
	if err != nil {
		return nil, fmt.Errorf("load desired state: %w", err)
	}
	u.replica = desired.NewReplica(desired.ReplicaConfig{
		Edge: cfg.Edge, EdgeKey: cfg.EdgeKey, HubKeys: cfg.HubKeys, AgentVersion: cfg.AgentVersion, Instance: u.instance,
	}, stored)
	return u, nil
}

// Run keeps the link until ctx ends. It returns an error only for a configuration that can never work.
func (u *Uplink) Run(ctx context.Context) error {
	defer u.files.CloseIdleConnections()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return u.clocks.run(ctx) })
	g.Go(func() error { return u.keep(ctx) })
	return g.Wait()
}

// keep connects again and again; it pauses while what arrives cannot be stored and stops when superseded.
func (u *Uplink) keep(ctx context.Context) error {
	pause := storePauseMin
	for {
		cause, err := u.connect(ctx)
		u.disconnected(cause)
		var se *storeError
		switch {
		case err != nil || ctx.Err() != nil:
			return err
		case errors.As(cause, &se):
			u.cfg.Logger.Error("cannot store what the hub sends; will try again", "error", se.err, "pause", pause)
			u.setStoreErr(se.err)
		default:
			u.cfg.Logger.Error("stopped syncing: another agent with the same identity took over; give each box its own credential, then restart the agent")
			<-ctx.Done()
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, storePauseMax)
	}
}

// connect runs connections until ctx ends or a session says why not to go on (cause).
func (u *Uplink) connect(ctx context.Context) (cause, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err = mqttconn.Run(ctx, mqttconn.Config{
		Logger: u.cfg.Logger, URL: u.cfg.URL, TLS: u.cfg.TLS, Username: u.cfg.Edge,
		Password: func() string { return u.cfg.Token }, ClientIDPrefix: u.cfg.Edge + "-",
	}, func(ctx context.Context, conn *mqttconn.Session) error {
		err := u.serve(ctx, conn)
		var se *storeError
		if errors.As(err, &se) || errors.Is(err, errSuperseded) {
			cancel(err)
		}
		return err
	}, u.setLink)
	return context.Cause(ctx), err
}

func (u *Uplink) setLink(s mqttconn.State) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.Link = s
}

// disconnected notes that nothing tries to connect now.
func (u *Uplink) disconnected(cause error) {
	u.setLink(mqttconn.State{Since: time.Now(), Err: cause})
}

func (u *Uplink) setStoreErr(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.StoreErr = err
}

// serve is one connection from its first message to its last.
func (u *Uplink) serve(ctx context.Context, conn *mqttconn.Session) error {
	number, err := u.cfg.Store.NextSession()
	if err != nil {
		return &storeError{err}
	}
	s := newSession(u, conn, number)
	defer u.end(s)
	if err := u.begin(s); err != nil {
		return err
	}
	u.cfg.Logger.Info("session began", "session", number)
	u.cfg.LinkUp()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.serve(ctx) })
	g.Go(func() error { return s.writer.run(ctx) })
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func (u *Uplink) begin(s *session) error {
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return fmt.Errorf("make a nonce: %w", err)
	}
	heads := u.cfg.Outbox.Heads()
	account := u.reported.digest()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.conn, u.flow, u.status.Session = s.conn, s.writer.flow, s.number
	u.replica.Start(time.Now(), nonce, s.number, heads, account)
	s.writer.reporter.setList(u.replica.Status().Committed)
	return nil
}

func (u *Uplink) end(s *session) {
	u.reported = s.writer.told()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.Superseded = u.status.Superseded || u.replica.Status().Superseded
	u.replica.Stop()
	in, out := s.conn.Bytes()
	u.status.BytesIn += in
	u.status.BytesOut += out
	u.conn = nil
}

// Status returns where the uplink stands now.
func (u *Uplink) Status() Status {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.status
	s.Replica = u.replica.Status()
	s.Superseded = s.Superseded || s.Replica.Superseded
	s.Window, s.Outstanding = u.flow.state()
	if u.conn != nil {
		in, out := u.conn.Bytes()
		s.BytesIn += in
		s.BytesOut += out
	}
	return s
}

// Clock returns how this boot's monotonic time maps to wall time now.
func (u *Uplink) Clock() *longshorepb.Clock { return u.clocks.current() }

func (u *Uplink) reject(topic string, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.Rejected++
	u.status.RejectedErr = err
	if now := time.Now(); now.Sub(u.complained) > complainPause {
		u.complained = now
		u.cfg.Logger.Warn("message of the hub rejected", "topic", topic, "error", err, "rejected", u.status.Rejected)
	}
}
