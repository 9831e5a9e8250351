package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"
)

// client is a plain MQTT 3.1.1 connection with a clean session that costs as little as possible itself. It is for one
// goroutine that writes and one that reads.
type client struct {
	conn net.Conn
	r    *bufio.Reader
	w    *bufio.Writer
}

// dialMQTT connects as an anonymous device.
func dialMQTT(ctx context.Context, address, id string) (*client, error) {
	return dialMQTTFrom(ctx, nil, address, id)
}

// dialMQTTFrom is dialMQTT from an address of this machine; nil is any.
func dialMQTTFrom(ctx context.Context, from net.Addr, address, id string) (*client, error) {
	conn, err := (&net.Dialer{Timeout: 30 * time.Second, LocalAddr: from}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &client{conn: conn, r: bufio.NewReaderSize(conn, 4<<10), w: bufio.NewWriterSize(conn, 4<<10)}
	body := append(mqttString(nil, "MQTT"), 4, 2, 0x0e, 0x10) // level 4, clean session, keepalive one hour
	c.begin(0x10, len(body)+2+len(id))
	_, _ = c.w.Write(mqttString(body, id)) // Flush tells
	err = c.w.Flush()
	if err == nil {
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		var head byte
		var code uint16
		head, code, err = c.read()
		if err == nil && (head != 0x20 || code != 0) {
			err = fmt.Errorf("the broker refused the connection: %x %x", head, code)
		}
		_ = conn.SetReadDeadline(time.Time{})
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return c, nil
}

func (c *client) close() { c.conn.Close() }

func mqttString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

// begin writes a packet's fixed header.
func (c *client) begin(head byte, length int) {
	_ = c.w.WriteByte(head) // Flush tells
	for {
		digit := byte(length & 0x7f)
		if length >>= 7; length > 0 {
			digit |= 0x80
		}
		_ = c.w.WriteByte(digit)
		if length == 0 {
			return
		}
	}
}

// subscribe at QoS 0, and wait for the SUBACK.
func (c *client) subscribe(filter string) error {
	body := append(mqttString([]byte{0, 1}, filter), 0)
	c.begin(0x82, len(body))
	_, _ = c.w.Write(body)
	if err := c.w.Flush(); err != nil {
		return err
	}
	head, _, err := c.read()
	if err == nil && head != 0x90 {
		err = fmt.Errorf("packet %x instead of a SUBACK", head)
	}
	return err
}

// send writes a PUBLISH into the buffer, at QoS 1 if id is not 0.
func (c *client) send(topic string, payload []byte, id uint16) {
	head, length := byte(0x30), 2+len(topic)+len(payload)
	if id != 0 {
		head, length = 0x32, length+2
	}
	c.begin(head, length)
	var two [2]byte
	binary.BigEndian.PutUint16(two[:], uint16(len(topic)))
	_, _ = c.w.Write(two[:]) // Flush tells
	_, _ = c.w.WriteString(topic)
	if id != 0 {
		binary.BigEndian.PutUint16(two[:], id)
		_, _ = c.w.Write(two[:])
	}
	_, _ = c.w.Write(payload)
}

// read takes one packet; first are its first two bytes after the fixed header, the packet id of an acknowledgement.
func (c *client) read() (head byte, first uint16, err error) {
	if head, err = c.r.ReadByte(); err != nil {
		return 0, 0, err
	}
	length := 0
	for shift := 0; ; shift += 7 {
		digit, err := c.r.ReadByte()
		if err != nil {
			return 0, 0, err
		}
		length |= int(digit&0x7f) << shift
		if digit&0x80 == 0 {
			break
		}
		if shift == 21 {
			return 0, 0, errors.New("malformed length")
		}
	}
	if length >= 2 {
		b, err := c.r.Peek(2)
		if err != nil {
			return 0, 0, err
		}
		first = binary.BigEndian.Uint16(b)
	}
	_, err = c.r.Discard(length)
	return head, first, err
}

// messages reads so many PUBLISH packets; it ends early with ctx.
func (c *client) messages(ctx context.Context, count int) error {
	defer context.AfterFunc(ctx, c.close)()
	for n := 0; n < count; {
		head, _, err := c.read()
		if err != nil {
			return fmt.Errorf("after %d of %d messages: %w", n, count, err)
		}
		if head>>4 == 3 {
			n++
		}
	}
	return nil
}

// publish sends count messages at QoS 1, window of them unacknowledged at most, and returns when all are acknowledged.
// pace, if not nil, is called before each.
func (c *client) publish(ctx context.Context, topic string, count, window int, payload func(i int) []byte, pace func(i int)) error {
	defer context.AfterFunc(ctx, c.close)()
	slots := make(chan struct{}, window)
	ended := make(chan error, 1)
	go func() {
		for n := 0; n < count; {
			head, _, err := c.read()
			if err != nil {
				ended <- fmt.Errorf("after %d of %d acknowledgements: %w", n, count, err)
				return
			}
			if head>>4 == 4 {
				n++
				<-slots
			}
		}
		ended <- nil
	}()
	for i := range count {
		if pace != nil {
			pace(i)
		}
		select {
		case slots <- struct{}{}:
		default:
			if err := c.w.Flush(); err != nil {
				c.close()
				return errors.Join(err, <-ended)
			}
			select {
			case slots <- struct{}{}:
			case err := <-ended:
				return err
			}
		}
		c.send(topic, payload(i), uint16(i%65535)+1)
		if pace != nil {
			_ = c.w.Flush() // the next one tells
		}
	}
	if err := c.w.Flush(); err != nil {
		c.close()
		return errors.Join(err, <-ended)
	}
	return <-ended
}
