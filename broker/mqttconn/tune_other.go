//go:build !linux

package mqttconn

import (
	"net"
	"time"
)

func tune(net.Conn, time.Duration) {}
