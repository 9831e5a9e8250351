package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/longshore-edge/longshore/broker"
)

// certificate makes a self-signed one for 127.0.0.1 and a pool that trusts it.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// echo checks that a client gets its own messages of all sizes back.
func echo(t *testing.T, c *client) {
	t.Helper()
	c.subscribe(1, "t")
	for n, size := range []int{0, 1, 5000, 200_000} {
		c.publish("t", strings.Repeat("x", size), 1, uint16(n+1))
		if pk := c.next(packets.Publish); len(pk.Payload) != size {
			t.Errorf("sent %d bytes, got %d", size, len(pk.Payload))
		}
	}
}

// loginNote hands on what Authenticate saw.
type loginNote struct {
	door
	seen chan broker.Login
}

func (l loginNote) Authenticate(ctx context.Context, login broker.Login) (broker.Identity, error) {
	l.seen <- login
	return l.door.Authenticate(ctx, login)
}

// Tokens must not cross a network in the clear: MQTT over TLS has to work, and the authenticator has to know.
func TestTLS(t *testing.T) {
	cert, pool := certificate(t)
	auth := loginNote{seen: make(chan broker.Login, 1)}
	_, addr := serve(t, broker.Config{Auth: auth, Listeners: []broker.Listener{
		{Name: "tls", Address: "127.0.0.1:0", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}},
	}})
	conn, err := tls.Dial("tcp", addr.String(), &tls.Config{RootCAs: pool})
	if err != nil {
		t.Fatal(err)
	}
	c, err := start(t, conn, options{id: "c", user: "u"})
	if err != nil {
		t.Fatal(err)
	}
	if l := <-auth.seen; l.TLS == nil || l.ClientID != "c" || l.Username != "u" || string(l.Password) != "secret" || l.Remote == nil {
		t.Errorf("authenticator saw %+v", l)
	}
	echo(t, c)
}

// Sites whose firewalls pass only HTTP reach the hub by WebSocket, in the clear or with TLS.
func TestWebSocket(t *testing.T) {
	for _, secure := range []bool{false, true} {
		b, _ := serve(t, broker.Config{})
		mux := http.NewServeMux()
		mux.Handle("/mqtt", b.WebSocket())
		web := httptest.NewUnstartedServer(mux)
		if secure {
			web.StartTLS()
		} else {
			web.Start()
		}
		t.Cleanup(web.Close)
		ws, _, err := websocket.Dial(t.Context(), web.URL+"/mqtt", &websocket.DialOptions{
			HTTPClient: web.Client(), Subprotocols: []string{"mqtt"},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ws.CloseNow() })
		if ws.Subprotocol() != "mqtt" {
			t.Errorf("subprotocol %q", ws.Subprotocol())
		}
		c, err := start(t, websocket.NetConn(context.Background(), ws, websocket.MessageBinary), options{id: "c", keepalive: 30})
		if err != nil {
			t.Fatal(err)
		}
		echo(t, c)
		c.disconnect()
		eventually(t, "no connection left", func() bool { return b.Stats().Connections == 0 })
	}
}

// A request that comes while the hub stops must get an answer, not hang.
func TestWebSocketOutsideRun(t *testing.T) {
	b, err := broker.New(broker.Config{Auth: door{}})
	if err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	b.WebSocket().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/mqtt", nil))
	if rec.Code != http.StatusServiceUnavailable {
		t.Errorf("status %d", rec.Code)
	}
}
