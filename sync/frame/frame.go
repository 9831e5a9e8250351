package frame

import (
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/seqset"
)

// Limits both sides keep, in bytes unless said otherwise.
const (
	// MaxMessage bounds the payload of one MQTT message between the hubs.
	MaxMessage = 16 << 10
	// MaxPayload bounds one record's payload.
	MaxPayload = 128 << 10
	// MaxTopic bounds one record's topic, as MQTT does.
	MaxTopic = 65535
	// MaxFrame bounds a serialized frame.
	MaxFrame = 256 << 10
	// MaxRecords bounds a frame's records before compression.
	MaxRecords = 256 << 10
	// MaxCount bounds the number of records in a frame.
	MaxCount = 1 << 14
	// MaxStream bounds a stream's name.
	MaxStream = 64
)

// ValidStream checks a stream's name: 1 to 64 bytes of UTF-8 without control characters.
func ValidStream(name string) error {
	if name == "" || len(name) > MaxStream || !utf8.ValidString(name) {
		return fmt.Errorf("stream name %q is not 1 to %d bytes of UTF-8", name, MaxStream)
	}
	for _, r := range name {
		if unicode.IsControl(r) {
			return fmt.Errorf("stream name %q contains a control character", name)
		}
	}
	return nil
}

// Record is one record of a frame. Topic and Payload are parts of the buffer they were read from.
type Record struct {
	// MonoNs is nanoseconds of CLOCK_BOOTTIME, WallNs nanoseconds since 1970 UTC as the edge believed.
	MonoNs, WallNs int64
	Topic, Payload []byte
}

// Frame is a decoded frame.
type Frame struct {
	Stream string
	// First is the sequence of the first record; the others follow without gaps.
	First  uint64
	Count  uint32
	BootID string
	// Records are serialized longshorepb.Records, not compressed.
	Records []byte
}

// Last is the sequence of the last record.
func (f *Frame) Last() uint64 { return f.First + uint64(f.Count) - 1 }

// Walk calls yield for each record in order until yield returns false. It fails on bytes that are no records.
func (f *Frame) Walk(yield func(seq uint64, r Record) bool) error {
	seq := f.First
	for b := f.Records; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if num != 1 || typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		body, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		r, err := parseRecord(body)
		if err != nil {
			return err
		}
		if !yield(seq, r) {
			return nil
		}
		seq++
	}
	return nil
}

func parseRecord(b []byte) (r Record, err error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return r, protowire.ParseError(n)
		}
		b = b[n:]
		switch {
		case num <= 2 && typ == protowire.VarintType:
			var v uint64
			v, n = protowire.ConsumeVarint(b)
			if num == 1 {
				r.MonoNs = int64(v)
			} else {
				r.WallNs = int64(v)
			}
		case (num == 3 || num == 4) && typ == protowire.BytesType:
			var v []byte
			v, n = protowire.ConsumeBytes(b)
			if num == 3 {
				r.Topic = v
			} else {
				r.Payload = v
			}
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return r, protowire.ParseError(n)
		}
		b = b[n:]
	}
	if !utf8.Valid(r.Topic) {
		return r, errors.New("topic is not UTF-8")
	}
	return r, nil
}

// BootID reads the boot id of a serialized frame without its records.
func BootID(b []byte) (string, error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return "", protowire.ParseError(n)
		}
		b = b[n:]
		if num == 4 && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			return string(v), protowire.ParseError(min(n, 0))
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return "", protowire.ParseError(n)
		}
		b = b[n:]
	}
	return "", nil
}

// AppendRecord appends r to serialized longshorepb.Records.
func AppendRecord(b []byte, r Record) []byte {
	size := 0
	if r.MonoNs != 0 {
		size += 1 + protowire.SizeVarint(uint64(r.MonoNs))
	}
	if r.WallNs != 0 {
		size += 1 + protowire.SizeVarint(uint64(r.WallNs))
	}
	if len(r.Topic) > 0 {
		size += 1 + protowire.SizeBytes(len(r.Topic))
	}
	if len(r.Payload) > 0 {
		size += 1 + protowire.SizeBytes(len(r.Payload))
	}
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	if r.MonoNs != 0 {
		b = protowire.AppendTag(b, 1, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(r.MonoNs))
	}
	if r.WallNs != 0 {
		b = protowire.AppendTag(b, 2, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(r.WallNs))
	}
	if len(r.Topic) > 0 {
		b = protowire.AppendTag(b, 3, protowire.BytesType)
		b = protowire.AppendBytes(b, r.Topic)
	}
	if len(r.Payload) > 0 {
		b = protowire.AppendTag(b, 4, protowire.BytesType)
		b = protowire.AppendBytes(b, r.Payload)
	}
	return b
}

// Encoder makes frames. Safe for concurrent use.
type Encoder struct {
	z *zstd.Encoder
}

// NewEncoder returns an encoder that needs little memory.
func NewEncoder() (*Encoder, error) {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithWindowSize(64<<10), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	return &Encoder{z}, nil
}

// minCompress is the size in bytes from which compression is tried.
const minCompress = 128

// Encode serializes f, compressed where that makes it smaller.
func (e *Encoder) Encode(f *Frame) ([]byte, error) {
	p := &longshorepb.Frame{Stream: f.Stream, First: f.First, Count: f.Count, BootId: f.BootID, Records: f.Records}
	if len(f.Records) >= minCompress {
		if z := e.z.EncodeAll(f.Records, make([]byte, 0, len(f.Records))); len(z) < len(f.Records) {
			p.Encoding, p.Records = longshorepb.Encoding_ENCODING_ZSTD, z
		}
	}
	b, err := proto.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("serialize frame: %w", err)
	}
	return b, nil
}

// Decoder reads frames from peers that are not trusted. Safe for concurrent use.
type Decoder struct {
	z *zstd.Decoder
}

// NewDecoder returns a decoder that decompresses up to MaxRecords bytes, on at most two cores at a time.
func NewDecoder() (*Decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(2), zstd.WithDecoderMaxMemory(MaxRecords), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return &Decoder{z}, nil
}

// Close ends the decoder; Decode must not be called any more.
func (d *Decoder) Close() { d.z.Close() }

// Decode reads and checks a serialized frame: names, bounds, and that it holds the records it says.
func (d *Decoder) Decode(b []byte) (*Frame, error) {
	if len(b) > MaxFrame {
		return nil, fmt.Errorf("frame of %d bytes is above the limit of %d", len(b), MaxFrame)
	}
	var p longshorepb.Frame
	if err := proto.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("frame: %w", err)
	}
	f := &Frame{Stream: p.GetStream(), First: p.GetFirst(), Count: p.GetCount(), BootID: p.GetBootId(), Records: p.GetRecords()}
	if err := ValidStream(f.Stream); err != nil {
		return nil, fmt.Errorf("frame: %w", err)
	}
	if f.First == 0 || f.First > seqset.Max-MaxCount || f.Count == 0 || f.Count > MaxCount || len(f.BootID) > MaxStream {
		return nil, fmt.Errorf("frame of %q has impossible first %d, count %d or boot %q", f.Stream, f.First, f.Count, f.BootID)
	}
	switch p.GetEncoding() {
	case longshorepb.Encoding_ENCODING_NONE:
	case longshorepb.Encoding_ENCODING_ZSTD:
		raw, err := d.z.DecodeAll(f.Records, nil)
		if err != nil {
			return nil, fmt.Errorf("decompress frame %d of %q: %w", f.First, f.Stream, err)
		}
		f.Records = raw
	default:
		return nil, fmt.Errorf("frame %d of %q has unknown encoding %d", f.First, f.Stream, p.GetEncoding())
	}
	if len(f.Records) > MaxRecords {
		return nil, fmt.Errorf("frame %d of %q holds more than %d bytes", f.First, f.Stream, MaxRecords)
	}
	var n uint32
	err := f.Walk(func(_ uint64, r Record) bool {
		n++
		return n <= f.Count
	})
	if err != nil {
		return nil, fmt.Errorf("records of frame %d of %q: %w", f.First, f.Stream, err)
	}
	if n != f.Count {
		return nil, fmt.Errorf("frame %d of %q says %d records and holds %d or more", f.First, f.Stream, f.Count, n)
	}
	return f, nil
}
