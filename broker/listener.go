package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"
)

// acceptPauseMin and acceptPauseMax bound the doubling pause after an accept that failed, as it does without free
// file descriptors.
const (
	acceptPauseMin = 5 * time.Millisecond
	acceptPauseMax = time.Second
)

// door is an open listener.
type door struct {
	net.Listener
	name string
	tls  *tls.Config
}

func openDoor(l Listener) (door, error) {
	d := door{Listener: l.Net, name: l.Name, tls: l.TLS}
	if d.Listener != nil {
		return d, nil
	}
	// A vanished peer of a client without keepalive is noticed within two minutes.
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4,
	}}
	var err error
	d.Listener, err = lc.Listen(context.Background(), "tcp", l.Address)
	switch {
	case err == nil:
		return d, nil
	case errors.Is(err, syscall.EADDRINUSE):
		err = fmt.Errorf("%w: another program has this port; stop it (\"ss -ltnp\" shows which) or configure another address", err)
	case errors.Is(err, syscall.EACCES):
		err = fmt.Errorf("%w: ports below 1024 need privileges; configure a higher port", err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		err = fmt.Errorf("%w: this machine does not have the address; configure one that \"ip addr\" shows", err)
	}
	return door{}, fmt.Errorf("open MQTT listener %q: %w", l.Name, err)
}

// acceptLoop serves a door until ctx ends. A failing accept is tried again: running out of file descriptors passes.
func (b *Broker) acceptLoop(ctx context.Context, d door) error {
	stop := context.AfterFunc(ctx, func() { _ = d.Close() })
	defer stop()
	pause := acceptPauseMin
	for {
		c, err := d.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("MQTT listener %q was closed: %w", d.name, err)
		}
		if err != nil {
			if pause == acceptPauseMin {
				b.log.Warn("can't accept connections, trying again", "listener", d.name, "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			pause = min(2*pause, acceptPauseMax)
			continue
		}
		pause = acceptPauseMin
		if !b.admit() {
			_ = c.Close()
			continue
		}
		go func() {
			defer b.leave()
			b.serveTCP(ctx, d, c)
		}()
	}
}

// serveTCP serves a connection from its first byte to its last.
func (b *Broker) serveTCP(ctx context.Context, d door, c net.Conn) {
	if opened := b.openTCP(ctx, d, c); opened != nil {
		b.serve(opened)
	}
	_ = c.Close()
}

// openTCP does the TLS handshake, if any, and opens the connection. It returns nil if that failed.
func (b *Broker) openTCP(ctx context.Context, d door, c net.Conn) *Conn {
	w := newWire(c, b.cfg.StallTimeout, &b.stats)
	if err := c.SetReadDeadline(time.Now().Add(b.cfg.HandshakeTimeout)); err != nil {
		return nil
	}
	login := Login{Remote: c.RemoteAddr()}
	if d.tls == nil {
		return b.openConn(d.name, w, w, login)
	}
	t := tls.Server(w, d.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		b.stats.refused.Add(1)
		b.log.Info("TLS handshake failed", "listener", d.name, "remote", login.Remote, "error", err)
		return nil
	}
	state := t.ConnectionState()
	login.TLS = &state
	return b.openConn(d.name, t, w, login)
}
