package broker

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"time"
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
	// Expiry etc. of MQTT 5 are kept by the broker for the fan-out.
}

// Store is called with batches of what clients published, in the order in which they arrived, by one goroutine.
// When it returns, each message whose verdict is nil is acknowledged (QoS 1 and 2) and then fanned out to subscribers;
// a message whose verdict is an error is not, and its client's connection is closed, because an MQTT 3.1.1 client
// resends only on reconnect. len(verdicts) == len(batch). A nil Store accepts everything at once.
type Store func(ctx context.Context, batch []Message) (verdicts []error)

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
type Broker struct{ impl any }

// New checks the configuration and opens the listeners, so that a taken port is an error here. It starts nothing.
func New(cfg Config) (*Broker, error) { panic("TODO") }

// Run serves until ctx ends, then closes every connection and returns nil once all goroutines have ended.
func (b *Broker) Run(ctx context.Context) error { panic("TODO") }

// Addr returns the address of the listener of that name.
func (b *Broker) Addr(name string) net.Addr { panic("TODO") }

// WebSocket returns the handler that serves MQTT over WebSocket (subprotocol "mqtt"), to be mounted where the owner
// wants it. It serves only while Run runs.
func (b *Broker) WebSocket() http.Handler { panic("TODO") }

// Publish fans a message out to subscribers as if a client had sent it, without Store. Safe for concurrent use.
func (b *Broker) Publish(ctx context.Context, topic string, payload []byte, qos byte, retain bool) error {
	panic("TODO")
}

// Stats are counters for metrics.
type Stats struct {
	Connections                                int64
	Accepted, Refused, Stalled, Dropped        int64
	MessagesIn, MessagesOut, BytesIn, BytesOut int64
}

// Stats returns the current counters.
func (b *Broker) Stats() Stats { panic("TODO") }

// Conn is one client's connection, as the owner of the virtual topics sees it. Safe for concurrent use.
type Conn struct{ impl any }

// ID is unique in this process.
func (c *Conn) ID() uint64 { panic("TODO") }

// ClientID of the CONNECT packet.
func (c *Conn) ClientID() string { panic("TODO") }

// Identity of the client.
func (c *Conn) Identity() Identity { panic("TODO") }

// Remote address.
func (c *Conn) Remote() net.Addr { panic("TODO") }

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { panic("TODO") }

// Send writes one QoS 0 PUBLISH, straight to the socket, and blocks while the peer does not take bytes: that is the
// back-pressure. Never call it from a method of Virtual. The unsent bytes in the kernel are kept small
// (TCP_NOTSENT_LOWAT), so what is sent next does not queue behind much. retain is for answers to a subscribe.
func (c *Conn) Send(topic string, payload []byte, retain bool) error { panic("TODO") }

// Close ends the connection; reason goes to the log.
func (c *Conn) Close(reason string) { panic("TODO") }
