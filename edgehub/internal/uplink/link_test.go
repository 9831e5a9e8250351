package uplink

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// slowLink relays to a hub at a bounded rate each way, as a radio link does.
type slowLink struct {
	net.Listener
	target string
	rate   int // bytes per second
	wg     sync.WaitGroup
}

func newSlowLink(t *testing.T, target string, rate int) *slowLink {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &slowLink{Listener: l, target: target, rate: rate}
	s.wg.Go(s.accept)
	t.Cleanup(func() {
		l.Close()
		s.wg.Wait()
	})
	return s
}

func (s *slowLink) accept() {
	for {
		down, err := s.Accept()
		if err != nil {
			return
		}
		up, err := net.Dial("tcp", s.target)
		if err != nil {
			down.Close()
			continue
		}
		s.wg.Go(func() { s.copy(up, down) })
		s.wg.Go(func() { s.copy(down, up) })
	}
}

// copy passes a twentieth of a second's bytes on at a time. Small socket buffers keep the rest with the sender.
func (s *slowLink) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	_ = from.(*net.TCPConn).SetReadBuffer(8 << 10)
	tick := time.NewTicker(time.Second / 20)
	defer tick.Stop()
	for range tick.C {
		if _, err := io.CopyN(to, from, int64(s.rate/20)); err != nil {
			return
		}
	}
}
