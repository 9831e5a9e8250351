package rig

import "testing"

// Without it, the page with the figures would say something of MQTT payload that nobody measured.
func TestPayload(t *testing.T) {
	long := append([]byte{0x30, 0xcb, 0x01, 0, 1, 'a'}, make([]byte, 200)...)
	stream := []byte{0x10, 3, 1, 2, 3} // CONNECT
	stream = append(stream, 0x30, 5, 0, 1, 'a', 'x', 'y')
	stream = append(stream, 0xc0, 0) // PINGREQ
	stream = append(stream, long...)
	stream = append(stream, 0x32, 6, 0, 1, 'a', 0, 7, 'x') // QoS 1
	stream = append(stream, 0x30, 3, 0, 1, 'a')            // no payload
	stream = append(stream, 0xe0, 0)
	for size := 1; size < len(stream); size++ {
		var p payload
		var n int64
		for at := 0; at < len(stream); at += size {
			n += p.take(stream[at:min(len(stream), at+size)])
		}
		if n != 203 {
			t.Fatalf("pieces of %d bytes: %d bytes of payload, want 203", size, n)
		}
	}
}
