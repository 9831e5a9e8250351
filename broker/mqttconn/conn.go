package mqttconn

import (
	"context"
	"crypto/tls"
	"log/slog"
	"time"
)

// Config of a Dialer. The zero value of each duration means the default in parentheses.
type Config struct {
	Logger *slog.Logger
	// URL: tcp://host:port, tls://host:port, ws://host:port/mqtt or wss://host:port/mqtt.
	URL      string
	TLS      *tls.Config
	Username string
	// Password is asked for at each connection.
	Password func() string
	// ClientIDPrefix precedes random characters.
	ClientIDPrefix string
	KeepAlive      time.Duration // (30 s)
	ConnectTimeout time.Duration // (15 s)
	// RetryMin and RetryMax bound the jittered, doubling pause between attempts (0.5 s, 30 s). The first retry after a
	// connection that had worked comes within 1 s.
	RetryMin, RetryMax time.Duration
	// StallTimeout ends a connection on which no byte moved for so long although something is outstanding (60 s).
	StallTimeout time.Duration
	// Queue bounds messages received and not yet handled (64); when full, reading stops.
	Queue int
}

// Message received.
type Message struct {
	Topic    string
	Payload  []byte
	Retained bool
}

// Session is one live connection. Its methods are safe for concurrent use.
type Session struct{ impl any }

// Messages delivers what arrives, in order. It is closed when the connection ends.
func (s *Session) Messages() <-chan Message { panic("TODO") }

// Publish sends a QoS 0 message; it blocks while the peer takes no bytes.
func (s *Session) Publish(ctx context.Context, topic string, payload []byte) error { panic("TODO") }

// Subscribe asks for topics at QoS 0 and waits for the SUBACK; a refused filter is an error that names it.
func (s *Session) Subscribe(ctx context.Context, filters ...string) error { panic("TODO") }

// Bytes moved on this connection so far, with all overheads above TCP.
func (s *Session) Bytes() (in, out uint64) { panic("TODO") }

// Run connects again and again until ctx ends, and calls serve for each connection with a ctx that ends with the
// connection. The next dial starts only after serve has returned and every goroutine of the connection has ended. An
// error from serve closes the connection and is logged. onState is told of every change, for status; it may be nil.
// Run returns nil when ctx ends, and an error only for a configuration that can never work.
func Run(ctx context.Context, cfg Config, serve func(ctx context.Context, s *Session) error, onState func(State)) error {
	panic("TODO")
}

// State of the link.
type State struct {
	Connected bool
	Since     time.Time
	// Err is why the last attempt or connection ended, worded for people, with what to do.
	Err error
	// NextTry is when the next attempt starts, if not connected.
	NextTry time.Time
}
