package mqttconn

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/eclipse/paho.mqtt.golang/packets"
)

// writeChunk is how many bytes one write deadline covers at most.
const writeChunk = 16 << 10

// meter is the TCP connection: it counts bytes, remembers when the last one came, and gives up a write only when the
// peer took no byte for the stall timeout.
type meter struct {
	net.Conn
	stall   time.Duration
	in, out atomic.Uint64
	lastIn  atomic.Int64 // Unix nanoseconds
}

// Read counts.
func (m *meter) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	if n > 0 {
		m.in.Add(uint64(n))
		m.lastIn.Store(time.Now().UnixNano())
	}
	return n, err
}

// Write fails when the peer took no byte for the stall timeout.
func (m *meter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		if err := m.SetWriteDeadline(time.Now().Add(m.stall)); err != nil {
			return done, err
		}
		n, err := m.Conn.Write(p[done:min(len(p), done+writeChunk)])
		done += n
		m.out.Add(uint64(n))
		if err == nil || n > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("hub took no byte for %v: %w", m.stall, err)
		}
		return done, err
	}
	return done, nil
}

// transport carries MQTT bytes.
type transport struct {
	io.Writer
	reader *bufio.Reader
	meter  *meter
	ws     *websocket.Conn // nil without
	done   chan struct{}   // closed by close
	once   sync.Once
}

func newTransport(c net.Conn, m *meter) *transport {
	return &transport{Writer: c, reader: bufio.NewReaderSize(c, 8<<10), meter: m, done: make(chan struct{})}
}

// close ends the connection at once.
func (t *transport) close() {
	t.once.Do(func() {
		close(t.done)
		_ = t.meter.Close()
		if t.ws != nil {
			_ = t.ws.CloseNow() // ends its goroutine
		}
	})
}

// dial opens a connection as the URL's scheme says. It fails when ctx ends; a connection once open outlives ctx.
func dial(ctx context.Context, u *url.URL, cfg *tls.Config, stall time.Duration) (*transport, error) {
	if u.Scheme == "ws" || u.Scheme == "wss" {
		return dialWebSocket(ctx, u, cfg, stall)
	}
	m, err := dialTCP(ctx, u.Host, stall)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "tcp" {
		return newTransport(m, m), nil
	}
	c := &tls.Config{}
	if cfg != nil {
		c = cfg.Clone()
	}
	if c.ServerName == "" {
		c.ServerName = u.Hostname()
	}
	t := tls.Client(m, c)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = m.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return newTransport(t, m), nil
}

func dialTCP(ctx context.Context, addr string, stall time.Duration) (*meter, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	tune(c, stall)
	return &meter{Conn: c, stall: stall}, nil
}

func dialWebSocket(ctx context.Context, u *url.URL, cfg *tls.Config, stall time.Duration) (*transport, error) {
	var m *meter
	ht := &http.Transport{
		TLSClientConfig:   cfg,
		DisableKeepAlives: true,
		Proxy:             http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, _, addr string) (_ net.Conn, err error) {
			m, err = dialTCP(ctx, addr, stall)
			if err != nil {
				return nil, err
			}
			return m, nil
		},
	}
	ws, answer, err := websocket.Dial( //nolint:bodyclose // the library closes it: "You never need to close resp.Body yourself"
		ctx, u.String(), &websocket.DialOptions{
			HTTPClient: &http.Client{Transport: ht}, Subprotocols: []string{"mqtt"}, CompressionMode: websocket.CompressionDisabled,
		})
	if err != nil && answer != nil {
		return nil, fmt.Errorf("%w: %w", errNotMQTT, err)
	}
	if err != nil {
		return nil, err
	}
	t := newTransport(websocket.NetConn(context.Background(), ws, websocket.MessageBinary), m)
	t.ws = ws
	return t, nil
}

// readPacket reads one packet of at most limit bytes.
func readPacket(r *bufio.Reader, limit int) (packets.ControlPacket, error) {
	head, length := make([]byte, 0, 5), 0
	for shift := 0; ; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return nil, err
		}
		if head = append(head, b); len(head) == 1 {
			shift = -7
			continue
		}
		length |= int(b&0x7f) << shift
		if length > limit {
			return nil, fmt.Errorf("packet of %d bytes or more, limit %d", length, limit)
		}
		if b&0x80 == 0 {
			break
		}
		if len(head) == 5 {
			return nil, errors.New("malformed packet length")
		}
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, err
	}
	return packets.ReadPacket(io.MultiReader(bytes.NewReader(head), bytes.NewReader(body)))
}
