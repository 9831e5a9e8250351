package mqttconn

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// unsentBytes is how much the kernel keeps unsent: a ping waits behind at most that.
const unsentBytes = 16 << 10

// tune keeps the kernel's queue of unsent bytes short and lets TCP itself notice that sent bytes are not
// acknowledged. Both are optimisations: an error is of no consequence.
func tune(c net.Conn, stall time.Duration) {
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
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(stall.Milliseconds()))
	})
}
