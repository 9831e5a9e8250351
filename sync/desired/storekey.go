package desired

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	badger "github.com/dgraph-io/badger/v4"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// header is the value of objectKey.
type header struct {
	digest Digest
	kind   longshorepb.Kind
	size   uint64
	sum    [32]byte
}

func parseHeader(key, value []byte) (header, error) {
	if len(key) != 33 || len(value) != 41 {
		return header{}, errors.New("object header of a wrong size")
	}
	return header{
		digest: Digest(key[1:]), kind: longshorepb.Kind(value[0]), size: binary.BigEndian.Uint64(value[1:9]), sum: [32]byte(value[9:]),
	}, nil
}

func digestKey(prefix byte, d Digest) []byte {
	return append(append(make([]byte, 0, 41), prefix), d[:]...)
}

// listDigests returns the list's own digest and those of the objects it names.
func listDigests(l *List) []Digest {
	ds := []Digest{l.Digest}
	for _, e := range l.Entries {
		if !e.GetAbsent() {
			ds = append(ds, Digest(e.GetDigest()))
		}
	}
	return ds
}

// readObject reads an object and checks that it is what was written.
func readObject(txn *badger.Txn, d Digest) (header, []byte, error) {
	key := digestKey(objectKey, d)
	v, err := get(txn, key)
	if err != nil {
		return header{}, nil, err
	}
	if v == nil {
		return header{}, nil, fmt.Errorf("object %s is missing", d.Short())
	}
	h, err := parseHeader(key, v)
	if err != nil {
		return header{}, nil, err
	}
	var body []byte
	err = scan(txn, digestKey(blockKey, d), true, func(_, block []byte) error {
		body = append(body, block...)
		return nil
	})
	if err != nil {
		return header{}, nil, err
	}
	if uint64(len(body)) != h.size || sha256.Sum256(body) != h.sum {
		return header{}, nil, fmt.Errorf("object %s is damaged", d.Short())
	}
	return h, body, nil
}

func readList(txn *badger.Txn, d Digest) (*List, error) {
	h, body, err := readObject(txn, d)
	if err != nil {
		return nil, err
	}
	if h.kind != longshorepb.Kind_KIND_LIST {
		return nil, fmt.Errorf("object %s is a %s, not a list", d.Short(), kindName(h.kind))
	}
	return parseList(body, MaxObjectBytes)
}

// readCommitted returns nil if nothing was committed yet.
func readCommitted(txn *badger.Txn) (*committed, error) {
	v, err := get(txn, []byte{commitKey})
	if err != nil || v == nil {
		return nil, err
	}
	c := &committed{}
	if err := json.Unmarshal(v, c); err != nil {
		return nil, fmt.Errorf("decode the committed list's name: %w", err)
	}
	if len(c.List) != 32 {
		return nil, errors.New("the committed list has no digest")
	}
	return c, nil
}

// get returns nil for a missing key.
func get(txn *badger.Txn, key []byte) ([]byte, error) {
	item, err := txn.Get(key)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return item.ValueCopy([]byte{})
}

// scan calls f for every key with the prefix, in order; key and value are valid during the call. value is nil unless values.
func scan(txn *badger.Txn, prefix []byte, values bool, f func(key, value []byte) error) error {
	opt := badger.DefaultIteratorOptions
	opt.Prefix, opt.PrefetchValues = prefix, false
	it := txn.NewIterator(opt)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		item := it.Item()
		if !values {
			if err := f(item.Key(), nil); err != nil {
				return err
			}
			continue
		}
		if err := item.Value(func(v []byte) error { return f(item.Key(), v) }); err != nil {
			return err
		}
	}
	return nil
}

// writes are puts to be made in order.
type writes struct{ entries []*badger.Entry }

func (w *writes) put(key, value []byte) {
	w.entries = append(w.entries, badger.NewEntry(key, value))
}

// write makes puts in order, in transactions of at most batchBytes, each durable before the next.
func (s *Store) write(w writes) error {
	n := 0
	for _, e := range w.entries {
		n += len(e.Key) + len(e.Value)
	}
	if err := s.room(s.reserve + 2*int64(n)); err != nil {
		return err
	}
	for len(w.entries) > 0 {
		count, size := 0, 0
		err := s.update(func(txn *badger.Txn) error {
			for _, e := range w.entries {
				if size > 0 && size+len(e.Value) > batchBytes {
					return nil
				}
				if err := txn.SetEntry(e); err != nil {
					return err
				}
				count, size = count+1, size+len(e.Value)
			}
			return nil
		})
		if err != nil {
			return err
		}
		w.entries = w.entries[count:]
	}
	return nil
}

func (s *Store) deletePrefix(prefix []byte) error {
	var keys [][]byte
	err := s.view(func(txn *badger.Txn) error {
		return scan(txn, prefix, false, func(key, _ []byte) error {
			keys = append(keys, append([]byte(nil), key...))
			return nil
		})
	})
	if err != nil {
		return err
	}
	return s.deleteKeys(keys)
}

func (s *Store) deleteKeys(keys [][]byte) error {
	const batch = 1000
	if err := s.room(s.reserve / 4); err != nil {
		return err
	}
	for len(keys) > 0 {
		n := min(batch, len(keys))
		err := s.update(func(txn *badger.Txn) error {
			for _, k := range keys[:n] {
				if err := txn.Delete(k); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		keys = keys[n:]
	}
	return nil
}
