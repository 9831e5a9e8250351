package rig

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Device is a field device: an MQTT 3.1.1 client with a fixed client id and a persistent session that publishes at QoS 1,
// one message at a time, and sends again what was not acknowledged after a reconnect (sections 4.3.2 and 4.4). It is
// written for these tests so that what it was promised is known to the byte. Safe for concurrent use.
type Device struct {
	Address, ClientID  string
	Username, Password string

	mu    sync.Mutex
	conn  net.Conn
	r     *bufio.Reader
	next  uint16
	acked int
	again int
}

// Acked counts acknowledged messages, Again those that had to be sent more than once.
func (d *Device) Acked() (acked, again int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.acked, d.again
}

// Close ends the connection; the session stays with the broker.
func (d *Device) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drop()
}

func (d *Device) drop() {
	if d.conn != nil {
		d.conn.Close()
		d.conn = nil
	}
}

// Publish returns nil once the broker has acknowledged the message, reconnecting and sending it again until ctx ends. It
// tells whether the message was sent more than once.
func (d *Device) Publish(ctx context.Context, topic string, payload []byte) (resent bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.next++
	if d.next == 0 {
		d.next = 1
	}
	body := binary.BigEndian.AppendUint16(appendString(nil, topic), d.next)
	body = append(body, payload...)
	sent := 0
	for {
		err := d.connect(ctx)
		if err == nil {
			head := byte(0x32)
			if sent > 0 {
				head |= 0x08 // DUP
			}
			sent++
			err = d.exchange(head, body, d.next)
		}
		if err == nil {
			d.acked++
			if sent > 1 {
				d.again++
			}
			return sent > 1, nil
		}
		d.drop()
		select {
		case <-ctx.Done():
			return sent > 1, fmt.Errorf("publish as %s: %w; last: %w", d.ClientID, ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (d *Device) exchange(head byte, body []byte, id uint16) error {
	_ = d.conn.SetDeadline(time.Now().Add(15 * time.Second))
	if _, err := d.conn.Write(packet(head, body)); err != nil {
		return err
	}
	for {
		typ, b, err := readPacket(d.r)
		if err != nil {
			return err
		}
		if typ>>4 == 4 && len(b) >= 2 && binary.BigEndian.Uint16(b) == id {
			return nil
		}
	}
}

func (d *Device) connect(ctx context.Context) error {
	if d.conn != nil {
		return nil
	}
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", d.Address)
	if err != nil {
		return err
	}
	body := append(appendString(nil, "MQTT"), 4, 0, 0, 60) // level 4, session kept, keepalive 60 s
	body = appendString(body, d.ClientID)
	if d.Username != "" {
		body[7] |= 0xc0
		body = appendString(appendString(body, d.Username), d.Password)
	}
	_ = c.SetDeadline(time.Now().Add(15 * time.Second))
	r := bufio.NewReader(c)
	_, err = c.Write(packet(0x10, body))
	if err == nil {
		var typ byte
		var b []byte
		typ, b, err = readPacket(r)
		if err == nil && (typ != 0x20 || len(b) < 2 || b[1] != 0) {
			err = fmt.Errorf("the broker refused the connection: %x %x", typ, b)
		}
	}
	if err != nil {
		c.Close()
		return err
	}
	d.conn, d.r = c, r
	return nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

func packet(head byte, body []byte) []byte {
	b := []byte{head}
	for n := len(body); ; {
		digit := byte(n & 0x7f)
		if n >>= 7; n > 0 {
			digit |= 0x80
		}
		b = append(b, digit)
		if n == 0 {
			return append(b, body...)
		}
	}
}

func readPacket(r *bufio.Reader) (head byte, body []byte, err error) {
	if head, err = r.ReadByte(); err != nil {
		return 0, nil, err
	}
	n := 0
	for shift := 0; ; shift += 7 {
		digit, err := r.ReadByte()
		if err != nil {
			return 0, nil, err
		}
		n |= int(digit&0x7f) << shift
		if digit&0x80 == 0 {
			break
		}
		if shift == 21 {
			return 0, nil, errors.New("malformed length")
		}
	}
	body = make([]byte, n)
	_, err = io.ReadFull(r, body)
	return head, body, err
}
