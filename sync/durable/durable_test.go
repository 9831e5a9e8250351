package durable

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/y"
)

func TestWriteFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := MkdirAll(dir, 0o700); err != nil {
		t.Fatal("it is there already:", err)
	}
	path := filepath.Join(dir, "file")
	for _, text := range []string{"first", "second"} {
		if err := WriteFile(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != text {
			t.Fatalf("%q, %v", b, err)
		}
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 {
		t.Errorf("beside the file: %v, %v", names, err)
	}
	if err := MkdirAll(filepath.Join(path, "below"), 0o700); err == nil {
		t.Error("a directory below a file")
	}
}

func open(dir string) (*badger.DB, error) {
	return badger.Open(badger.DefaultOptions(dir).WithLogger(nil).WithSyncWrites(true).WithMemTableSize(1 << 20).WithValueThreshold(1 << 10).WithValueLogFileSize(1 << 20))
}

// holding makes a database with one key.
func holding(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	db, err := open(dir)
	if err == nil {
		err = db.Update(func(txn *badger.Txn) error { return txn.Set([]byte("key"), []byte("value")) })
	}
	if err == nil {
		err = db.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// holds fails unless the repaired database opens and has its key.
func holds(t *testing.T, dir string) {
	t.Helper()
	if err := RepairBadger(dir); err != nil {
		t.Fatal(err)
	}
	db, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.View(func(txn *badger.Txn) error { _, err := txn.Get([]byte("key")); return err }); err != nil {
		t.Error(err)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
}

// A kill or a power cut may leave a log before its first byte, or after its last. Badger opens neither: a hub would not start,
// an edge would throw its state away.
func TestLogsWithoutAByte(t *testing.T) {
	for _, name := range []string{"00077.mem", "000077.vlog"} {
		t.Run(name, func(t *testing.T) {
			dir := holding(t)
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if db, err := open(dir); err == nil {
				_ = db.Close()
				t.Error("Badger opens this by itself now: the repair may go")
			}
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			holds(t, dir)
		})
	}
}

// record is a record of a manifest; its content does not matter, since it is torn.
func record(size int) []byte {
	b := make([]byte, recordHead+size)
	for i := range size {
		b[recordHead+i] = byte(i%250 + 1)
	}
	binary.BigEndian.PutUint32(b, uint32(size))
	binary.BigEndian.PutUint32(b[4:], crc32.Checksum(b[recordHead:], y.CastagnoliCrcTable))
	return b
}

// A record that the power cut tore was not synced, so nothing rests on it.
func TestTornManifest(t *testing.T) {
	dir := holding(t)
	path := filepath.Join(dir, badger.ManifestFilename)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const size = 2000
	for _, lost := range [][]int{{0}, {1}, {2}, {3}, {0, 1}, {1, 3}, {0, 1, 2, 3}} {
		t.Run(fmt.Sprint("sectors ", lost), func(t *testing.T) {
			b := append(bytes.Clone(whole), record(size)...)
			for _, n := range lost {
				clear(b[max(len(whole), n*sectorBytes):min(len(b), (n+1)*sectorBytes)])
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			holds(t, dir)
		})
	}
	t.Run("damaged", func(t *testing.T) {
		b := append(bytes.Clone(whole), record(size)...)
		b[len(b)-7] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := RepairBadger(dir); err != nil {
			t.Fatal(err)
		}
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, b) {
			t.Error("what is damaged rather than torn is not for the repair", err)
		}
	})
}
