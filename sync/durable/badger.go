package durable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/y"
)

// RepairBadger makes what a power cut or a kill may leave in the folder of a Badger v4 database into what Badger opens, which
// fails on
//
//   - a log (*.mem, *.vlog) without a byte: Badger makes a file empty before it sets its size, and before it removes it. Nothing
//     that was committed is in it.
//   - a torn record at the end of its manifest. It was not synced, so no log that it would replace was removed.
//
// It must not run while the database is open, and changes nothing that Badger can open. A folder that is not there is none.
func RepairBadger(dir string) error {
	for _, pattern := range []string{"*.mem", "*.vlog"} {
		if err := removeEmpty(filepath.Join(dir, pattern)); err != nil {
			return fmt.Errorf("repair %s: %w", dir, err)
		}
	}
	if err := cutManifest(filepath.Join(dir, badger.ManifestFilename)); err != nil {
		return fmt.Errorf("repair %s: %w", dir, err)
	}
	return nil
}

func removeEmpty(pattern string) error {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, f := range files {
		if st, err := os.Stat(f); err != nil || st.Size() > 0 {
			continue // Badger says what is wrong with it
		}
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return nil
}

const (
	// manifestHead is the size of what the records of a manifest follow: magic and versions.
	manifestHead = 8
	// recordHead is the size of what precedes a record: its length and its CRC32C.
	recordHead = 8
	// sectorBytes is what a disk writes at once or not at all.
	sectorBytes = 512
)

// cutManifest cuts off the last record of a manifest if it is torn: it cannot be read, and a part of it that lies in a sector
// of its own has never been written. Anything else is damage, which is Badger's to report.
func cutManifest(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	good := manifestHead
	for at := good; at+recordHead <= len(b); {
		length := uint64(binary.BigEndian.Uint32(b[at:]))
		end := uint64(at) + recordHead + length
		switch {
		case length <= uint64(len(b)) && end > uint64(len(b)):
			return nil // cut short: Badger takes that for the end
		case length > uint64(len(b)), crc32.Checksum(b[at+recordHead:end], y.CastagnoliCrcTable) != binary.BigEndian.Uint32(b[at+4:]):
			if torn(b, good) {
				return os.Truncate(path, int64(good))
			}
			return nil
		}
		at = int(end)
		if length > 0 { // zeros read as records of no length, and may be where a torn one begins
			good = at
		}
	}
	return nil
}

// torn says whether one of the sectors that b[at:] is part of holds only zeros of it.
func torn(b []byte, at int) bool {
	for at < len(b) {
		end := min(len(b), (at/sectorBytes+1)*sectorBytes)
		if len(bytes.Trim(b[at:end], "\x00")) == 0 {
			return true
		}
		at = end
	}
	return false
}
