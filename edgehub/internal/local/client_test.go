package local

import (
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"
)

// randomize makes text that does not compress.
func randomize(s string, seed int) string {
	r := rand.New(rand.NewPCG(uint64(seed), 1))
	b := []byte(s)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

// publishOnce connects, publishes at QoS 1 and reports whether a PUBACK came before the connection was closed. It never
// sends again, unlike a real device, so that a withheld acknowledgement shows.
func publishOnce(ctx context.Context, t *testing.T, c net.Conn, topic, payload string) bool {
	t.Helper()
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	connect := []byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 1, 'd'}
	body := binary.BigEndian.AppendUint16(nil, uint16(len(topic)))
	body = append(append(append(body, topic...), 0, 1), payload...)
	publish := append([]byte{0x32}, length(len(body))...)
	if _, err := c.Write(append(connect, append(publish, body...)...)); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 8) // CONNACK and PUBACK, four bytes each
	_, err := io.ReadFull(c, answer)
	if err == nil && (answer[4] != 0x40 || answer[7] != 1) {
		t.Errorf("answer % x", answer)
	}
	return err == nil
}

// length encodes a remaining length (MQTT 3.1.1, section 2.2.3).
func length(n int) (b []byte) {
	for {
		d := byte(n & 0x7f)
		if n >>= 7; n == 0 {
			return append(b, d)
		}
		b = append(b, d|0x80)
	}
}
