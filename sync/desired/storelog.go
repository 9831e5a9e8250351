package desired

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"

	"github.com/dgraph-io/badger/v4/y"
)

// The log of a table in memory, as Badger v4 writes it: 20 bytes, then entries of a kind, a byte for the user, the sizes of key and
// value, the expiry, key, value and the CRC32C of all that. Entries of a transaction have a kind of their own, and one more ends it.
const (
	logHeader  = 20
	maxLogKey  = 1 << 16
	kindTxn    = 1 << 6
	kindTxnEnd = 1 << 7
)

// cutLogs cuts off what follows the last whole transaction of each log: space that a process that was killed had set aside.
// Badger does the same when it opens for writing, but when it opens for reading it refuses such a log, and on a full disk not
// even reading of what has no block yet is safe through a map. It takes no space.
func cutLogs(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.mem"))
	if err != nil {
		return err
	}
	for _, f := range files {
		data, err := os.ReadFile(f) // twice a table in memory at most
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		switch end := logEnd(data); {
		case end == logHeader:
			err = os.Remove(f)
		case end < len(data):
			err = os.Truncate(f, int64(end))
		}
		if err != nil {
			return fmt.Errorf("cut log: %w", err)
		}
	}
	return nil
}

// logEnd returns where the last whole transaction ends.
func logEnd(data []byte) int {
	end, txn := logHeader, uint64(0)
	for at := logHeader; at < len(data); {
		kind, key, value, size := logEntry(data[at:])
		if len(key) < 8 {
			break
		}
		at += size
		switch {
		case kind&kindTxn != 0:
			if txn == 0 {
				txn = y.ParseTs(key)
			}
			if txn != y.ParseTs(key) {
				return end
			}
		case kind&kindTxnEnd != 0:
			if ts, err := strconv.ParseUint(string(value), 10, 64); err != nil || ts != txn {
				return end
			}
			end, txn = at, 0
		case txn != 0:
			return end
		default:
			end = at
		}
	}
	return end
}

// logEntry reads the first entry; key is nil if there is no whole one.
func logEntry(b []byte) (kind byte, key, value []byte, size int) {
	at := 2
	var sizes [3]uint64 // key, value, expiry
	for i := range sizes {
		n := 0
		if at < len(b) {
			sizes[i], n = binary.Uvarint(b[at:])
		}
		if n <= 0 {
			return 0, nil, nil, 0
		}
		at += n
	}
	rest := uint64(len(b) - at)
	if sizes[0] > maxLogKey || sizes[1] > rest || sizes[0]+sizes[1]+crc32.Size > rest {
		return 0, nil, nil, 0
	}
	mid, end := at+int(sizes[0]), at+int(sizes[0]+sizes[1])
	if crc32.Checksum(b[:end], y.CastagnoliCrcTable) != binary.BigEndian.Uint32(b[end:]) {
		return 0, nil, nil, 0
	}
	return b[0], b[at:mid], b[mid:end], end + crc32.Size
}
