package outbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"net/url"
	"strconv"
	"strings"

	"github.com/longshore-edge/longshore/sync/frame"
)

// A batch is a header of headerSize bytes and one serialized frame:
//
//	0  magic        "LSB1"
//	4  uint32       size of the frame
//	8  uint64       first sequence
//	16 uint32       number of records
//	20 int64        log time of the batch, nanoseconds
//	28 uint32       CRC32C of the frame
//	32 uint32       CRC32C of epoch, stream and the header up to here
//
// Numbers are little-endian. Since the epoch is random and secret to devices, no payload can pose as a batch where a
// damaged header makes recovery look for the next one.
const (
	headerSize = 36
	magic      = "LSB1"
	blockSize  = 4096
)

// castagnoli is read-only.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type header struct {
	size    int64
	first   uint64
	count   uint32
	at      int64
	bodyCRC uint32
}

func (h header) last() uint64 { return h.first + uint64(h.count) - 1 }

// seed starts the checksum of the headers of one epoch and stream.
func seed(epoch [16]byte, stream string) uint32 {
	return crc32.Update(crc32.Checksum(epoch[:], castagnoli), castagnoli, []byte(stream))
}

func appendBatch(b []byte, seed uint32, first uint64, count uint32, at int64, body []byte) []byte {
	start := len(b)
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = binary.LittleEndian.AppendUint64(b, first)
	b = binary.LittleEndian.AppendUint32(b, count)
	b = binary.LittleEndian.AppendUint64(b, uint64(at))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(body, castagnoli))
	b = binary.LittleEndian.AppendUint32(b, crc32.Update(seed, castagnoli, b[start:]))
	return append(b, body...)
}

func parseHeader(b []byte, seed uint32) (header, bool) {
	if len(b) < headerSize || string(b[:4]) != magic || crc32.Update(seed, castagnoli, b[:32]) != binary.LittleEndian.Uint32(b[32:]) {
		return header{}, false
	}
	h := header{
		size:    int64(binary.LittleEndian.Uint32(b[4:])),
		first:   binary.LittleEndian.Uint64(b[8:]),
		count:   binary.LittleEndian.Uint32(b[16:]),
		at:      int64(binary.LittleEndian.Uint64(b[20:])),
		bodyCRC: binary.LittleEndian.Uint32(b[28:]),
	}
	ok := h.size <= frame.MaxFrame && h.first > 0 && h.first < math.MaxInt64 && h.count > 0 && h.count <= frame.MaxCount
	return h, ok
}

// segment is one file of one stream of one epoch. Guarded by Log.mu, but for path.
type segment struct {
	path string
	// first is the first sequence the file may hold, next the first it may not.
	first, next uint64
	// bytes of good batches.
	bytes int64
	// oldest and newest are the log time of the first and last batch; newest is 0 where nobody has looked yet.
	oldest, newest int64
}

// onDisk is what the file costs.
func (s *segment) onDisk() int64 { return (s.bytes + blockSize - 1) / blockSize * blockSize }

func segmentName(stream string, first uint64) string {
	return fmt.Sprintf("%s.%020d.seg", url.PathEscape(stream), first)
}

func parseSegmentName(name string) (stream string, first uint64, ok bool) {
	rest, ok := strings.CutSuffix(name, ".seg")
	dot := strings.LastIndexByte(rest, '.')
	if !ok || dot < 0 {
		return "", 0, false
	}
	first, err := strconv.ParseUint(rest[dot+1:], 10, 63)
	if err != nil || first == 0 {
		return "", 0, false
	}
	stream, err = url.PathUnescape(rest[:dot])
	if err != nil || frame.ValidStream(stream) != nil || segmentName(stream, first) != name {
		return "", 0, false
	}
	return stream, first, true
}

// window reads a file through a buffer that it owns.
type window struct {
	r    io.ReaderAt
	end  int64
	seed uint32
	buf  []byte
	at   int64 // offset of buf[0]
}

// windowSize is how many bytes a window reads at once.
const windowSize = 32 << 10

// bytes returns n bytes at off, valid until the next call; ok is false past the end.
func (w *window) bytes(off, n int64) (_ []byte, ok bool, err error) {
	if off < 0 || n < 0 || off+n > w.end {
		return nil, false, nil
	}
	if off < w.at || off+n > w.at+int64(len(w.buf)) {
		size := min(max(n, windowSize), w.end-off)
		if int64(cap(w.buf)) < size {
			w.buf = make([]byte, size)
		}
		w.buf, w.at = w.buf[:size], off
		if _, err := w.r.ReadAt(w.buf, off); err != nil {
			w.buf = w.buf[:0]
			if errors.Is(err, io.EOF) {
				return nil, false, nil
			}
			return nil, false, err
		}
	}
	return w.buf[off-w.at : off-w.at+n], true, nil
}

// batch is one batch found in a file.
type batch struct {
	header
	// off is where the header starts; body is valid until the window moves on.
	off  int64
	body []byte
}

func (b batch) end() int64 { return b.off + headerSize + b.size }

// nextBatch finds the first whole batch at or after off that reaches sequence from or beyond; found is false at the end of
// the file. torn is the last header before it whose batch is complete in length but wrong: what is known of a damaged
// tail.
func nextBatch(w *window, off int64, from uint64) (b batch, torn header, found bool, err error) {
	for off+headerSize <= w.end {
		raw, ok, err := w.bytes(off, headerSize)
		if err != nil || !ok {
			return batch{}, torn, false, err
		}
		h, ok := parseHeader(raw, w.seed)
		if !ok {
			skip, err := nextMagic(w, off+1)
			if err != nil {
				return batch{}, torn, false, err
			}
			off = skip
			continue
		}
		body, ok, err := w.bytes(off+headerSize, h.size)
		if err != nil {
			return batch{}, torn, false, err
		}
		switch {
		case !ok: // cut short: nothing can follow
			return batch{}, torn, false, nil
		case crc32.Checksum(body, castagnoli) != h.bodyCRC:
			torn = h
			off += headerSize + h.size
		case h.last() < from:
			off += headerSize + h.size
		default:
			return batch{h, off, body}, torn, true, nil
		}
	}
	return batch{}, torn, false, nil
}

// nextMagic returns the offset of the next magic at or after off, or the end of the file.
func nextMagic(w *window, off int64) (int64, error) {
	for off < w.end {
		n := min(w.end-off, windowSize)
		raw, ok, err := w.bytes(off, n)
		if err != nil || !ok {
			return w.end, err
		}
		if i := strings.Index(string(raw), magic); i >= 0 {
			return off + int64(i), nil
		}
		off += max(n-int64(len(magic))+1, 1)
	}
	return w.end, nil
}
