package intake

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// minCompact is how many bytes have to be deleted at least before the store is compacted.
const minCompact = 16 << 20

// measure sums up what the store holds.
func (i *Intake) measure() error {
	return i.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{keyTime}})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			_, size, err := parseTimeKey(it.Item().Key())
			if err != nil {
				return err
			}
			i.stored += size
		}
		return nil
	})
}

func (i *Intake) retainAndLog(ctx context.Context) {
	if err := i.retain(ctx); err != nil {
		i.cfg.Logger.Error("telemetry retention", "err", err)
	}
}

// retain deletes the oldest records until the rest is inside the retention, and gives disk space back once enough is
// deleted. Only Run calls it.
func (i *Intake) retain(ctx context.Context) error {
	for ctx.Err() == nil {
		size, err := i.deleteOldest(time.Now().Add(-i.cfg.MaxAge).UnixNano())
		if err != nil {
			return fmt.Errorf("delete old records: %w", err)
		}
		if size == 0 {
			break
		}
		i.stored -= size
		i.freed += size
	}
	if i.freed < max(i.cfg.MaxBytes/4, minCompact) {
		return nil
	}
	i.freed = 0
	if err := i.db.Flatten(1); err != nil {
		return fmt.Errorf("compact: %w", err)
	}
	return nil
}

// deleteOldest deletes what the oldest transaction wrote, if it is older than before or the store too large. It returns the
// bytes deleted.
func (i *Intake) deleteOldest(before int64) (size int64, err error) {
	key, list, err := i.oldest()
	if err != nil || key == nil {
		return 0, err
	}
	at, size, err := parseTimeKey(key)
	if err != nil {
		return 0, err
	}
	if at >= before && i.stored <= i.cfg.MaxBytes {
		return 0, nil
	}
	// As many transactions as it needs, in this order: the list goes last.
	batch := i.db.NewWriteBatch()
	defer batch.Cancel()
	for _, k := range append(list, key) {
		if err := batch.Delete(k); err != nil {
			return 0, err
		}
	}
	return size, batch.Flush()
}

func (i *Intake) oldest() (key []byte, list [][]byte, err error) {
	txn := i.db.NewTransaction(false)
	defer txn.Discard()
	it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{keyTime}})
	defer it.Close()
	if it.Rewind(); !it.Valid() {
		return nil, nil, nil
	}
	key = slices.Clone(it.Item().Key())
	err = it.Item().Value(func(v []byte) error {
		list, err = keys(v)
		return err
	})
	return key, list, err
}
