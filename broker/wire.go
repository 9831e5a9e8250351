package broker

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// writeChunk is how many bytes one write deadline covers at most.
const writeChunk = 16 << 10

// wire is the innermost connection, below TLS and WebSocket. Its read deadline moves with every read, its write
// deadline with every byte the peer takes, so a slow link lives and a stalled one ends.
type wire struct {
	net.Conn
	socket    net.Conn // what Close closes: below a TLS of the HTTP server's, which would wait for the peer
	stall     time.Duration
	readLimit atomic.Int64 // time.Duration between bytes; 0: the deadline that was set stands
	received  atomic.Uint64
	stats     *counters
}

func newWire(c net.Conn, stall time.Duration, stats *counters) *wire {
	w := &wire{Conn: c, socket: c, stall: stall, stats: stats}
	if t, ok := c.(*tls.Conn); ok {
		w.socket = t.NetConn()
	}
	limitUnsent(w.socket)
	return w
}

// Close ends the connection at once.
func (w *wire) Close() error { return w.socket.Close() }

// Read fails when nothing arrived for the read limit.
func (w *wire) Read(p []byte) (int, error) {
	if d := time.Duration(w.readLimit.Load()); d > 0 {
		if err := w.Conn.SetReadDeadline(time.Now().Add(d)); err != nil {
			return 0, err
		}
	}
	n, err := w.Conn.Read(p)
	w.received.Add(uint64(n))
	w.stats.bytesIn.Add(int64(n))
	return n, err
}

// Write fails when the peer took no byte for the stall timeout; the connection is then closed, because a partly
// written packet can't be taken back.
func (w *wire) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		if err := w.Conn.SetWriteDeadline(time.Now().Add(w.stall)); err != nil {
			return done, err
		}
		n, err := w.Conn.Write(p[done:min(len(p), done+writeChunk)])
		done += n
		w.stats.bytesOut.Add(int64(n))
		if err == nil || n > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			w.stats.stalled.Add(1)
			err = fmt.Errorf("peer took no byte for %v: %w", w.stall, err)
		}
		_ = w.Close()
		return done, err
	}
	return done, nil
}

// link is what mochi holds as the client's connection. Deadlines set by mochi are ignored: those of the wire count.
type link struct {
	net.Conn        // carries MQTT bytes; on top of wire
	wire     *wire  //
	head     []byte // bytes of the CONNECT packet read ahead
	conn     *Conn
	once     sync.Once
	done     chan struct{}
}

// Read returns the bytes read ahead first.
func (l *link) Read(p []byte) (int, error) {
	if len(l.head) > 0 {
		n := copy(p, l.head)
		l.head = l.head[n:]
		return n, nil
	}
	return l.Conn.Read(p)
}

// Write closes the connection on any error: what follows a partly written packet would be misread.
func (l *link) Write(p []byte) (int, error) {
	n, err := l.Conn.Write(p)
	if err != nil {
		_ = l.Close()
	}
	return n, err
}

// Close ends the connection at once, without waiting for the peer.
func (l *link) Close() error {
	l.once.Do(func() {
		close(l.done)
		_ = l.wire.Close()
	})
	return nil
}

// SetDeadline does nothing: mochi would cut off a slow but living write with it.
func (l *link) SetDeadline(time.Time) error { return nil }

// readConnectHeader reads the fixed header of the first packet and refuses what is not a CONNECT of at most limit bytes,
// before anything is allocated for it.
func readConnectHeader(r io.Reader, limit int) ([]byte, error) {
	head := make([]byte, 0, 5)
	length := 0
	for shift := 0; len(head) < 5; {
		var b [1]byte
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return nil, err
		}
		head = append(head, b[0])
		if len(head) == 1 {
			if b[0]>>4 != packets.Connect {
				return nil, fmt.Errorf("first packet is of type %d, not CONNECT", b[0]>>4)
			}
			continue
		}
		length |= int(b[0]&0x7f) << shift
		shift += 7
		if length > limit {
			return nil, fmt.Errorf("CONNECT declares %d bytes or more, limit %d", length, limit)
		}
		if b[0]&0x80 == 0 {
			return head, nil
		}
	}
	return nil, errors.New("CONNECT has a malformed length")
}
