package infer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"
)

const (
	// doorConnections bounds requests of the front door under way in one worker; others wait. The worker takes 16, and
	// bindings send one at a time.
	doorConnections = 15
	// keepAlive of idle connections, shorter than the worker's.
	keepAlive = 30 * time.Second
	// uploadTimeout bounds how long a client may take to send the body of its request, which meanwhile holds one of the
	// connections. It is the worker's too.
	uploadTimeout = time.Minute
)

// relay passes requests of the front door on to one worker, over connections that it keeps. It works in the goroutine of each
// request: the hand-offs between goroutines in http.Transport take longer than a small model. Safe for concurrent use.
//
// No request is sent twice: if the worker fails it is answered 503, and the client may try again. Trailers are not passed on.
type relay struct {
	socket  string
	path    string // of the model at the worker, escaped
	log     *slog.Logger
	count   *counters
	buffers *bufferPool
	upload  time.Duration // uploadTimeout
	slots   chan struct{} // holds one for each request under way

	mu    sync.Mutex // guards the fields below
	idle  []*link    // in the order in which they became idle
	ended bool
}

func newRelay(w *worker, buffers *bufferPool) *relay {
	return &relay{
		socket: w.socket, path: (&url.URL{Path: "/v2/models/" + w.unit.name}).EscapedPath(), log: w.log, count: w.count,
		buffers: buffers, upload: uploadTimeout, slots: make(chan struct{}, doorConnections),
	}
}

// serve answers a request with what the worker says to it, at the path of its model with a suffix. It panics with
// http.ErrAbortHandler if an answer breaks off, as is net/http's way to tell the client.
func (l *relay) serve(w http.ResponseWriter, r *http.Request, suffix string) {
	ctx := r.Context()
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	case <-ctx.Done():
		l.refuse(w, r, ctx.Err())
		return
	}
	buf := l.buffers.get()
	defer l.buffers.put(buf)
	q, err := compose(w, r, l.path+suffix, l.upload, buf[:])
	if err != nil {
		l.refuse(w, r, err)
		return
	}
	c, err := l.take()
	if err != nil {
		l.refuse(w, r, err)
		return
	}
	// The worker learns from the end of the connection that the client is gone.
	stop := context.AfterFunc(ctx, c.close)
	useful := false
	defer func() { l.giveBack(c, stop() && useful) }()
	resp, err := c.ask(q, buf[:]) //nolint:bodyclose // its body is read from the link, which giveBack keeps or closes
	if err != nil {
		l.refuse(w, r, err)
		return
	}
	if r.Method == http.MethodPost {
		l.count.answered(resp.StatusCode)
	}
	if err := passOn(w, resp, buf[:]); err != nil {
		if ctx.Err() == nil {
			l.log.Warn("answer of the worker broke off", "error", err)
		}
		panic(http.ErrAbortHandler)
	}
	useful = !resp.Close
}

// refuse answers a request that the worker did not answer.
func (l *relay) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if r.Method == http.MethodPost {
		l.count.errors.Add(1)
	}
	_, clients := errors.AsType[*clientError](err)
	switch {
	// Past its deadline a connection ends the request's context as if the client were gone.
	case clients && errors.Is(err, os.ErrDeadlineExceeded):
		writeError(w, http.StatusRequestTimeout, fmt.Sprintf("the request did not arrive within %v", l.upload))
	case r.Context().Err() != nil: // the client is gone
	case clients:
		writeError(w, http.StatusBadRequest, err.Error())
	default:
		l.log.Warn("worker did not answer", "error", err)
		w.Header().Set("Retry-After", "1")
		writeError(w, http.StatusServiceUnavailable, "the worker of this model failed during the request: "+err.Error())
	}
}

// take returns a connection that is open, the one used last, or a new one.
func (l *relay) take() (*link, error) {
	for c := l.takeIdle(); c != nil; c = l.takeIdle() {
		if time.Since(c.since) < keepAlive && c.open() {
			return c, nil
		}
		c.close()
	}
	return dialLink(l.socket)
}

func (l *relay) takeIdle() *link {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := len(l.idle) - 1
	if last < 0 {
		return nil
	}
	c := l.idle[last]
	l.idle = l.idle[:last]
	return c
}

// giveBack keeps a connection for the next request if it is of use, or else closes it.
func (l *relay) giveBack(c *link, useful bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !useful || !c.clean() || l.ended {
		c.close()
		return
	}
	c.since = time.Now()
	l.idle = append(l.idle, c)
}

// end closes all connections, those in use when they are given back.
func (l *relay) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	for _, c := range l.idle {
		c.close()
	}
	l.idle = nil
}

// relayBuffer holds a whole request of ordinary size.
const relayBuffer = 64 << 10

// bufferPool is shared by all relays.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) get() *[relayBuffer]byte {
	if b, ok := p.pool.Get().(*[relayBuffer]byte); ok {
		return b
	}
	return new([relayBuffer]byte)
}

func (p *bufferPool) put(b *[relayBuffer]byte) { p.pool.Put(b) }

// passOn writes an answer, piece by piece as it comes where its length is not known.
func passOn(w http.ResponseWriter, resp *http.Response, buf []byte) error {
	drop := connectionHeaders(resp.Header, answerDrops)
	for k, v := range resp.Header {
		if !drop[k] {
			w.Header()[k] = v
		}
	}
	w.WriteHeader(resp.StatusCode)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return fmt.Errorf("write the answer: %w", err)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the answer: %w", err)
		}
		if resp.ContentLength < 0 {
			_ = http.NewResponseController(w).Flush() // the next Write tells
		}
	}
}
