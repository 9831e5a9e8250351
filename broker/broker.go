package broker

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"golang.org/x/sync/errgroup"
)

// Identity is who a client is, as its credential proved.
type Identity struct {
	// Name is the edge's or the device's name.
	Name string
	// Key identifies the credential: for tokens the SHA-256 of the token. 32 bytes or nil.
	Key []byte
	// Access judges topics; never nil.
	Access Access
}

// Access judges what one identity may do. Both are called often and must be fast and safe for concurrent use.
type Access interface {
	// Publish judges a topic name without wildcards; wills are judged by it at CONNECT.
	Publish(name string) bool
	// Subscribe judges a topic filter, already stripped of $share/<group>/.
	Subscribe(filter string) bool
}

// Login is what a client presented.
type Login struct {
	ClientID, Username string
	Password           []byte
	Remote             net.Addr
	TLS                *tls.ConnectionState // nil without TLS
}

// Authenticator stands between credentials and identities. An error refuses the client; its text goes to the log, never
// to the client.
type Authenticator interface {
	Authenticate(ctx context.Context, l Login) (Identity, error)
}

// Message is one PUBLISH of a client.
type Message struct {
	From     Identity
	ClientID string
	Topic    string
	Payload  []byte
	QoS      byte
	Retain   bool
	// Version is the client's protocol level: 3 and 4 are MQTT 3.1 and 3.1.1, 5 is MQTT 5; 0 for a will, which nobody waits for.
	Version byte
	// Expiry etc. of MQTT 5 are kept by the broker for the fan-out.
}

// Store is called with batches of what clients published, in the order in which they arrived, by one goroutine.
// When it returns, each message whose verdict is nil is acknowledged (QoS 1 and 2) and then fanned out to subscribers;
// a message whose verdict is an error is not, and its client's connection is closed, because an MQTT 3.1.1 client
// resends only on reconnect. A verdict that wraps ErrUnstorable keeps the connection. len(verdicts) == len(batch). A nil Store
// accepts everything at once.
type Store func(ctx context.Context, batch []Message) (verdicts []error)

// ErrUnstorable is the verdict on a message that can never be stored: sending it again would be the same for ever. An MQTT 5 client
// is told with reason code 0x97 (quota exceeded). An earlier protocol has no word for it, so its client is answered as if the
// message was stored; the Store has to account for that. Either way it is not fanned out. The Store logs it.
var ErrUnstorable = errors.New("message can never be stored")

// Virtual owns every topic under longshore/v1/ (topic.Root): such messages are never stored, retained or
// fanned out by the broker. Its methods are called on the connection's read goroutine and must not block: they note and
// wake others.
type Virtual interface {
	// Connected is called once after the CONNACK; Disconnected once after, when nothing can be sent any more.
	Connected(c *Conn)
	Disconnected(c *Conn)
	// Subscribed is called after the SUBACK was written, with the granted filters of one SUBSCRIBE.
	// Subscriptions to virtual topics are not kept by the broker: the owner keeps what it wants to keep.
	Subscribed(c *Conn, filters []string)
	Unsubscribed(c *Conn, filters []string)
	// Received is called for a PUBLISH to a virtual topic, before its PUBACK. payload is the callee's to keep.
	Received(c *Conn, topic string, payload []byte)
}

// Listener is one door.
type Listener struct {
	// Name for logs and metrics.
	Name string
	// Address like "127.0.0.1:1883". MQTT over TCP, with TLS if set.
	Address string
	TLS     *tls.Config
	// Net is used instead of Address if set.
	Net net.Listener
}

// Config of a broker. The zero value of each limit means the default in parentheses.
type Config struct {
	Logger    *slog.Logger
	Listeners []Listener
	Auth      Authenticator
	Virtual   Virtual // may be nil
	Store     Store   // may be nil

	// HandshakeTimeout bounds the time from accept to a complete CONNECT (10 s).
	HandshakeTimeout time.Duration
	// StallTimeout closes a connection whose peer takes no byte for so long while there is something to write (20 s).
	StallTimeout time.Duration
	// MaxConnectPacket bounds the CONNECT packet, in bytes (16 KiB); MaxPacket all later ones (256 KiB).
	MaxConnectPacket, MaxPacket int
	// MaxConnections in all (10,000).
	MaxConnections int
	// MaxQueued bounds messages queued for one client, on-line or away (8,192). What is dropped there is counted and logged.
	MaxQueued int
	// MaxPending bounds messages of one client that wait for Store (256): past it the client is not read from.
	MaxPending int
}

// Broker serves MQTT. Create it with New, then call Run once.
type Broker struct {
	cfg     Config
	log     *slog.Logger
	engine  *mqtt.Server
	doors   []door
	commits *commits
	stats   counters
	lastID  atomic.Uint64

	complaints complaints // only commit uses it

	fan      sync.Mutex          // held while one message is queued for all its subscribers
	retained map[string]*message // guarded by fan
	full     bool                // of retained topics, and logged; guarded by fan

	mu       sync.RWMutex // guards what follows
	sessions map[string]*session
	conns    map[*Conn]struct{}
	open     int // connections admitted, before and after CONNECT
	running  bool
	served   sync.WaitGroup
	stopped  chan struct{} // closed when Run's ctx has ended
}

const (
	// maxRetained bounds retained topics.
	maxRetained = 20_000
	// maxQueuedBytes bounds what is queued for one client, besides MaxQueued.
	maxQueuedBytes = 16 << 20
	// maxPendingBytes bounds what waits for Store, of all clients together.
	maxPendingBytes = 32 << 20
	// maxInboundQoS is announced to MQTT 5 clients as Receive Maximum.
	maxInboundQoS = 1024
)

// New checks the configuration and opens the listeners, so that a taken port is an error here. It starts nothing.
func New(cfg Config) (*Broker, error) {
	if cfg.Auth == nil {
		return nil, errors.New("broker: no authenticator configured")
	}
	cfg = cfg.withDefaults()
	b := &Broker{
		cfg: cfg, log: cfg.Logger, commits: newCommits(maxPendingBytes), complaints: complaints{},
		retained: map[string]*message{}, sessions: map[string]*session{}, conns: map[*Conn]struct{}{},
		stopped: make(chan struct{}),
	}
	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumPacketSize = uint32(cfg.MaxPacket)
	caps.MaximumMessageExpiryInterval = 0 // keep messages as long as their publisher wishes
	caps.MaximumClientWritesPending = 1   // mochi's outbound channel is not used
	caps.ReceiveMaximum = maxInboundQoS
	caps.TopicAliasMaximum = 0 // aliases would reach the access check unresolved
	caps.Compatibilities.NoInheritedPropertiesOnAck = true
	b.engine = mqtt.New(&mqtt.Options{Capabilities: caps, Logger: slog.New(slog.DiscardHandler), SysTopicResendInterval: 1 << 31})
	if err := b.engine.AddHook(&hook{b: b}, nil); err != nil {
		return nil, fmt.Errorf("prepare broker: %w", err)
	}
	for _, l := range cfg.Listeners {
		d, err := openDoor(l)
		if err != nil {
			for _, d := range b.doors {
				_ = d.Close()
			}
			return nil, err
		}
		b.doors = append(b.doors, d)
	}
	return b, nil
}

func (cfg Config) withDefaults() Config {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.HandshakeTimeout = cmp.Or(cfg.HandshakeTimeout, 10*time.Second)
	cfg.StallTimeout = cmp.Or(cfg.StallTimeout, 20*time.Second)
	cfg.MaxConnectPacket = cmp.Or(cfg.MaxConnectPacket, 16<<10)
	cfg.MaxPacket = cmp.Or(cfg.MaxPacket, 256<<10)
	cfg.MaxConnections = cmp.Or(cfg.MaxConnections, 10_000)
	cfg.MaxQueued = cmp.Or(cfg.MaxQueued, 8192)
	cfg.MaxPending = cmp.Or(cfg.MaxPending, 256)
	return cfg
}

// Run serves until ctx ends, then closes every connection and returns nil once all goroutines have ended.
func (b *Broker) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	b.mu.Lock()
	b.running = true
	b.mu.Unlock()
	for _, d := range b.doors {
		g.Go(func() error { return b.acceptLoop(ctx, d) })
	}
	g.Go(func() error { return b.commit(ctx) })
	g.Go(func() error { return b.keepHouse(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		b.closeAll()
		b.served.Wait()
		return nil
	})
	return g.Wait()
}

// closeAll closes every connection and lets no other in.
func (b *Broker) closeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.running = false
	close(b.stopped)
	for c := range b.conns {
		c.Close("broker stops")
	}
}

// admit counts a connection in; the caller calls leave when it has ended. It says false when the broker doesn't run
// or is full.
func (b *Broker) admit() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.running || b.open >= b.cfg.MaxConnections {
		b.stats.refused.Add(1)
		return false
	}
	b.open++
	b.served.Add(1)
	b.stats.accepted.Add(1)
	return true
}

func (b *Broker) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open--
	b.served.Done()
}

// register makes closeAll know c; it says false if that has been already.
func (b *Broker) register(c *Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running {
		b.conns[c] = struct{}{}
	}
	return b.running
}

func (b *Broker) unregister(c *Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.conns, c)
}

// Addr returns the address of the listener of that name, or nil if there is none.
func (b *Broker) Addr(name string) net.Addr {
	for _, d := range b.doors {
		if d.name == name {
			return d.Addr()
		}
	}
	return nil
}

// lookup returns the session of a key, or nil.
func (b *Broker) lookup(key string) *session {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.sessions[key]
}

// Stats are counters for metrics; all but Connections only grow.
type Stats struct {
	// Connections now.
	Connections int64
	// Accepted connections; Refused connections, topics and messages; connections Stalled; messages Dropped.
	Accepted, Refused, Stalled, Dropped int64
	// Messages and bytes, QoS repetitions and protocol overhead included.
	MessagesIn, MessagesOut, BytesIn, BytesOut int64
}

// Stats returns the current counters.
func (b *Broker) Stats() Stats {
	b.mu.RLock()
	open := int64(b.open)
	b.mu.RUnlock()
	s := &b.stats
	return Stats{
		Connections: open,
		Accepted:    s.accepted.Load(), Refused: s.refused.Load(), Stalled: s.stalled.Load(), Dropped: s.dropped.Load(),
		MessagesIn: s.messagesIn.Load(), MessagesOut: s.messagesOut.Load(), BytesIn: s.bytesIn.Load(), BytesOut: s.bytesOut.Load(),
	}
}

type counters struct {
	accepted, refused, stalled, dropped        atomic.Int64
	messagesIn, messagesOut, bytesIn, bytesOut atomic.Int64
}
