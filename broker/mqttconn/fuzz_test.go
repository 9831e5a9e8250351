package mqttconn

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"
)

// counting counts the bytes read through it.
type counting struct {
	r io.Reader
	n int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p[:min(len(p), 1)])
	c.n += n
	return n, err
}

// FuzzReadPacket: a hub that turned hostile, or whatever answers in its place, must not make the edge allocate beyond the
// limit or crash.
func FuzzReadPacket(f *testing.F) {
	f.Add([]byte("\x30\x05\x00\x01ahi"), 100)
	f.Add([]byte("\x90\x03\x00\x01\x00"), 100)
	f.Add([]byte("\xd0\x00"), 100)
	f.Add([]byte("\x30\xff\xff\xff\x7f"), 256<<10)
	f.Add([]byte("\x30\x80\x80\x80\x80\x01"), 256<<10)
	f.Add([]byte("\x32\x01\x00"), 100)
	f.Add([]byte("\x20\x02\x00\x00"), 100)
	f.Fuzz(func(t *testing.T, sent []byte, limit int) {
		limit = min(max(limit, 0), 256<<10)
		c := &counting{r: bytes.NewReader(sent)}
		pk, err := readPacket(bufio.NewReaderSize(c, 16), limit)
		if c.n > limit+5 && c.n > 16 {
			t.Fatalf("%d bytes were read for a packet of at most %d", c.n, limit)
		}
		if err == nil && pk == nil {
			t.Fatal("neither a packet nor an error")
		}
	})
}

// FuzzHub: whatever comes after the CONNACK, the connection goes on or ends with a reason; messages hold nothing that was not
// sent, and all goroutines end.
func FuzzHub(f *testing.F) {
	f.Add([]byte("\x30\x05\x00\x01ahi\x90\x03\x00\x01\x00"))
	f.Add([]byte("\x31\x03\x00\x01a\x30\x02\x00\x00"))
	f.Add([]byte("\x90\x02\x00\x01\x90\x04\x00\x01\x80\x80"))
	f.Add([]byte("\xd0\x00\xd0\x00"))
	f.Add([]byte("\x32\x07\x00\x01a\x00\x01hi"))
	f.Add([]byte("\x10\x00"))
	f.Add([]byte("\xe0\x00"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		near, far := net.Pipe()
		m := &meter{Conn: near, stall: time.Minute}
		s := newSession(Config{
			Logger: slog.New(slog.DiscardHandler), KeepAlive: time.Minute, StallTimeout: time.Minute, MaxPacket: 4096, Queue: 4,
		}, newTransport(m, m))
		hub := make(chan struct{})
		go func() {
			defer close(hub)
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				_, _ = io.Copy(io.Discard, far)
			}()
			_, _ = far.Write(sent)
			_ = far.Close()
			<-answered
		}()
		received := 0
		err := s.run(t.Context(), func(ctx context.Context, s *Session) error {
			asked := make(chan error, 1)
			go func() { asked <- s.Subscribe(ctx, "a") }()
			for m := range s.Messages() {
				received += len(m.Topic) + len(m.Payload)
			}
			if err := <-asked; err == nil && !bytes.Contains(sent, []byte{0x90}) {
				return errors.New("subscribed without a SUBACK")
			}
			return nil
		})
		<-hub
		if err == nil || received > len(sent) {
			t.Fatalf("%d bytes of messages came of %d; ended with %v", received, len(sent), err)
		}
	})
}
