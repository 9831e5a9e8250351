package infer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
)

// tandem is a front door before a worker that a test plays.
type tandem struct {
	*testing.T
	relay       *relay
	front       *httptest.Server
	client      *http.Client
	connections atomic.Int64 // that the worker accepted
}

// countedListener counts connections.
type countedListener struct {
	net.Listener
	n *atomic.Int64
}

func (l countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

// startTandem serves POST and GET / through a relay; play gets the worker's listener, and must return when that is closed.
func startTandem(t *testing.T, play func(net.Listener)) *tandem {
	t.Helper()
	d := &tandem{T: t}
	socket := filepath.Join(t.TempDir(), "w.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	played := make(chan struct{})
	go func() {
		defer close(played)
		play(countedListener{l, &d.connections})
	}()
	w := &worker{unit: unit{name: "adder"}, socket: socket, count: &counters{}, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	d.relay = newRelay(w, &bufferPool{})
	d.front = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.relay.serve(w, r, "/infer") }))
	d.client = d.front.Client()
	t.Cleanup(func() {
		d.front.Close()
		d.relay.end()
		_ = l.Close()
		<-played
	})
	return d
}

// startHTTP is startTandem with a worker that is an HTTP server.
func startHTTP(t *testing.T, h http.HandlerFunc) *tandem {
	t.Helper()
	return startTandem(t, func(l net.Listener) {
		s := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
		defer s.Close()
		_ = s.Serve(l) // until the listener is closed
	})
}

// eachConnection plays a worker whose connections are handled one by one.
func eachConnection(handle func(net.Conn)) func(net.Listener) {
	return func(l net.Listener) {
		var wg sync.WaitGroup
		defer wg.Wait()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	}
}

// post a body; it returns the status, the answer and an error of either.
func (d *tandem) post(ctx context.Context, body io.Reader) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.front.URL, body)
	if err != nil {
		return 0, "", err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func (d *tandem) wants(body io.Reader, code int, text string) {
	d.Helper()
	got, answer, err := d.post(d.Context(), body)
	if err != nil || got != code || !strings.Contains(answer, text) {
		d.Fatalf("%d %.300s %v, want %d %s", got, answer, err, code, text)
	}
}

// wait for a signal.
func wait[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(deadline):
		t.Fatalf("waited in vain: %s", what)
		panic("unreachable")
	}
}

// onlyReader hides the length of a body, so that it is sent in chunks.
type onlyReader struct{ io.Reader }

// If this fails, requests are cut, mixed up or refused for their size or their encoding, or each opens a connection.
func TestRelayPassesBodiesOn(t *testing.T) {
	t.Parallel()
	var paths sync.Map
	d := startHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		paths.Store(r.RequestURI, true)
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("the worker reads: %v", err)
		}
		if r.Header.Get("Long-Answer") == "" {
			sum := sha256.Sum256(b)
			fmt.Fprintf(w, "%d %s", len(b), hex.EncodeToString(sum[:]))
			return
		}
		_, _ = w.Write(b)
	})
	for _, n := range []int{0, 1, 1000, 4096, relayBuffer - 200, relayBuffer, relayBuffer + 1, 5 << 20} {
		body := bytes.Repeat([]byte("0123456789abcdef!"), n/17+1)[:n]
		sum := sha256.Sum256(body)
		want := fmt.Sprintf("%d %s", n, hex.EncodeToString(sum[:]))
		d.wants(bytes.NewReader(body), 200, want)
		d.wants(onlyReader{bytes.NewReader(body)}, 200, want)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, d.front.URL, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Long-Answer", "1")
		req.Header.Set("Expect", "100-continue")
		resp, err := d.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || !bytes.Equal(answer, body) {
			t.Errorf("%d bytes came back as %d: %v", n, len(answer), err)
		}
	}
	if n := d.connections.Load(); n != 1 {
		t.Errorf("%d connections for requests one after another", n)
	}
	paths.Range(func(k, _ any) bool {
		if k != "/v2/models/adder/infer" {
			t.Errorf("the worker was asked for %v", k)
		}
		return true
	})
	if n := d.relay.count.inferences.Load(); n != 24 || d.relay.count.errors.Load() != 0 {
		t.Errorf("%d inferences counted", n)
	}
}

// If this fails, binary tensors lose the header that tells where they begin, a client's connection headers reach the worker,
// or HEAD leaves the connection out of step.
func TestRelayHeaders(t *testing.T) {
	t.Parallel()
	seen := make(chan http.Header, 1)
	d := startHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header
		w.Header().Set(oip.HeaderLength, "17")
		w.Header().Set("Connection", "X-Own")
		w.Header().Set("X-Own", "1")
		w.Header().Add("X-Kept", "a")
		w.Header().Add("X-Kept", "b")
		_, _ = io.WriteString(w, "body")
	})
	for _, method := range []string{http.MethodPost, http.MethodHead, http.MethodGet} {
		req, err := http.NewRequestWithContext(t.Context(), method, d.front.URL, strings.NewReader("12345"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(oip.HeaderLength, "4")
		req.Header.Set("Connection", "x-hop, keep-alive")
		req.Header.Set("X-Hop", "1")
		req.Header.Set("Proxy-Authorization", "secret")
		req.Header.Set("Te", "trailers")
		req.Header.Set("Traceparent", "00-1")
		req.Header.Set("Accept-Encoding", "identity")
		resp, err := d.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if want := map[bool]string{true: "", false: "body"}[method == http.MethodHead]; err != nil || string(body) != want || resp.ContentLength != 4 {
			t.Errorf("%s: %q of %d bytes, %v", method, body, resp.ContentLength, err)
		}
		if resp.Header.Get(oip.HeaderLength) != "17" || resp.Header.Get("X-Own") != "" || len(resp.Header["X-Kept"]) != 2 {
			t.Errorf("%s: the client got %v", method, resp.Header)
		}
		h := <-seen
		got := slices.Sorted(maps.Keys(h))
		want := []string{"Accept-Encoding", oip.HeaderLength, "Traceparent", "User-Agent"}
		if method == http.MethodPost {
			want = append(want, "Content-Length")
		}
		slices.Sort(want)
		if !slices.Equal(got, want) || h.Get(oip.HeaderLength) != "4" {
			t.Errorf("%s: the worker got %v", method, h)
		}
	}
	if n := d.connections.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// answerOne reads one request of a test and answers it.
func answerOne(t *testing.T, c net.Conn) bool {
	buf := make([]byte, 64<<10)
	if _, err := c.Read(buf); err != nil {
		return false
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
		t.Errorf("answer: %v", err)
	}
	return true
}

// If this fails, a connection that the worker closed, or on which it said something unasked, costs a client its request, or gives
// it the answer to none.
func TestRelayLeavesStaleConnections(t *testing.T) {
	t.Parallel()
	closed := make(chan struct{}, 10)
	d := startTandem(t, eachConnection(func(c net.Conn) {
		answerOne(t, c)
		_ = c.Close()
		closed <- struct{}{}
	}))
	for range 3 {
		d.wants(strings.NewReader("{}"), 200, "ok")
		wait(t, "the worker closed", closed)
		d.wants(strings.NewReader(strings.Repeat("x", 1<<20)), 200, "ok")
		wait(t, "the worker closed", closed)
	}

	d = startTandem(t, eachConnection(func(c net.Conn) {
		answerOne(t, c)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
		closed <- struct{}{}
		_, _ = io.Copy(io.Discard, c)
	}))
	for range 3 {
		d.wants(strings.NewReader("{}"), 200, "ok")
		wait(t, "the worker said more", closed)
	}
	if n := d.connections.Load(); n != 3 {
		t.Errorf("%d connections", n)
	}
}

// If this fails, a request that ends its worker is sent again and ends the next one, or its client waits for ever.
func TestRelayAsksOnce(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	d := startTandem(t, eachConnection(func(c net.Conn) {
		if !answerOne(t, c) || asked.Add(1)%2 == 0 {
			return
		}
		if _, err := c.Read(make([]byte, 1000)); err == nil {
			asked.Add(1) // and there is no answer
		}
	}))
	for range 2 {
		d.wants(strings.NewReader("{}"), 200, "ok")
		d.wants(strings.NewReader("{}"), 503, "worker of this model failed during the request")
	}
	if n := asked.Load(); n != 4 {
		t.Errorf("the worker was asked %d times, want 4", n)
	}
	if n := d.relay.count.errors.Load(); n != 2 {
		t.Errorf("%d errors counted", n)
	}
}

// If this fails, a client takes half an answer for a whole one, or a worker fills the agent's memory with headers.
func TestRelayBadAnswers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, answer string
		code         int // 0 is a broken answer
	}{
		{"half a body", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", 0},
		{"half in chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", 0},
		{"half a head", "HTTP/1.1 200 OK\r\nContent-Le", 503},
		{"no HTTP", "hello\r\n\r\n", 503},
		{"a long head", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxAnswerHead), 503},
		{"another protocol", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 503},
		{"hints, then a body to the end", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.0 200 OK\r\n\r\nok", 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := startTandem(t, eachConnection(func(conn net.Conn) {
				buf := make([]byte, 1000)
				_, _ = conn.Read(buf)
				_, _ = io.WriteString(conn, c.answer) // not all of it is read
			}))
			code, answer, err := d.post(t.Context(), strings.NewReader("{}"))
			if c.code == 0 && err == nil {
				t.Errorf("half an answer looks whole: %d %q", code, answer)
			}
			if c.code != 0 && (err != nil || code != c.code) {
				t.Errorf("%d %q %v, want %d", code, answer, err, c.code)
			}
		})
	}
}

// If this fails, a request that the worker refuses unread hangs, or what is left of it becomes the next client's.
func TestRelayEarlyRefusal(t *testing.T) {
	t.Parallel()
	d := startHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 1<<20 {
			writeError(w, http.StatusRequestEntityTooLarge, "too large")
			return
		}
		_, _ = io.Copy(w, r.Body)
	})
	for range 2 {
		code, answer, err := d.post(t.Context(), bytes.NewReader(make([]byte, 8<<20)))
		// The client may be cut off while it still sends.
		if err == nil && code != http.StatusRequestEntityTooLarge {
			t.Errorf("%d %q", code, answer)
		}
		d.wants(strings.NewReader("small"), 200, "small")
	}
}

// If this fails, a worker computes on for clients that are gone, or the next client gets the answer that was theirs.
func TestRelayClientGoesAway(t *testing.T) {
	t.Parallel()
	arrived, ended := make(chan struct{}, 10), make(chan struct{}, 10)
	d := startHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if string(b) == "quick" {
			_, _ = io.WriteString(w, "quick answer")
			return
		}
		if err == nil { // else the client went away before the body was whole
			arrived <- struct{}{}
			<-r.Context().Done()
		}
		ended <- struct{}{}
	})
	d.wants(strings.NewReader("quick"), 200, "quick answer")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, _, err := d.post(ctx, strings.NewReader("slow"))
		done <- err
	}()
	wait(t, "the request arrived", arrived)
	cancel()
	if err := wait(t, "the client left", done); !errors.Is(err, context.Canceled) {
		t.Errorf("the client: %v", err)
	}
	wait(t, "the worker knows", ended)
	d.wants(strings.NewReader("quick"), 200, "quick answer")
	// In the middle of a large body.
	ctx, cancel = context.WithCancel(t.Context())
	body, feed := io.Pipe()
	go func() {
		_, _, err := d.post(ctx, body)
		done <- err
	}()
	if _, err := feed.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = feed.CloseWithError(io.ErrClosedPipe)
	wait(t, "the client left", done)
	wait(t, "the worker knows", ended)
	for range 3 {
		d.wants(strings.NewReader("quick"), 200, "quick answer")
	}
}

// If this fails, clients that send their request too slowly keep all others from a model.
func TestRelaySlowUpload(t *testing.T) {
	t.Parallel()
	d := startHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	d.relay.upload = 100 * time.Millisecond
	for _, length := range []int{100, 1 << 20} {
		conn, err := net.Dial("tcp", d.front.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: door\r\nContent-Length: %d\r\n\r\nsome", length)
		_ = conn.SetReadDeadline(time.Now().Add(deadline))
		answer, err := io.ReadAll(conn)
		_ = conn.Close()
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 408 ") {
			t.Errorf("%d bytes: %q %v", length, answer, err)
		}
	}
	// The deadline is not left behind on a connection.
	d.relay.upload = deadline
	d.wants(strings.NewReader("all"), 200, "all")
}

// If this fails, many clients at once open connections without end, or some of them wait for ever.
func TestRelayIsBounded(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	arrived := make(chan struct{}, 100)
	var now, most atomic.Int64
	d := startHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		arrived <- struct{}{}
		<-goOn
		_, _ = io.WriteString(w, "ok")
	})
	const clients = 3 * doorConnections
	results := make(chan error, clients+1)
	ask := func(ctx context.Context) {
		code, _, err := d.post(ctx, strings.NewReader("{}"))
		if err == nil && code != 200 {
			err = fmt.Errorf("status %d", code)
		}
		results <- err
	}
	for range doorConnections {
		go ask(t.Context())
	}
	for range doorConnections {
		wait(t, "requests are under way", arrived)
	}
	// One that waits and goes away.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	go ask(ctx)
	if err := wait(t, "the client left", results); !errors.Is(err, context.Canceled) {
		t.Errorf("the client: %v", err)
	}
	for range clients - doorConnections {
		go ask(t.Context())
	}
	close(goOn)
	for range clients {
		if err := wait(t, "all are answered", results); err != nil {
			t.Error(err)
		}
	}
	if most.Load() != doorConnections || d.connections.Load() > doorConnections {
		t.Errorf("%d requests at once over %d connections, want at most %d", most.Load(), d.connections.Load(), doorConnections)
	}
}

// If this fails, requests of HTTP clients break while a new version of a model takes over, or are answered by a mixture.
func TestRelayUpdateUnderLoad(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	e := startEdge(t, t.TempDir(), h, nil, nil)
	e.m.SetDesired(specs(h.model("adder", "1", fault{})))
	e.serves("adder", "1")
	front := httptest.NewServer(e.m.Handler())
	defer front.Close()
	// The second does not fit the buffer.
	values := strings.TrimSuffix(strings.Repeat("1,", 50_000), ",")
	bodies := []struct{ text, sum string }{
		{inferBody, `"data":[7]`},
		{`{"inputs":[{"name":"x","datatype":"FP32","shape":[50000],"data":[` + values + `]}]}`, `"data":[50000]`},
	}
	e.updateUnderLoad(h, 2, 4, func(n int) error {
		body := bodies[n%len(bodies)]
		resp, err := front.Client().Post(front.URL+"/v2/models/adder/infer", "application/json", strings.NewReader(body.text))
		if err != nil {
			return err
		}
		answer, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK || !strings.Contains(string(answer), body.sum) {
			return fmt.Errorf("%s %.200s", resp.Status, answer)
		}
		return nil
	})
}
