package mqttconn_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/broker/mqttconn"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// TestMain: the edge dials for years; a goroutine left behind between dials fills a small box.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type everything struct{}

func (everything) Publish(string) bool     { return true }
func (everything) Subscribe(f string) bool { return f != "forbidden" }

type anybody struct{}

func (anybody) Authenticate(_ context.Context, l broker.Login) (broker.Identity, error) {
	return broker.Identity{Name: l.Username, Access: everything{}}, nil
}

// hub runs a broker until the returned function is called, or the test ends.
func hub(t *testing.T, cfg broker.Config) (*broker.Broker, net.Addr, func()) {
	t.Helper()
	if cfg.Auth == nil {
		cfg.Auth = anybody{}
	}
	if cfg.Listeners == nil {
		cfg.Listeners = []broker.Listener{{Name: "tcp", Address: "127.0.0.1:0"}}
	}
	b, err := broker.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := b.Run(ctx); err != nil {
			t.Errorf("broker: %v", err)
		}
	}()
	stop := func() { cancel(); <-ended }
	t.Cleanup(stop)
	return b, b.Addr("tcp"), stop
}

// connect runs a connection until the test ends.
func connect(t *testing.T, cfg mqttconn.Config, serve func(context.Context, *mqttconn.Session) error, onState func(mqttconn.State)) {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- mqttconn.Run(ctx, cfg, serve, onState) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run did not end")
		}
	})
}

func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("not within %v: %s", patience, what)
		panic("unreachable")
	}
}

// An edge whose messages go astray has no link at all.
func TestPublishAndReceive(t *testing.T) {
	_, addr, _ := hub(t, broker.Config{})
	got := make(chan mqttconn.Message, 1)
	connect(t, mqttconn.Config{URL: "tcp://" + addr.String(), Username: "e1"}, func(ctx context.Context, s *mqttconn.Session) error {
		if err := s.Subscribe(ctx, "a/b", "c"); err != nil {
			t.Error(err)
		}
		if err := s.Publish(ctx, "a/b", []byte("hello")); err != nil {
			t.Error(err)
		}
		got <- <-s.Messages()
		<-ctx.Done()
		return nil
	}, nil)
	if m := receive(t, got, "message"); m.Topic != "a/b" || string(m.Payload) != "hello" {
		t.Errorf("got %q on %q", m.Payload, m.Topic)
	}
}

// An edge must be back within a second after a hiccup, under a fresh client id: the old one may still be held.
func TestReconnect(t *testing.T) {
	ids := make(chan string, 10)
	_, addr, _ := hub(t, broker.Config{Auth: seeing{ids}})
	states := make(chan mqttconn.State, 100)
	connect(t, mqttconn.Config{URL: "tcp://" + addr.String(), Username: "e1", ClientIDPrefix: "e1-"}, func(context.Context, *mqttconn.Session) error {
		return errors.New("enough of this one")
	}, func(s mqttconn.State) { states <- s })
	first, second := receive(t, ids, "first connection"), receive(t, ids, "second connection")
	if first == second || !strings.HasPrefix(first, "e1-") || len(first) < 20 {
		t.Errorf("client ids %q and %q", first, second)
	}
	if s := receive(t, states, "first state"); !s.Connected || s.Since.IsZero() {
		t.Errorf("first state %+v", s)
	}
	s := receive(t, states, "second state")
	if s.Connected || s.Err == nil || s.NextTry.Sub(s.Since) > time.Second || !s.NextTry.After(s.Since) {
		t.Errorf("after the first connection: %+v, want a try within a second", s)
	}
}

type seeing struct{ ids chan string }

func (a seeing) Authenticate(ctx context.Context, l broker.Login) (broker.Identity, error) {
	select {
	case a.ids <- l.ClientID:
	default:
	}
	return anybody{}.Authenticate(ctx, l)
}

// The pause must grow to its limit and not beyond, or a fleet tramples a hub that just came up.
func TestPauseGrows(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close() // nothing listens there
	states := make(chan mqttconn.State, 100)
	connect(t, mqttconn.Config{URL: "tcp://" + addr, RetryMin: 8 * time.Millisecond, RetryMax: 64 * time.Millisecond}, nil,
		func(s mqttconn.State) { states <- s })
	for n := range 8 {
		s := receive(t, states, "state")
		limit := min(8*time.Millisecond<<n, 64*time.Millisecond)
		if pause := s.NextTry.Sub(s.Since); pause > limit || pause < limit/2 {
			t.Errorf("pause %d is %v, want between %v and %v", n, pause, limit/2, limit)
		}
		if s.Err == nil || !strings.Contains(s.Err.Error(), "check the address") {
			t.Errorf("error does not say what to do: %v", s.Err)
		}
	}
}

type nobody struct{}

func (nobody) Authenticate(context.Context, broker.Login) (broker.Identity, error) {
	return broker.Identity{}, errors.New("unknown token")
}

// An installer with a wrong token must read that it is the token.
func TestBadCredential(t *testing.T) {
	_, addr, _ := hub(t, broker.Config{Auth: nobody{}})
	states := make(chan mqttconn.State, 100)
	connect(t, mqttconn.Config{URL: "tcp://" + addr.String(), Username: "e1", Password: func() string { return "wrong" }}, nil,
		func(s mqttconn.State) { states <- s })
	if s := receive(t, states, "state"); s.Err == nil || !strings.Contains(s.Err.Error(), "token") {
		t.Errorf("error does not say what to do: %v", s.Err)
	}
}

// A configuration that can never work must end the program with a reason, not be tried for ever.
func TestBadConfiguration(t *testing.T) {
	for _, u := range []string{"", "hub:1883", "http://hub:80", "tcp://hub", "tcp://:1883", "tcp://a b:1", "ws://"} {
		if err := mqttconn.Run(t.Context(), mqttconn.Config{URL: u}, nil, nil); err == nil {
			t.Errorf("URL %q was accepted", u)
		}
	}
	if err := mqttconn.Run(t.Context(), mqttconn.Config{URL: "tcp://hub:1", KeepAlive: 20 * time.Hour}, nil, nil); err == nil {
		t.Error("a keepalive that MQTT can't say was accepted")
	}
}

// A filter the hub refuses must be named, or nobody finds out why specs do not come.
func TestRefusedFilter(t *testing.T) {
	_, addr, _ := hub(t, broker.Config{})
	errs := make(chan error, 1)
	connect(t, mqttconn.Config{URL: "tcp://" + addr.String()}, func(ctx context.Context, s *mqttconn.Session) error {
		errs <- s.Subscribe(ctx, "fine", "forbidden")
		<-ctx.Done()
		return nil
	}, nil)
	if err := receive(t, errs, "answer"); err == nil || !strings.Contains(err.Error(), "forbidden") || strings.Contains(err.Error(), "fine") {
		t.Errorf("error %v, want one that names the refused filter", err)
	}
}

// When the hub goes, everything that waits on the connection must end, and the edge must find the hub again.
func TestHubRestart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_, _, stop := hub(t, broker.Config{Listeners: []broker.Listener{{Name: "tcp", Net: l}}})
	sessions := make(chan *mqttconn.Session, 10)
	ended := make(chan error, 10)
	connect(t, mqttconn.Config{URL: "tcp://" + addr, RetryMin: time.Millisecond, RetryMax: 50 * time.Millisecond}, func(ctx context.Context, s *mqttconn.Session) error {
		sessions <- s
		for range s.Messages() {
		}
		<-ctx.Done()
		ended <- s.Publish(ctx, "late", nil)
		return ctx.Err()
	}, nil)
	receive(t, sessions, "first session")
	stop()
	if err := receive(t, ended, "end of the first session"); err == nil {
		t.Error("a message was published on a dead connection")
	}
	hub(t, broker.Config{Listeners: []broker.Listener{{Name: "tcp", Address: addr}}})
	receive(t, sessions, "second session")
}

// A handler that is behind must hold back the hub instead of filling the memory of a small box.
func TestQueueIsBounded(t *testing.T) {
	b, addr, _ := hub(t, broker.Config{MaxQueued: 1 << 20, StallTimeout: patience * 2})
	sessions := make(chan *mqttconn.Session, 1)
	goOn := make(chan struct{})
	count := make(chan int, 1)
	const total = 400
	connect(t, mqttconn.Config{URL: "tcp://" + addr.String(), Queue: 2, KeepAlive: time.Second, StallTimeout: 100 * time.Millisecond}, func(ctx context.Context, s *mqttconn.Session) error {
		if err := s.Subscribe(ctx, "t"); err != nil {
			t.Error(err)
		}
		sessions <- s
		<-goOn
		n := 0
		for range s.Messages() {
			if n++; n == total {
				break
			}
		}
		count <- n
		<-ctx.Done()
		return nil
	}, nil)
	s := receive(t, sessions, "session")
	for range total {
		if err := b.Publish(t.Context(), "t", make([]byte, 40<<10), 0, false); err != nil {
			t.Fatal(err)
		}
	}
	// The hub can't write any more: its counters stand still while most is unsent.
	var last int64 = -1
	for still := 0; still < 20; <-time.After(10 * time.Millisecond) {
		now := b.Stats().BytesOut
		if now == last {
			still++
		} else {
			still, last = 0, now
		}
	}
	if in, _ := s.Bytes(); in > 1<<20 {
		t.Errorf("%d bytes taken in with a queue of 2 messages of 40 KiB", in)
	}
	close(goOn)
	if n := receive(t, count, "all messages"); n != total {
		t.Errorf("%d messages arrived, want %d: a slow handler lost some", n, total)
	}
}

// A link that died without a word (a cable, a NAT table) must be given up, and tried again.
func TestDeadLinkIsNoticed(t *testing.T) {
	_, addr, _ := hub(t, broker.Config{})
	p := newProxy(t, addr.String())
	states := make(chan mqttconn.State, 100)
	up := make(chan struct{}, 10)
	connect(t, mqttconn.Config{
		URL: "tcp://" + p.addr, KeepAlive: 100 * time.Millisecond, StallTimeout: 300 * time.Millisecond, RetryMin: time.Millisecond, RetryMax: 20 * time.Millisecond,
		ConnectTimeout: 300 * time.Millisecond,
	}, func(ctx context.Context, s *mqttconn.Session) error {
		up <- struct{}{}
		<-ctx.Done()
		return nil
	}, func(s mqttconn.State) { states <- s })
	receive(t, up, "connection")
	receive(t, states, "connected")
	p.freeze(true)
	s := receive(t, states, "link given up")
	if s.Connected || s.Err == nil || !strings.Contains(s.Err.Error(), "link seems dead") {
		t.Errorf("state %+v", s)
	}
	s = receive(t, states, "attempt over the dead link")
	if s.Err == nil || !strings.Contains(s.Err.Error(), "does not answer") {
		t.Errorf("state %+v", s)
	}
	p.freeze(false)
	receive(t, up, "connection again")
}

// A thin link that still moves bytes must be kept, however long a message takes: here longer than the hub waits for a client
// that says nothing, while the answer to a ping stands behind the message.
func TestThinLinkIsKept(t *testing.T) {
	b, addr, _ := hub(t, broker.Config{})
	p := newProxy(t, addr.String())
	got := make(chan int, 10)
	connect(t, mqttconn.Config{URL: "tcp://" + p.addr, KeepAlive: 50 * time.Millisecond, StallTimeout: 4 * time.Second, MaxPacket: 200 << 10}, func(ctx context.Context, s *mqttconn.Session) error {
		if err := s.Subscribe(ctx, "t"); err != nil {
			t.Error(err)
		}
		p.thin.Store(true)
		if err := b.Publish(ctx, "t", make([]byte, 150<<10), 0, false); err != nil {
			t.Error(err)
		}
		for m := range s.Messages() {
			got <- len(m.Payload)
		}
		return nil
	}, func(s mqttconn.State) {
		if !s.Connected {
			t.Errorf("link lost: %v", s.Err)
		}
	})
	if n := receive(t, got, "message over the thin link"); n != 150<<10 {
		t.Errorf("got %d bytes", n)
	}
}

// proxy is a link between edge and hub that can freeze and be thin.
type proxy struct {
	addr   string
	thin   atomic.Bool
	mu     sync.Mutex
	frozen chan struct{} // closed when it thaws; nil if it moves
	conns  []net.Conn
	end    chan struct{}
}

func newProxy(t *testing.T, hub string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: l.Addr().String(), end: make(chan struct{})}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", hub)
			if err != nil {
				a.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, a, b)
			p.mu.Unlock()
			wg.Go(func() { p.pipe(a, b) })
			wg.Go(func() { p.pipe(b, a) })
		}
	})
	t.Cleanup(func() {
		close(p.end)
		l.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		wg.Wait()
	})
	return p
}

func (p *proxy) freeze(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if on {
		p.frozen = make(chan struct{})
	} else {
		close(p.frozen)
		p.frozen = nil
	}
}

func (p *proxy) pipe(dst, src net.Conn) {
	defer dst.Close()
	buf := make([]byte, 1024)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		frozen := p.frozen
		p.mu.Unlock()
		if frozen != nil {
			select {
			case <-frozen:
			case <-p.end:
				return
			}
		}
		if p.thin.Load() {
			select {
			case <-time.After(20 * time.Millisecond): // 50 KiB/s
			case <-p.end:
				return
			}
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}

// A hostile or broken hub must not be able to crash the edge or fill its memory.
func TestHostileHub(t *testing.T) {
	connack := "\x20\x02\x00\x00"
	for _, c := range []struct{ name, says string }{
		{"256 MiB CONNACK", "\x20\xff\xff\xff\x7f"},
		{"256 MiB message", connack + "\x30\xff\xff\xff\x7f"},
		{"malformed length", connack + "\x30\xff\xff\xff\xff\x7f"},
		{"long SUBACK", connack + "\x90\x05\x00\x01\x00\x00\x00"},
		{"SUBACK without codes", connack + "\x90\x02\x00\x01"},
		{"empty SUBACK", connack + "\x90\x00"},
		{"topic beyond the packet", connack + "\x30\x03\x00\x09a"},
		{"QoS 1 message", connack + "\x32\x05\x00\x01a\x00\x01"},
		{"CONNECT", connack + "\x10\x00"},
		{"no CONNACK", "\x90\x03\x00\x01\x00"},
		{"unknown refusal", "\x20\x02\x00\x63"},
		{"end", connack},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = io.WriteString(conn, c.says)
					if c.name == "end" || strings.Contains(c.name, "SUBACK") {
						_ = conn.(*net.TCPConn).CloseWrite()
					}
					_, _ = io.Copy(io.Discard, conn)
					conn.Close()
				}
			}()
			defer func() { l.Close(); <-done }()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			states := make(chan mqttconn.State, 100)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				ended <- mqttconn.Run(ctx, mqttconn.Config{URL: "tcp://" + l.Addr().String(), RetryMin: time.Millisecond, RetryMax: time.Millisecond},
					func(ctx context.Context, s *mqttconn.Session) error {
						_ = s.Subscribe(ctx, "a")
						<-ctx.Done()
						return nil
					}, func(s mqttconn.State) {
						if !s.Connected {
							select {
							case states <- s:
							default:
							}
						}
					})
			}()
			for range 3 {
				if s := receive(t, states, "connection given up"); s.Err == nil {
					t.Error("no reason given")
				}
			}
			cancel()
			if err := receive(t, ended, "end"); err != nil {
				t.Errorf("Run: %v", err)
			}
			runtime.ReadMemStats(&after)
			if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > 32 {
				t.Errorf("%d MiB allocated", grown)
			}
		})
	}
}

// Sites whose networks pass only TLS or HTTP must reach the hub as well.
func TestSchemes(t *testing.T) {
	web := httptest.NewUnstartedServer(nil)
	b, _, _ := hub(t, broker.Config{})
	web.Config.Handler = b.WebSocket()
	web.StartTLS()
	t.Cleanup(web.Close)
	pool := x509.NewCertPool()
	pool.AddCert(web.Certificate())
	_, secure, _ := hub(t, broker.Config{Listeners: []broker.Listener{{Name: "tcp", Address: "127.0.0.1:0", TLS: &tls.Config{Certificates: web.TLS.Certificates}}}})
	plain := httptest.NewServer(b.WebSocket())
	t.Cleanup(plain.Close)
	for _, u := range []string{
		"tls://" + secure.String(),
		"wss://" + web.Listener.Addr().String() + "/mqtt",
		"ws://" + plain.Listener.Addr().String() + "/mqtt",
	} {
		t.Run(u[:4], func(t *testing.T) {
			got := make(chan mqttconn.Message, 1)
			connect(t, mqttconn.Config{URL: u, TLS: &tls.Config{RootCAs: pool}, KeepAlive: time.Second}, func(ctx context.Context, s *mqttconn.Session) error {
				if err := s.Subscribe(ctx, "t"); err != nil {
					t.Error(err)
				}
				if err := s.Publish(ctx, "t", make([]byte, 100_000)); err != nil {
					t.Error(err)
				}
				got <- <-s.Messages()
				if in, out := s.Bytes(); in < 100_000 || out < 100_000 {
					t.Errorf("counted %d bytes in and %d out", in, out)
				}
				<-ctx.Done()
				return nil
			}, nil)
			if m := receive(t, got, "message"); len(m.Payload) != 100_000 {
				t.Errorf("got %d bytes", len(m.Payload))
			}
		})
	}
	t.Run("untrusted", func(t *testing.T) {
		states := make(chan mqttconn.State, 100)
		connect(t, mqttconn.Config{URL: "tls://" + secure.String()}, nil, func(s mqttconn.State) { states <- s })
		if s := receive(t, states, "state"); s.Err == nil || !strings.Contains(s.Err.Error(), "configure its CA") {
			t.Errorf("error does not say what to do: %v", s.Err)
		}
	})
}

// Whoever writes the scheme of another door must be told which one it is: the plain errors are "EOF" and "got 400".
func TestWrongSchemesAreExplained(t *testing.T) {
	tlsWeb := httptest.NewUnstartedServer(nil)
	plain, tcp, _ := hub(t, broker.Config{})
	tlsWeb.Config.Handler = plain.WebSocket()
	tlsWeb.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	tlsWeb.Config.ReadHeaderTimeout = time.Second // CONNECT is the beginning of a line to it; it has to arrive before
	tlsWeb.StartTLS()
	t.Cleanup(tlsWeb.Close)
	pool := x509.NewCertPool()
	pool.AddCert(tlsWeb.Certificate())
	_, secure, _ := hub(t, broker.Config{Listeners: []broker.Listener{{Name: "tcp", Address: "127.0.0.1:0", TLS: &tls.Config{Certificates: tlsWeb.TLS.Certificates}}}})
	web := httptest.NewUnstartedServer(plain.WebSocket())
	web.Config.ReadHeaderTimeout = tlsWeb.Config.ReadHeaderTimeout
	web.Start()
	t.Cleanup(web.Close)
	for _, c := range []struct{ url, want string }{
		{"tcp://" + secure.String(), "write tls://"},
		{"tcp://" + web.Listener.Addr().String(), "ws://host:port/mqtt"},
		{"tls://" + tcp.String(), "write tcp://"},
		{"tls://" + tlsWeb.Listener.Addr().String(), "wss://host:port/mqtt"},
		{"ws://" + tlsWeb.Listener.Addr().String() + "/mqtt", "write wss://"},
		{"ws://" + tcp.String() + "/mqtt", "end the address with /mqtt"},
		{"wss://" + web.Listener.Addr().String() + "/mqtt", "speaks no TLS"},
	} {
		states := make(chan mqttconn.State, 100)
		connect(t, mqttconn.Config{URL: c.url, TLS: &tls.Config{RootCAs: pool}, RetryMin: time.Hour, RetryMax: time.Hour}, nil, func(s mqttconn.State) { states <- s })
		s := receive(t, states, c.url)
		if s.Err == nil || !strings.Contains(s.Err.Error(), c.want) {
			t.Errorf("%s: %v\nwant %q", c.url, s.Err, c.want)
		}
	}
}
