package infer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxAnswerHead bounds the head of a worker's answer, in bytes.
const maxAnswerHead = 1 << 20

// link is a connection to a worker, used by one request at a time.
type link struct {
	conn    *net.UnixConn
	r       *bufio.Reader // reads the link
	limit   int64         // bytes that may still be read
	spoiled bool          // the worker did not take all of a request
	since   time.Time     // when it became idle
}

// dialLink connects to a worker's socket.
func dialLink(socket string) (*link, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	c := &link{conn: conn}
	c.r = bufio.NewReader(c)
	return c, nil
}

// close may be called several times, and while the link is in use.
func (c *link) close() { _ = c.conn.Close() }

// clean reports whether nothing of the last request is left.
func (c *link) clean() bool { return !c.spoiled && c.r.Buffered() == 0 }

// open reports whether the other end is open, and silent as it should be between requests.
func (c *link) open() bool {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return false
	}
	silent := false
	err = raw.Control(func(fd uintptr) {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		silent = errors.Is(err, unix.EAGAIN)
	})
	return err == nil && silent
}

// Read implements io.Reader for r.
func (c *link) Read(p []byte) (int, error) {
	if c.limit <= 0 {
		return 0, fmt.Errorf("the head is larger than %d bytes", maxAnswerHead)
	}
	n, err := c.conn.Read(p[:min(int64(len(p)), c.limit)])
	c.limit -= int64(n)
	return n, err
}

// ask sends a request and reads the head of the answer. The answer's body comes from the link.
func (c *link) ask(q *question, buf []byte) (*http.Response, error) {
	c.limit = maxAnswerHead
	sendErr := q.send(c.conn, buf)
	if _, clients := errors.AsType[*clientError](sendErr); clients {
		return nil, sendErr
	}
	// A worker may answer without reading everything, for example that the request is too large.
	c.spoiled = sendErr != nil
	resp, err := c.head(q.method)
	if err != nil && sendErr != nil {
		return nil, fmt.Errorf("send the request: %w", sendErr)
	}
	c.limit = math.MaxInt64
	return resp, err
}

// head reads the head of the final answer.
func (c *link) head(method string) (*http.Response, error) {
	for {
		resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
		if err != nil {
			return nil, fmt.Errorf("read the answer: %w", err)
		}
		if resp.StatusCode >= http.StatusOK {
			return resp, nil
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			return nil, errors.New("the worker answered in another protocol")
		}
	}
}

// question is a request as the worker gets it.
type question struct {
	method   string
	start    []byte    // the head, and the body where it fits
	rest     io.Reader // of the body; nil if nothing is left
	length   int64     // of the body in bytes; -1 is unknown
	received func()    // called when all of the body was read
}

// compose makes the request to a worker from one of a client, in buf. It reads the body if that fits. The client must send all
// of the body within upload.
func compose(w http.ResponseWriter, r *http.Request, path string, upload time.Duration, buf []byte) (*question, error) {
	b := bytes.NewBuffer(buf[:0])
	fmt.Fprintf(b, "%s %s HTTP/1.1\r\nHost: worker\r\n", r.Method, path)
	_ = r.Header.WriteSubset(b, connectionHeaders(r.Header, questionDrops)) // a buffer takes everything
	q := &question{method: r.Method}
	switch {
	case r.Method != http.MethodPost: // metadata: a body would mean nothing
		b.WriteString("\r\n")
		q.start = b.Bytes()
		return q, nil
	case r.ContentLength < 0:
		b.WriteString("Transfer-Encoding: chunked\r\n\r\n")
	default:
		fmt.Fprintf(b, "Content-Length: %d\r\n\r\n", r.ContentLength)
	}
	control := http.NewResponseController(w)
	// Not all writers have deadlines: those of tests.
	_ = control.SetReadDeadline(time.Now().Add(upload))
	q.received = func() { _ = control.SetReadDeadline(time.Time{}) }
	q.rest, q.length = clientBody{r.Body}, r.ContentLength
	if q.length >= 0 && q.length <= int64(b.Available()) {
		body := b.AvailableBuffer()[:q.length]
		if _, err := io.ReadFull(q.rest, body); err != nil {
			return nil, asClientError(err)
		}
		b.Write(body)
		q.received()
		q.rest = nil
	}
	q.start = b.Bytes()
	return q, nil
}

// send writes the request; its start may be in buf. What could not be read is a clientError.
func (q *question) send(w io.Writer, buf []byte) error {
	if _, err := w.Write(q.start); err != nil || q.rest == nil {
		return err
	}
	if q.length >= 0 {
		n, err := io.CopyBuffer(w, io.LimitReader(q.rest, q.length), buf)
		if err != nil {
			return err
		}
		if n < q.length {
			return asClientError(io.ErrUnexpectedEOF)
		}
		q.received()
		return nil
	}
	if _, err := io.CopyBuffer(httputil.NewChunkedWriter(w), q.rest, buf); err != nil {
		return err
	}
	q.received()
	_, err := io.WriteString(w, "0\r\n\r\n")
	return err
}

// clientError says that a client did not send its request to the end.
type clientError struct{ err error }

func (e *clientError) Error() string { return "read the request: " + e.err.Error() }
func (e *clientError) Unwrap() error { return e.err }

func asClientError(err error) error {
	if _, ok := errors.AsType[*clientError](err); ok {
		return err
	}
	return &clientError{err}
}

// clientBody tells errors of the client from those of the worker.
type clientBody struct{ io.Reader }

func (b clientBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = asClientError(err)
	}
	return n, err
}

// Headers that belong to one connection (RFC 9110, 7.6.1), and of a request those that are written anew.
var (
	answerDrops = map[string]bool{
		"Connection": true, "Keep-Alive": true, "Proxy-Authenticate": true, "Proxy-Authorization": true, "Proxy-Connection": true,
		"Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true,
	}
	questionDrops = func() map[string]bool {
		m := maps.Clone(answerDrops)
		m["Content-Length"], m["Expect"], m["Host"] = true, true, true
		return m
	}()
)

// connectionHeaders adds to drops what the Connection header names.
func connectionHeaders(h http.Header, drops map[string]bool) map[string]bool {
	named := h["Connection"]
	if len(named) == 0 {
		return drops
	}
	drops = maps.Clone(drops)
	for _, list := range named {
		for name := range strings.SplitSeq(list, ",") {
			drops[textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name))] = true
		}
	}
	return drops
}
