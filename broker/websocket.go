package broker

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"time"

	"github.com/coder/websocket"
)

// WebSocket returns the handler that serves MQTT over WebSocket (subprotocol "mqtt"), to be mounted where the owner
// wants it. It serves only while Run runs.
func (b *Broker) WebSocket() http.Handler {
	return http.HandlerFunc(b.serveWebSocket)
}

func (b *Broker) serveWebSocket(rw http.ResponseWriter, r *http.Request) {
	if !b.admit() {
		http.Error(rw, "broker is stopping or full, try again later", http.StatusServiceUnavailable)
		return
	}
	defer b.leave()
	h := &hijacker{ResponseWriter: rw, stall: b.cfg.StallTimeout, stats: &b.stats}
	// Credentials travel in CONNECT, never in cookies: a foreign origin gains nothing, so none is refused.
	ws, err := websocket.Accept(h, r, &websocket.AcceptOptions{
		Subprotocols: []string{"mqtt"}, InsecureSkipVerify: true, CompressionMode: websocket.CompressionDisabled,
	})
	if err != nil {
		b.stats.refused.Add(1)
		b.log.Info("WebSocket handshake failed", "remote", r.RemoteAddr, "error", err)
		return
	}
	defer func() { _ = ws.CloseNow() }()
	if err := h.wire.SetReadDeadline(time.Now().Add(b.cfg.HandshakeTimeout)); err != nil {
		return
	}
	if c := b.openConn("websocket", websocket.NetConn(context.Background(), ws, websocket.MessageBinary), h.wire, Login{Remote: h.wire.RemoteAddr(), TLS: r.TLS}); c != nil {
		b.serve(c)
	}
}

// hijacker puts a wire below the WebSocket.
type hijacker struct {
	http.ResponseWriter
	stall time.Duration
	stats *counters
	wire  *wire
}

// Hijack takes the connection over from the HTTP server.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	h.wire = newWire(c, h.stall, h.stats)
	return h.wire, bufio.NewReadWriter(rw.Reader, bufio.NewWriter(h.wire)), nil
}
