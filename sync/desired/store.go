package desired

import (
	"log/slog"
)

// Stored is what a Replica needs to know of the store at the start.
type Stored struct {
	// List is the committed list; nil if none.
	List    *List
	Cluster string
	// Objects held completely, inert ones included.
	Objects map[Digest]struct{}
	// Parts held of objects not complete.
	Parts map[Digest]Part
}

// Part is a resumable prefix of an encoded object.
type Part struct {
	Data  []byte
	Total uint64
}

// Store keeps desired state in Badger. Safe for concurrent use; one process at a time.
type Store struct{}

// OpenStore opens or creates the store in dir with settings for a small box. A store that cannot be read is moved aside
// (dir.corrupt-<time>) and a new one made, which the returned moved tells; a store in use, a full disk or a missing permission is an
// error that says what to do.
func OpenStore(dir string, log *slog.Logger) (s *Store, moved string, err error) { panic("TODO") }

// Close flushes and closes.
func (s *Store) Close() error { panic("TODO") }

// Load reads what a Replica starts from.
func (s *Store) Load() (Stored, error) { panic("TODO") }

// Apply executes SavePart, SaveObject and Commit; when it returns nil for a Commit, the list is on disk.
func (s *Store) Apply(a EdgeAction) error { panic("TODO") }

// Current returns the committed list's objects, decoded list first; (nil, nil, nil) if none.
func (s *Store) Current() (*List, []Object, error) { panic("TODO") }

// NextSession returns a session number higher than ever before in this store, durably.
func (s *Store) NextSession() (uint64, error) { panic("TODO") }

// Get and Put keep small values of other parts of the agent (such as the last good version of a model) durably.
// Get returns nil for a missing key.
func (s *Store) Get(key string) ([]byte, error)     { panic("TODO") }
func (s *Store) Put(key string, value []byte) error { panic("TODO") }
func (s *Store) Delete(key string) error            { panic("TODO") }
