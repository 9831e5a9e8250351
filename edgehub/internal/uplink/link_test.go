package uplink

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// link relays to a hub, with a rate each way if it is to be slow as a radio link is. Its address stays while hubs come and
// go.
type link struct {
	net.Listener
	rate int // bytes per second, 0 for no bound
	wg   sync.WaitGroup

	mu     sync.Mutex
	target string // empty: cut
	conns  []net.Conn
}

func newLink(t *testing.T, target string, rate int) *link {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &link{Listener: l, target: target, rate: rate}
	k.wg.Go(k.accept)
	t.Cleanup(func() {
		l.Close()
		k.aim("")
		k.wg.Wait()
	})
	return k
}

// aim sends new connections elsewhere and ends those there are.
func (k *link) aim(target string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.target = target
	for _, c := range k.conns {
		c.Close()
	}
	k.conns = nil
}

func (k *link) accept() {
	for {
		down, err := k.Accept()
		if err != nil {
			return
		}
		k.mu.Lock()
		up, err := net.Dial("tcp", k.target)
		if err != nil {
			down.Close()
		} else {
			k.conns = append(k.conns, up, down)
			k.wg.Go(func() { k.copy(up, down) })
			k.wg.Go(func() { k.copy(down, up) })
		}
		k.mu.Unlock()
	}
}

func (k *link) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	if k.rate == 0 {
		_, _ = io.Copy(to, from) // ends with either connection
		return
	}
	// A twentieth of a second's bytes at a time; small socket buffers keep the rest with the sender.
	_ = from.(*net.TCPConn).SetReadBuffer(8 << 10)
	tick := time.NewTicker(time.Second / 20)
	defer tick.Stop()
	for range tick.C {
		if _, err := io.CopyN(to, from, int64(k.rate/20)); err != nil {
			return
		}
	}
}
