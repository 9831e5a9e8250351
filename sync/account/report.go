package account

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const (
	// maxReport bounds a report in bytes, as it travels and decompressed; edges send at most 16 KiB.
	maxReport = 64 << 10
	// minCompress is the size in bytes from which compression is tried: below it, it saves nothing worth the time.
	minCompress = 512
)

// encoder is made once and shared: zstd.Encoder.EncodeAll is safe for concurrent use and keeps no state between calls.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(16<<10), zstd.WithEncoderCRC(false))
	if err != nil {
		panic(fmt.Sprintf("make zstd encoder: %v", err)) // the options are constants
	}
	return e
})

// decoder is shared as encoder is.
var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(2), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(maxReport), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(fmt.Sprintf("make zstd decoder: %v", err)) // the options are constants
	}
	return d
})

// Encode returns the payload of a report, compressed where that saves an eighth. An error says that a text in it is not UTF-8.
func Encode(r *longshorepb.Reported) ([]byte, error) {
	b, err := proto.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode report: %w", err)
	}
	m := &longshorepb.Report{Reported: b}
	if len(b) >= minCompress {
		if z := encoder().EncodeAll(b, nil); len(z) <= len(b)-len(b)/8 {
			m.Encoding, m.Reported = longshorepb.Encoding_ENCODING_ZSTD, z
		}
	}
	if b, err = proto.Marshal(m); err != nil {
		return nil, fmt.Errorf("encode report: %w", err)
	}
	return b, nil
}

// Decode undoes Encode. It refuses, before it allocates, what no edge of this wire sends.
func Decode(payload []byte) (*longshorepb.Reported, error) {
	if len(payload) > maxReport {
		return nil, errors.New("longer than any edge of this wire sends")
	}
	var m longshorepb.Report
	if err := proto.Unmarshal(payload, &m); err != nil {
		return nil, fmt.Errorf("decode report: %w", err)
	}
	b := m.GetReported()
	switch m.GetEncoding() {
	case longshorepb.Encoding_ENCODING_NONE:
	case longshorepb.Encoding_ENCODING_ZSTD:
		var h zstd.Header
		if err := h.Decode(b); err != nil {
			return nil, fmt.Errorf("read zstd header: %w", err)
		}
		if !h.HasFCS || h.FrameContentSize > maxReport {
			return nil, errors.New("longer, decompressed, than any edge of this wire sends")
		}
		var err error
		if b, err = decoder().DecodeAll(b, make([]byte, 0, h.FrameContentSize)); err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
	default:
		return nil, fmt.Errorf("unknown encoding %d", m.GetEncoding())
	}
	r := &longshorepb.Reported{}
	if err := proto.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("decode report: %w", err)
	}
	return r, nil
}
