package desired

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const (
	// maxMessage bounds the payload of every MQTT message of Longshore's own, in bytes.
	maxMessage = 16 << 10
	// chunkBytes is the data of one chunk; the rest of maxMessage is for the fields around it.
	chunkBytes = maxMessage - 128
	// requestBytes answers one subscription, in two chunks.
	requestBytes = 2 * chunkBytes
	// minCompress is the size below which compressing is not tried.
	minCompress = 256
)

// encoder is made once and shared: zstd.Encoder.EncodeAll is safe for concurrent use and keeps no state between calls.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(256<<10), zstd.WithEncoderCRC(false))
	if err != nil {
		panic(fmt.Sprintf("make zstd encoder: %v", err)) // the options are constants
	}
	return e
})

// decoder is shared as encoder is. Its memory limit is that of the largest thing there is, a list.
var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(MaxListBytes), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(fmt.Sprintf("make zstd decoder: %v", err)) // the options are constants
	}
	return d
})

// encode compresses where it saves at least an eighth.
func encode(body []byte) (longshorepb.Encoding, []byte) {
	if len(body) >= minCompress {
		if z := encoder().EncodeAll(body, nil); len(z) <= len(body)-len(body)/8 {
			return longshorepb.Encoding_ENCODING_ZSTD, z
		}
	}
	return longshorepb.Encoding_ENCODING_NONE, body
}

// decode undoes encode and refuses, before it allocates, what would become larger than limit bytes.
func decode(enc longshorepb.Encoding, data []byte, limit uint64) ([]byte, error) {
	switch enc {
	case longshorepb.Encoding_ENCODING_NONE:
		if uint64(len(data)) > limit {
			return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(data), limit)
		}
		return data, nil
	case longshorepb.Encoding_ENCODING_ZSTD:
		var h zstd.Header
		if err := h.Decode(data); err != nil {
			return nil, fmt.Errorf("read zstd header: %w", err)
		}
		if !h.HasFCS || h.FrameContentSize > limit {
			return nil, fmt.Errorf("%w: zstd frame of %d bytes, at most %d", ErrTooLarge, h.FrameContentSize, limit)
		}
		body, err := decoder().DecodeAll(data, make([]byte, 0, h.FrameContentSize))
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		return body, nil
	}
	return nil, fmt.Errorf("unknown encoding %d", enc)
}
