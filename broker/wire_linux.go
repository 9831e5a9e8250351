package broker

import (
	"net"

	"golang.org/x/sys/unix"
)

// unsentBytes is how much the kernel keeps unsent per connection: what is written next waits behind at most that.
const unsentBytes = 16 << 10

// limitUnsent keeps the kernel's queue of unsent bytes short, where the connection is TCP. It is an optimisation: an
// error is of no consequence.
func limitUnsent(c net.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentBytes)
	})
}
