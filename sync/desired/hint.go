package desired

import (
	"fmt"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// hints are complete objects sent ahead of a head, in the order in which they came. They stay in memory and count for
// nothing until a signed head leads to them; their digests are verified when they are used.
type hints struct {
	chunks []*longshorepb.Chunk
	bytes  int
}

// add keeps the newest hints and drops the oldest above maxHints.
func (h *hints) add(chunks []*longshorepb.Chunk) error {
	for _, c := range chunks {
		if _, err := toDigest(c.GetDigest()); err != nil {
			return fmt.Errorf("push: %w", err)
		}
		if c.GetOffset() != 0 || c.GetTotal() != uint64(len(c.GetData())) {
			return fmt.Errorf("push of a part: %d bytes at %d of %d", len(c.GetData()), c.GetOffset(), c.GetTotal())
		}
	}
	for _, c := range chunks {
		h.take(Digest(c.GetDigest()))
		h.chunks = append(h.chunks, c)
		h.bytes += hintCost(c)
	}
	for h.bytes > maxHints {
		h.bytes -= hintCost(h.chunks[0])
		h.chunks = h.chunks[1:]
	}
	return nil
}

// take removes and returns the hint of that digest, nil if there is none.
func (h *hints) take(d Digest) *longshorepb.Chunk {
	for i, c := range h.chunks {
		if string(c.GetDigest()) == string(d[:]) {
			h.chunks = append(h.chunks[:i:i], h.chunks[i+1:]...)
			h.bytes -= hintCost(c)
			return c
		}
	}
	return nil
}

// hintCost counts a hint's memory in bytes.
func hintCost(c *longshorepb.Chunk) int { return len(c.GetData()) + 256 }
