package desired

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
	"google.golang.org/protobuf/proto"
)

// checkTables verifies the index of every table before Badger opens it: Badger would panic in a goroutine of its own over a
// damaged one, and take the agent down at every start. Blocks it checks itself. Files that the manifest does not name were being
// written or removed when the power was cut; Badger removes them.
func checkTables(opt badger.Options) error {
	manifest, err := os.Open(filepath.Join(opt.Dir, badger.ManifestFilename))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open manifest: %w", err)
	}
	defer func() { _ = manifest.Close() }()
	m, _, err := badger.ReplayManifestFile(manifest, opt.ExternalMagicVersion, opt)
	if err != nil {
		return fmt.Errorf("%w: manifest: %w", errCorrupt, err)
	}
	for id := range m.Tables {
		f := table.NewFilename(id, opt.Dir)
		data, err := os.ReadFile(f) // a table has about 1 MiB
		if err != nil {
			return fmt.Errorf("read table: %w", err)
		}
		if err := checkTable(data); err != nil {
			return fmt.Errorf("%w: table %s: %w", errCorrupt, filepath.Base(f), err)
		}
	}
	return nil
}

// checkTable reads a table from its end: index, its length, its checksum, the checksum's length.
func checkTable(data []byte) (err error) {
	defer func() {
		if p := recover(); p != nil { // an unknown kind of checksum
			err = fmt.Errorf("%v", p)
		}
	}()
	rest, sum, ok := cutSized(data)
	if !ok {
		return errors.New("no checksum")
	}
	_, index, ok := cutSized(rest)
	if !ok {
		return errors.New("no index")
	}
	want := &pb.Checksum{}
	if err := proto.Unmarshal(sum, want); err != nil {
		return fmt.Errorf("decode checksum: %w", err)
	}
	return y.VerifyChecksum(index, want)
}

// cutSized cuts the last field off, which its length of 4 bytes follows.
func cutSized(b []byte) (rest, field []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := uint64(binary.BigEndian.Uint32(b[len(b)-4:]))
	b = b[:len(b)-4]
	if n > uint64(len(b)) {
		return nil, nil, false
	}
	at := uint64(len(b)) - n
	return b[:at], b[at:], true
}
