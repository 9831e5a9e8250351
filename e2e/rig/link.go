package rig

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// inFlight bounds the pieces of at most 32 KiB that are on their way in one direction of a connection.
const inFlight = 1024

// Link is a TCP relay that can be cut: it stands for the network between an edge and the hub.
type Link struct {
	l    net.Listener
	dial func(network, address string) (net.Conn, error)
	wg   sync.WaitGroup

	mu     sync.Mutex
	target string
	cut    bool
	mute   bool
	closed bool
	conns  map[net.Conn]struct{}
	bytes  int64
	// payload of MQTT messages among them.
	payload int64
	delay   time.Duration
}

// NewLink relays to target until Close.
func NewLink(target string) (*Link, error) { return NewLinkVia(net.Dial, target) }

// NewLinkVia is NewLink with another way to dial the target, such as from a network namespace.
func NewLinkVia(dial func(network, address string) (net.Conn, error), target string) (*Link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &Link{target: target, l: l, dial: dial, conns: map[net.Conn]struct{}{}}
	k.wg.Add(1)
	go k.accept()
	return k, nil
}

// Addr is what the edge dials.
func (k *Link) Addr() string { return k.l.Addr().String() }

// Cut ends every connection and refuses new ones until Restore.
func (k *Link) Cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut = true
	k.dropAll()
}

// Restore lets connections through again.
func (k *Link) Restore() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut = false
}

// Mute loses whatever the target says, while what it is told goes through.
func (k *Link) Mute(mute bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mute = mute
}

// Delay lets every byte take d from now on, in each direction, and loses no throughput by it. Connecting is not delayed.
func (k *Link) Delay(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.delay = d
}

// Retarget ends every connection; new ones go to another target.
func (k *Link) Retarget(target string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.target = target
	k.dropAll()
}

// Bytes relayed so far, both ways.
func (k *Link) Bytes() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.bytes
}

// Payload is how many of the bytes relayed were payload of MQTT messages; it means something where MQTT without TLS is spoken.
func (k *Link) Payload() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.payload
}

// Close ends the relay and waits for its goroutines.
func (k *Link) Close() {
	k.mu.Lock()
	k.closed = true
	k.dropAll()
	k.mu.Unlock()
	k.l.Close()
	k.wg.Wait()
}

// dropAll needs mu.
func (k *Link) dropAll() {
	for c := range k.conns {
		c.Close()
	}
}

func (k *Link) accept() {
	defer k.wg.Done()
	for {
		c, err := k.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		k.wg.Add(1)
		go func() {
			defer k.wg.Done()
			k.relay(c)
		}()
	}
}

// admit notes a connection and returns the target, or closes it if the link is cut or goes elsewhere than expected.
func (k *Link) admit(c net.Conn, expected string) (target string, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cut || k.closed || expected != "" && expected != k.target {
		c.Close()
		return "", false
	}
	k.conns[c] = struct{}{}
	return k.target, true
}

func (k *Link) forget(c net.Conn) {
	c.Close()
	k.mu.Lock()
	delete(k.conns, c)
	k.mu.Unlock()
}

func (k *Link) relay(down net.Conn) {
	target, ok := k.admit(down, "")
	if !ok {
		return
	}
	defer k.forget(down)
	up, err := k.dial("tcp", target)
	if err != nil {
		return
	}
	if _, ok := k.admit(up, target); !ok {
		return
	}
	defer k.forget(up)
	var wg sync.WaitGroup
	for _, d := range [][2]net.Conn{{up, down}, {down, up}} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			k.copy(d[0], d[1], d[1] == up)
			// A half-closed connection is of no use to anybody here.
			d[0].Close()
			d[1].Close()
		}()
	}
	wg.Wait()
}

// parcel is what was read at one time, and when it arrives.
type parcel struct {
	due  time.Time
	data []byte
}

func (k *Link) copy(to, from net.Conn, down bool) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var payload payload
	parcels := make(chan parcel, inFlight)
	defer close(parcels)
	wg.Go(func() {
		if err := deliver(to, parcels); err != nil {
			from.Close() // nobody hears it any more
		}
		for range parcels {
		}
	})
	for {
		b := make([]byte, 32<<10)
		n, err := from.Read(b)
		if n > 0 {
			k.mu.Lock()
			k.bytes += int64(n)
			k.payload += payload.take(b[:n])
			lost := k.mute && down
			due := time.Now().Add(k.delay)
			k.mu.Unlock()
			if !lost {
				parcels <- parcel{due, b[:n]}
			}
		}
		if err != nil {
			return
		}
	}
}

// deliver writes each parcel when it is due.
func deliver(to io.Writer, parcels <-chan parcel) error {
	for p := range parcels {
		<-time.After(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			return err
		}
	}
	return nil
}
