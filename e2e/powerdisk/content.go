package powerdisk

import (
	"bytes"
	"math/rand/v2"
)

const (
	page   = 4096
	sector = 512
)

// content is what a file holds; pages that were never written are zeros and take no memory.
type content struct {
	size  int64
	pages map[int64][]byte
}

func newContent() content { return content{pages: map[int64][]byte{}} }

func (c *content) clone() content {
	n := content{size: c.size, pages: make(map[int64][]byte, len(c.pages))}
	for at, p := range c.pages {
		n.pages[at] = bytes.Clone(p)
	}
	return n
}

// write changes bytes and lets the size grow.
func (c *content) write(b []byte, at int64) {
	c.size = max(c.size, at+int64(len(b)))
	c.put(b, at)
}

// put changes bytes that lie within the size and forgets the others.
func (c *content) put(b []byte, at int64) {
	if at >= c.size {
		return
	}
	b = b[:min(int64(len(b)), c.size-at)]
	for len(b) > 0 {
		p := c.pages[at/page]
		if p == nil {
			p = make([]byte, page)
			c.pages[at/page] = p
		}
		n := copy(p[at%page:], b)
		b, at = b[n:], at+int64(n)
	}
}

// read returns how many bytes there are, up to the size of b.
func (c *content) read(b []byte, at int64) int {
	b = b[:max(0, min(int64(len(b)), c.size-at))]
	for done := 0; done < len(b); {
		from := at + int64(done)
		n := min(len(b)-done, page-int(from%page))
		if p := c.pages[from/page]; p != nil {
			copy(b[done:done+n], p[from%page:])
		} else {
			clear(b[done : done+n])
		}
		done += n
	}
	return len(b)
}

func (c *content) truncate(size int64) {
	for at, p := range c.pages {
		if at*page >= size {
			delete(c.pages, at)
		} else if rest := size - at*page; rest < page {
			clear(p[rest:])
		}
	}
	c.size = size
}

// change is one write to a file, or with data nil a new size.
type change struct {
	data []byte
	at   int64 // or the size
}

func (w change) apply(c *content) {
	if w.data == nil {
		c.truncate(w.at)
	} else {
		c.write(w.data, w.at)
	}
}

// survive makes c what a power cut leaves of changes that were not synced.
func (c *content) survive(changes []change, random *rand.Rand) {
	sizes := random.IntN(len(changes) + 1)
	for n, w := range changes {
		switch {
		case w.data != nil:
			if n < sizes {
				c.size = max(c.size, w.at+int64(len(w.data)))
			}
			c.tear(w, random)
		case n < sizes:
			c.truncate(w.at)
		case w.at < c.size:
			return // what follows was written to other blocks, which are lost with the truncation
		}
	}
}

// tear keeps all, nothing or some blocks of a write.
func (c *content) tear(w change, random *rand.Rand) {
	unit, fate := int64(sector), random.IntN(4)
	switch fate {
	case 0:
		return
	case 1:
		c.put(w.data, w.at)
		return
	case 2:
		unit = page
	}
	for from, end := w.at, w.at+int64(len(w.data)); from < end; {
		to := min(end, (from/unit+1)*unit)
		if random.IntN(2) == 0 {
			c.put(w.data[from-w.at:to-w.at], from)
		}
		from = to
	}
}
