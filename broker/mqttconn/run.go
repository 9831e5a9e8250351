package mqttconn

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"
)

// Config of a connection. The zero value of each duration means the default in parentheses.
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
	KeepAlive      time.Duration // (30 s), at most 18 h
	ConnectTimeout time.Duration // (15 s)
	// RetryMin and RetryMax bound the jittered, doubling pause between attempts (0.5 s, 30 s). The first retry after a
	// connection that had worked comes within 1 s.
	RetryMin, RetryMax time.Duration
	// StallTimeout ends a connection on which no byte moved for so long although something is outstanding (60 s).
	StallTimeout time.Duration
	// Queue bounds messages received and not yet handled (64); when full, reading stops.
	Queue int
	// MaxPacket bounds packets received, in bytes (256 KiB); a larger one ends the connection.
	MaxPacket int
}

// State of the link.
type State struct {
	Connected bool
	// Since is when this state began.
	Since time.Time
	// Err is why the last attempt or connection ended, worded for people, with what to do.
	Err error
	// NextTry is when the next attempt starts, if not connected.
	NextTry time.Time
}

// Run connects again and again until ctx ends, and calls serve for each connection with a ctx that ends with the
// connection. The next dial starts only after serve has returned and every goroutine of the connection has ended. An
// error from serve closes the connection and is logged. onState is told of every change, for status; it may be nil.
// Run returns nil when ctx ends, and an error only for a configuration that can never work.
func Run(ctx context.Context, cfg Config, serve func(ctx context.Context, s *Session) error, onState func(State)) error {
	u, err := cfg.validate()
	if err != nil {
		return err
	}
	cfg = cfg.withDefaults()
	if onState == nil {
		onState = func(State) {}
	}
	pause := cfg.RetryMin
	for ctx.Err() == nil {
		began := time.Now()
		err := cfg.once(ctx, u, serve, func() {
			began = time.Now()
			onState(State{Connected: true, Since: began})
		})
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > max(pause, time.Second) {
			pause = cfg.RetryMin // it had worked
		}
		wait := pause/2 + mrand.N(pause/2+1)
		pause = min(2*pause, cfg.RetryMax)
		now := time.Now()
		cfg.Logger.Info("no connection to the hub", "url", u.Redacted(), "error", err, "retry_in", wait.Round(time.Millisecond))
		onState(State{Since: now, Err: err, NextTry: now.Add(wait)})
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

func (cfg Config) validate() (*url.URL, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("hub URL: %w", err)
	}
	switch u.Scheme {
	case "tcp", "tls":
		if u.Port() == "" {
			return nil, fmt.Errorf("hub URL %q names no port: write %s://host:port", cfg.URL, u.Scheme)
		}
	case "ws", "wss":
	default:
		return nil, fmt.Errorf("hub URL %q: the scheme must be tcp, tls, ws or wss", cfg.URL)
	}
	if u.Hostname() == "" {
		return nil, fmt.Errorf("hub URL %q names no host", cfg.URL)
	}
	if cfg.KeepAlive < 0 || cfg.KeepAlive > 18*time.Hour {
		return nil, fmt.Errorf("keepalive %v is not between 1s and 18h", cfg.KeepAlive)
	}
	return u, nil
}

func (cfg Config) withDefaults() Config {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Password == nil {
		cfg.Password = func() string { return "" }
	}
	cfg.KeepAlive = cmp.Or(cfg.KeepAlive, 30*time.Second)
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, 15*time.Second)
	cfg.RetryMin = cmp.Or(cfg.RetryMin, 500*time.Millisecond)
	cfg.RetryMax = cmp.Or(cfg.RetryMax, 30*time.Second)
	cfg.StallTimeout = cmp.Or(cfg.StallTimeout, 60*time.Second)
	cfg.Queue = cmp.Or(cfg.Queue, 64)
	cfg.MaxPacket = cmp.Or(cfg.MaxPacket, 256<<10)
	return cfg
}

// once connects, serves and returns why it ended, when every goroutine of the connection has ended.
func (cfg Config) once(ctx context.Context, u *url.URL, serve func(context.Context, *Session) error, connected func()) error {
	s, err := cfg.connect(ctx, u)
	if err != nil {
		return explain(err, u, cfg.Username)
	}
	cfg.Logger.Info("connected to the hub", "url", u.Redacted())
	connected()
	return s.run(ctx, serve)
}

// connect dials and sees the CONNACK within ConnectTimeout.
func (cfg Config) connect(ctx context.Context, u *url.URL) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.ConnectTimeout)
	defer cancel()
	t, err := dial(ctx, u, cfg.TLS, cfg.StallTimeout)
	if err != nil {
		return nil, err
	}
	// The handshake is bounded by closing: a WebSocket has no deadline that leaves it usable.
	stop := context.AfterFunc(ctx, t.close)
	err = cfg.handshake(t)
	if !stop() {
		err = cmp.Or(ctx.Err(), err)
	}
	if err != nil {
		t.close()
		return nil, err
	}
	return newSession(cfg, t), nil
}

func (cfg Config) handshake(t *transport) error {
	pk := packets.NewControlPacket(packets.Connect).(*packets.ConnectPacket)
	pk.ProtocolName, pk.ProtocolVersion = "MQTT", 4
	pk.CleanSession = true
	pk.ClientIdentifier = cfg.ClientIDPrefix + rand.Text()
	pk.Keepalive = uint16(max(1, cfg.KeepAlive/time.Second))
	if cfg.Username != "" {
		pk.UsernameFlag, pk.Username = true, cfg.Username
		if pw := cfg.Password(); pw != "" {
			pk.PasswordFlag, pk.Password = true, []byte(pw)
		}
	}
	if err := pk.Write(t); err != nil {
		return fmt.Errorf("send CONNECT: %w", err)
	}
	first, err := t.reader.Peek(1)
	if err != nil {
		return fmt.Errorf("read CONNACK: %w", err)
	}
	if first[0] != packets.Connack<<4 {
		return fmt.Errorf("%w: CONNECT was answered with %#x", errNotMQTT, first[0])
	}
	answer, err := readPacket(t.reader, cfg.MaxPacket)
	if err != nil {
		return fmt.Errorf("read CONNACK: %w", err)
	}
	ack, ok := answer.(*packets.ConnackPacket)
	if !ok {
		return fmt.Errorf("hub answered CONNECT with %T", answer)
	}
	if ack.ReturnCode != packets.Accepted {
		return refusal(ack.ReturnCode)
	}
	return nil
}

// errNotMQTT says that something answers, but not as a hub does where the URL's scheme is right.
var errNotMQTT = errors.New("the answer is not MQTT")

// refusal is a CONNACK return code other than accepted.
type refusal byte

func (r refusal) Error() string {
	if text := packets.ConnackReturnCodes[byte(r)]; text != "" {
		return text
	}
	return fmt.Sprintf("connection refused with code %d", byte(r))
}

// explain words an error of connecting for people, with what to do.
func explain(err error, u *url.URL, user string) error {
	var (
		code refusal
		dns  *net.DNSError
		ca   x509.UnknownAuthorityError
		name x509.HostnameError
	)
	host := u.Host
	switch {
	case errors.As(err, &code) && (code == packets.ErrRefusedBadUsernameOrPassword || code == packets.ErrRefusedNotAuthorised):
		return fmt.Errorf("hub %s does not accept the credential of %q: enrol this edge again, or correct its token: %w", host, user, err)
	case errors.As(err, &code) && code == packets.ErrRefusedServerUnavailable:
		return fmt.Errorf("hub %s is busy or stopping, it will be tried again: %w", host, err)
	case errors.As(err, &dns):
		return fmt.Errorf("no address for %q: check the hub's name and this machine's DNS and network: %w", dns.Name, err)
	case errors.As(err, &ca):
		return fmt.Errorf("the certificate of hub %s is signed by nobody this edge trusts: configure its CA: %w", host, err)
	case errors.As(err, &name):
		return fmt.Errorf("the certificate of hub %s is for another name: correct the URL or the certificate: %w", host, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nothing listens at %s: check the address, and that the hub runs: %w", host, err)
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return fmt.Errorf("no route to %s: check this machine's network: %w", host, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("hub %s does not answer: check the address, the network and firewalls between: %w", host, err)
	}
	if hint := wrongDoor(err, u.Scheme); hint != "" {
		return fmt.Errorf("%s answers, but not to %s://: %s: %w", host, u.Scheme, hint, err)
	}
	return fmt.Errorf("connect to hub %s: %w", host, err)
}

// wrongDoor says what the URL should be if the error is that of a door which speaks something else than the scheme; empty if
// nothing hints at that.
func wrongDoor(err error, scheme string) string {
	var noTLS tls.RecordHeaderError
	foreign := errors.Is(err, errNotMQTT)
	closed := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
	switch {
	case errors.As(err, &noTLS), errors.Is(err, http.ErrSchemeMismatch):
		return "it speaks no TLS: correct the port, or write tcp:// (or ws://) if the link is meant to be open"
	case scheme == "tcp" && (foreign || closed):
		return "write tls:// if that port wants TLS, or ws://host:port/mqtt if it is the hub's HTTP address"
	case scheme == "tls" && (foreign || closed):
		return "write tcp:// if that port wants no TLS, or wss://host:port/mqtt if it is the hub's HTTPS address"
	case scheme == "ws" && (foreign || closed):
		return "write wss:// if that port wants TLS, and end the address with /mqtt"
	case scheme == "wss" && foreign:
		return "end the address with /mqtt"
	}
	return ""
}
