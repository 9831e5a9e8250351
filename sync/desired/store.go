package desired

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/durable"
	"github.com/longshore-edge/longshore/sync/space"
)

// Stored is what a Replica needs to know of the store at the start.
type Stored struct {
	// List is the committed list; nil if none. Previous is the one committed before it.
	List, Previous *List
	Cluster        string
	// Objects held completely, inert ones and lists included.
	Objects map[Digest]struct{}
	// Lists are those of Objects that are lists.
	Lists map[Digest]*List
	// Parts held of objects not complete.
	Parts map[Digest]Part
}

// Part is a resumable prefix of an encoded object.
type Part struct {
	Data  []byte
	Total uint64
	Kind  longshorepb.Kind
	Enc   longshorepb.Encoding
	// unsaved counts bytes at the end of Data that the store does not have.
	unsaved int
}

// ErrDiskFull says that there is too little space left to write safely.
var ErrDiskFull = errors.New("disk full")

// errCorrupt says that the store's content contradicts itself.
var errCorrupt = errors.New("corrupt store")

const (
	// blockBytes bounds one value: everything stays in the LSM tree, which gives space back by itself; the value log would not.
	blockBytes = 32 << 10
	// batchBytes bounds one transaction; Badger takes 15% of a memtable.
	batchBytes = 8 * blockBytes
	memTable   = 4 << 20
	maxValue   = blockBytes
)

// Keys of the store:
//
//	o<digest>           header of a complete object: kind, size, SHA-256 of the body; written after its blocks
//	b<digest><number>   block of an object's body
//	p<digest><offset>   part of an encoded object: kind, encoding, total, data
//	c                   the committed list
//	s                   the last session number
//	k<key>              values of other parts of the agent
const (
	objectKey  = 'o'
	blockKey   = 'b'
	partKey    = 'p'
	commitKey  = 'c'
	sessionKey = 's'
	valueKey   = 'k'
)

// committed is the value of commitKey, as JSON.
type committed struct {
	Cluster  string `json:"cluster"`
	List     []byte `json:"list"`
	Previous []byte `json:"previous,omitempty"`
}

// Store keeps desired state in Badger. Safe for concurrent use; one process at a time.
type Store struct {
	dir     string
	log     *slog.Logger
	reserve int64
	closed  atomic.Bool

	mu      sync.Mutex // orders writes that take several transactions
	session uint64     // the last number handed out; guarded by mu

	// swap is held for reading while db is used; it guards what follows.
	swap sync.RWMutex
	db   *badger.DB
	// readOnly: the disk was full when the store was opened.
	readOnly bool
}

// OpenStore opens or creates the store in dir with settings for a small box. A store that cannot be read is moved aside
// (dir.corrupt-<time>; of several the newest is kept) and a new one made, which the returned moved tells; a store in use or a
// missing permission is an error that says what to do. On a full disk it is opened for reading only: everything in it is
// there, writes fail with ErrDiskFull, and the first write that finds room again opens it for writing.
func OpenStore(dir string, log *slog.Logger) (s *Store, moved string, err error) {
	s, err = openStore(dir, log)
	if !errors.Is(err, errCorrupt) {
		return s, "", err
	}
	log.Error("store is corrupt", "dir", dir, "err", err)
	moved, merr := moveAside(dir)
	if merr != nil {
		return nil, "", fmt.Errorf("move the corrupt store aside (%w): %w", err, merr)
	}
	s, err = openStore(dir, log)
	return s, moved, err
}

func openStore(dir string, log *slog.Logger) (_ *Store, err error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory %s (choose another or run as a user who may write there): %w", dir, err)
	}
	s := &Store{dir: dir, log: log}
	free, size, err := space.Of(dir)
	if err != nil {
		return nil, err
	}
	if s.reserve = reserveOf(size); free < s.reserve {
		s.readOnly = true
		s.db, err = openFull(dir, log)
	} else {
		s.db, err = openWritable(dir, log)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// openWritable opens the database and reads everything that is committed.
func openWritable(dir string, log *slog.Logger) (*badger.DB, error) {
	db, err := openBadger(small(dir, log))
	if err != nil {
		return nil, explainOpen(dir, err)
	}
	if err := verify(db); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", errCorrupt, err), db.Close())
	}
	return db, nil
}

// openBadger opens the database; what panics in it on damaged files is an error here.
func openBadger(opt badger.Options) (db *badger.DB, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errCorrupt, p)
		}
	}()
	if err := durable.RepairBadger(opt.Dir); err != nil {
		return nil, err
	}
	if err := checkTables(opt); err != nil {
		return nil, err
	}
	return badger.Open(opt)
}

// small is Badger's options for a small box.
func small(dir string, log *slog.Logger) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(badgerLog{log}).WithMetricsEnabled(false).
		WithSyncWrites(true).WithDetectConflicts(false).WithNumGoroutines(1).
		WithMemTableSize(memTable).WithNumMemtables(2).WithBaseTableSize(1 << 20).WithBaseLevelSize(4 << 20).
		WithNumLevelZeroTables(2).WithNumLevelZeroTablesStall(4).WithNumCompactors(2).
		WithCompression(options.None).WithBlockCacheSize(0).WithIndexCacheSize(1 << 20).
		WithValueLogFileSize(1 << 20).WithValueThreshold(2 * blockBytes).
		WithChecksumVerificationMode(options.OnTableAndBlockRead)
}

// explainOpen tells a store that is damaged from one that cannot be opened now.
func explainOpen(dir string, err error) error {
	switch {
	case errors.Is(err, errCorrupt):
		return err
	case strings.Contains(err.Error(), "directory lock"):
		return fmt.Errorf("the state directory %s is in use: another agent runs with it, stop that one first or choose another directory: %w", dir, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), strings.Contains(err.Error(), syscall.ENOSPC.Error()):
		return fmt.Errorf("%w: free some space on the file system of %s: %w", ErrDiskFull, dir, err)
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("open the state directory %s (make it writable, or run as the user who owns it): %w", dir, err)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		return fmt.Errorf("open the state directory %s (the limits of files or memory are too low): %w", dir, err)
	}
	return fmt.Errorf("%w: open %s: %w", errCorrupt, dir, err)
}

// moveAside renames dir and removes what was moved aside before.
func moveAside(dir string) (string, error) {
	old, err := filepath.Glob(dir + ".corrupt-*")
	if err != nil {
		return "", err
	}
	moved := dir + ".corrupt-" + time.Now().UTC().Format("20060102T150405.000000")
	if err := os.Rename(dir, moved); err != nil {
		return "", err
	}
	if err := durable.SyncDir(filepath.Dir(dir)); err != nil {
		return "", err
	}
	for _, o := range old {
		if err := os.RemoveAll(o); err != nil {
			return "", err
		}
	}
	return moved, nil
}

// verify reads everything that is committed.
func verify(db *badger.DB) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("read: %v", p)
		}
	}()
	return db.View(func(txn *badger.Txn) error {
		_, _, err := readCurrent(txn)
		return err
	})
}

// Load reads what a Replica starts from, and removes what a crash left half written or half deleted.
func (s *Store) Load() (Stored, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stored{Objects: make(map[Digest]struct{}), Lists: make(map[Digest]*List), Parts: make(map[Digest]Part)}
	var stale [][]byte
	err := s.view(func(txn *badger.Txn) error {
		if err := loadObjects(txn, &st); err != nil {
			return err
		}
		stale = staleKeys(txn, st.Objects)
		if err := loadParts(txn, &st); err != nil {
			return err
		}
		return loadCommitted(txn, &st)
	})
	if err != nil {
		return Stored{}, fmt.Errorf("load store: %w", err)
	}
	if len(stale) > 0 {
		if err := s.deleteKeys(stale); err != nil && !errors.Is(err, ErrDiskFull) { // then the next Load does it
			return Stored{}, fmt.Errorf("load store: %w", err)
		}
	}
	return st, nil
}

func loadObjects(txn *badger.Txn, st *Stored) error {
	return scan(txn, []byte{objectKey}, true, func(key, value []byte) error {
		h, err := parseHeader(key, value)
		if err != nil {
			return err
		}
		st.Objects[h.digest] = struct{}{}
		if h.kind != longshorepb.Kind_KIND_LIST {
			return nil
		}
		st.Lists[h.digest], err = readList(txn, h.digest)
		return err
	})
}

// staleKeys returns blocks without a header, parts of complete objects, and what has no name of either.
func staleKeys(txn *badger.Txn, objects map[Digest]struct{}) [][]byte {
	var stale [][]byte
	for _, prefix := range []byte{blockKey, partKey} {
		_ = scan(txn, []byte{prefix}, false, func(key, _ []byte) error {
			var complete, named bool
			if named = len(key) >= 33; named {
				_, complete = objects[Digest(key[1:33])]
			}
			if !named || complete == (prefix == partKey) {
				stale = append(stale, bytes.Clone(key))
			}
			return nil
		})
	}
	return stale
}

func loadParts(txn *badger.Txn, st *Stored) error {
	return scan(txn, []byte{partKey}, true, func(key, value []byte) error {
		if len(key) != 41 || len(value) < 10 {
			return nil
		}
		d := Digest(key[1:33])
		if _, complete := st.Objects[d]; complete {
			return nil
		}
		p := Part{
			Kind: longshorepb.Kind(value[0]), Enc: longshorepb.Encoding(value[1]), Total: binary.BigEndian.Uint64(value[2:10]),
		}
		switch before, ok := st.Parts[d]; {
		case binary.BigEndian.Uint64(key[33:]) == 0:
			p.Data = bytes.Clone(value[10:])
		case ok && binary.BigEndian.Uint64(key[33:]) == uint64(len(before.Data)) &&
			before.Total == p.Total && before.Enc == p.Enc && before.Kind == p.Kind:
			before.Data = append(before.Data, value[10:]...)
			p = before
		default:
			return nil // behind a gap, or of another encoding
		}
		st.Parts[d] = p
		return nil
	})
}

func loadCommitted(txn *badger.Txn, st *Stored) error {
	c, err := readCommitted(txn)
	if err != nil || c == nil {
		return err
	}
	st.Cluster = c.Cluster
	if st.List, err = readList(txn, Digest(c.List)); err != nil {
		return err
	}
	if len(c.Previous) == 32 {
		if _, ok := st.Objects[Digest(c.Previous)]; ok {
			st.Previous = st.Lists[Digest(c.Previous)]
		}
	}
	return nil
}

// Apply executes SavePart, SaveObject, Commit and Drop; when it returns nil for a Commit, the list is on disk.
func (s *Store) Apply(a EdgeAction) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch a := a.(type) {
	case SavePart:
		if err := s.savePart(a); err != nil {
			return fmt.Errorf("save part of %s: %w", a.Digest.Short(), err)
		}
	case SaveObject:
		if err := s.saveObject(a.Object); err != nil {
			return fmt.Errorf("save %s: %w", a.Object.Ref, err)
		}
	case Commit:
		if err := s.commit(a); err != nil {
			return fmt.Errorf("commit list %s: %w", a.List.Digest.Short(), err)
		}
	case Drop:
		if err := s.drop(a.Digests); err != nil {
			return fmt.Errorf("drop objects: %w", err)
		}
	default:
		return fmt.Errorf("%T is not for the store", a)
	}
	return nil
}

func (s *Store) savePart(a SavePart) error {
	if a.Offset == 0 {
		if err := s.deletePrefix(digestKey(partKey, a.Digest)); err != nil {
			return err
		}
	}
	var w writes
	head := append([]byte{byte(a.Kind), byte(a.Enc)}, binary.BigEndian.AppendUint64(nil, a.Total)...)
	for at := 0; at < len(a.Data); at += blockBytes {
		key := binary.BigEndian.AppendUint64(digestKey(partKey, a.Digest), a.Offset+uint64(at))
		w.put(key, append(bytes.Clone(head), a.Data[at:min(at+blockBytes, len(a.Data))]...))
	}
	return s.write(w)
}

// saveObject writes the blocks first and the header last, so that what has a header is complete.
func (s *Store) saveObject(o Object) error {
	var w writes
	for n, at := uint32(0), 0; at < len(o.Body); n, at = n+1, at+blockBytes {
		key := binary.BigEndian.AppendUint32(digestKey(blockKey, o.Digest), n)
		w.put(key, o.Body[at:min(at+blockBytes, len(o.Body))])
	}
	sum := sha256.Sum256(o.Body)
	header := binary.BigEndian.AppendUint64([]byte{byte(o.Kind)}, uint64(len(o.Body)))
	w.put(digestKey(objectKey, o.Digest), append(header, sum[:]...))
	if err := s.write(w); err != nil {
		return err
	}
	return s.deletePrefix(digestKey(partKey, o.Digest))
}

func (s *Store) commit(a Commit) error {
	if err := s.room(s.reserve); err != nil {
		return err
	}
	return s.update(func(txn *badger.Txn) error {
		for _, d := range listDigests(a.List) {
			if _, err := txn.Get(digestKey(objectKey, d)); err != nil {
				return fmt.Errorf("object %s is not stored: %w", d.Short(), err)
			}
		}
		c := committed{Cluster: a.Cluster, List: a.List.Digest[:]}
		before, err := readCommitted(txn)
		if err != nil {
			return err
		}
		if before != nil {
			c.Previous = before.List
			if bytes.Equal(before.List, c.List) {
				c.Previous = before.Previous
			}
		}
		value, err := json.Marshal(c)
		if err != nil {
			return err
		}
		return txn.Set([]byte{commitKey}, value)
	})
}

// drop deletes headers first: what has none is gone, and Load removes the rest if this is interrupted.
func (s *Store) drop(digests []Digest) error {
	var keys [][]byte
	for _, d := range digests {
		keys = append(keys, digestKey(objectKey, d))
	}
	if err := s.deleteKeys(keys); err != nil {
		return err
	}
	for _, d := range digests {
		if err := errors.Join(s.deletePrefix(digestKey(blockKey, d)), s.deletePrefix(digestKey(partKey, d))); err != nil {
			return err
		}
	}
	return nil
}

// Current returns the committed list's objects, decoded list first; (nil, nil, nil) if none.
func (s *Store) Current() (list *List, objects []Object, err error) {
	err = s.view(func(txn *badger.Txn) (err error) {
		list, objects, err = readCurrent(txn)
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("read the committed list: %w", err)
	}
	return list, objects, nil
}

func readCurrent(txn *badger.Txn) (*List, []Object, error) {
	c, err := readCommitted(txn)
	if err != nil || c == nil {
		return nil, nil, err
	}
	list, err := readList(txn, Digest(c.List))
	if err != nil {
		return nil, nil, err
	}
	var objects []Object
	for _, e := range list.Entries {
		if e.GetAbsent() {
			continue
		}
		d := Digest(e.GetDigest())
		h, body, err := readObject(txn, d)
		if err != nil {
			return nil, nil, err
		}
		if h.kind != e.GetKind() {
			return nil, nil, fmt.Errorf("object %s is a %s, the list names a %s", d.Short(), kindName(h.kind), kindName(e.GetKind()))
		}
		ref := Ref{Kind: e.GetKind(), Namespace: e.GetNamespace(), Name: e.GetName(), UID: e.GetUid()}
		objects = append(objects, Object{Ref: ref, Digest: d, Body: body})
	}
	return list, objects, nil
}

// NextSession returns a session number higher than ever before in this store, durably. It also lies above the time in
// milliseconds since 1970, so that a store made anew goes on above the one that was lost, where the clock is set. On a full
// disk the number is not written: telemetry must go up to make room, and the clock keeps the next start above it.
func (s *Store) NextSession() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n uint64
	err := s.view(func(txn *badger.Txn) error {
		v, err := get(txn, []byte{sessionKey})
		if err == nil && len(v) == 8 {
			n = binary.BigEndian.Uint64(v)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read session number: %w", err)
	}
	n = max(n+1, s.session+1, uint64(max(0, time.Now().UnixMilli())))
	var w writes
	w.put([]byte{sessionKey}, binary.BigEndian.AppendUint64(nil, n))
	if err := s.write(w); err != nil && !errors.Is(err, ErrDiskFull) {
		return 0, fmt.Errorf("write session number: %w", err)
	}
	s.session = n
	return n, nil
}

// Get and Put keep small values of other parts of the agent (such as the last good version of a model) durably.
// Get returns nil for a missing key.
func (s *Store) Get(key string) ([]byte, error) {
	var v []byte
	err := s.view(func(txn *badger.Txn) (err error) {
		v, err = get(txn, append([]byte{valueKey}, key...))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", key, err)
	}
	return v, nil
}

// Put stores a value of at most 32 KiB.
func (s *Store) Put(key string, value []byte) error {
	if len(value) > maxValue {
		return fmt.Errorf("write %q: %d bytes, at most %d", key, len(value), maxValue)
	}
	var w writes
	w.put(append([]byte{valueKey}, key...), value)
	if err := s.write(w); err != nil {
		return fmt.Errorf("write %q: %w", key, err)
	}
	return nil
}

// Delete forgets a key; a missing one is no error.
func (s *Store) Delete(key string) error {
	if err := s.deleteKeys([][]byte{append([]byte{valueKey}, key...)}); err != nil {
		return fmt.Errorf("delete %q: %w", key, err)
	}
	return nil
}

// badgerLog hands Badger's own log lines on; only its errors matter to people.
type badgerLog struct{ log *slog.Logger }

func (l badgerLog) Errorf(f string, a ...any) {
	l.log.Error("badger", "text", strings.TrimSpace(fmt.Sprintf(f, a...)))
}

func (l badgerLog) Warningf(f string, a ...any) {
	l.log.Debug("badger warning", "text", strings.TrimSpace(fmt.Sprintf(f, a...)))
}
func (l badgerLog) Infof(string, ...any)  {}
func (l badgerLog) Debugf(string, ...any) {}
