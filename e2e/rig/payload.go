package rig

import "encoding/binary"

// payload follows one direction of an MQTT connection and counts the payload of its PUBLISH packets (MQTT 3.1.1, section 3.3).
type payload struct {
	header []byte // of the packet that is not complete yet
	left   int    // bytes of the packet that are still to come
	count  bool   // those are payload
}

// take returns how many bytes of b are payload.
func (p *payload) take(b []byte) (n int64) {
	for len(b) > 0 {
		if p.left > 0 {
			m := min(p.left, len(b))
			if p.count {
				n += int64(m)
			}
			p.left, b = p.left-m, b[m:]
			continue
		}
		p.header, b = append(p.header, b[0]), b[1:]
		p.begin()
	}
	return n
}

// begin looks whether the header is complete: for a PUBLISH it ends with the topic's name and the packet's identifier.
func (p *payload) begin() {
	length, n := binary.Uvarint(p.header[1:])
	if n == 0 {
		return
	}
	if n < 0 { // not MQTT
		p.header = p.header[:0]
		return
	}
	body := p.header[1+n:]
	rest := int(length) - len(body)
	if kind, qos := p.header[0]>>4, p.header[0]>>1&3; kind == 3 && rest > 0 {
		if len(body) < 2 {
			return
		}
		head := 2 + int(binary.BigEndian.Uint16(body))
		if qos > 0 {
			head += 2
		}
		if len(body) < head {
			return
		}
		p.count = true
	} else {
		p.count = false
	}
	p.header, p.left = p.header[:0], rest
}
