package desired

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	badger "github.com/dgraph-io/badger/v4"

	"github.com/longshore-edge/longshore/sync/space"
)

const (
	// maxReserve and minReserve bound the free space below which nothing is written: Badger maps its files into memory, and a
	// write that finds no block would end the process with SIGBUS.
	maxReserve = 32 << 20
	minReserve = 8 << 20
	// closeTime bounds Close: without its files Badger would try to write them for ever.
	closeTime = 15 * time.Second
)

// reserveOf is the reserve on a file system of so many bytes: a sixth of it, within the bounds.
func reserveOf(size int64) int64 { return min(max(size/6, minReserve), maxReserve) }

// openFull opens the store without writing. Should that be impossible, or the store be new, an empty one in memory stands in
// until there is room: nothing is moved aside or given up because of a full disk.
func openFull(dir string, log *slog.Logger) (*badger.DB, error) {
	db, err := openReadOnly(dir, log)
	if err == nil {
		if err = verify(db); err == nil {
			return db, nil
		}
		_ = db.Close() // it was only read
	}
	if !errors.Is(err, fs.ErrNotExist) {
		log.Error("the store cannot be read while the disk is full: the agent goes on without what is in it", "dir", dir, "err", err)
	}
	return badger.Open(small("", log).WithInMemory(true))
}

func openReadOnly(dir string, log *slog.Logger) (*badger.DB, error) {
	if _, err := os.Stat(filepath.Join(dir, badger.ManifestFilename)); err != nil {
		return nil, err
	}
	if err := cutLogs(dir); err != nil {
		return nil, err
	}
	db, err := openBadger(small(dir, log).WithReadOnly(true))
	if err != nil {
		return nil, explainOpen(dir, err)
	}
	return db, nil
}

// room refuses a write that needs so many bytes free, and opens a store for writing that was opened on a full disk.
func (s *Store) room(need int64) error {
	full := s.ReadOnly()
	if full {
		need = max(need, s.reserve)
	}
	free, _, err := space.Of(s.dir)
	if err != nil {
		return err
	}
	if free < need {
		return fmt.Errorf("%w: %d MiB are free on the file system of %s, %d MiB are needed: free some space",
			ErrDiskFull, free>>20, s.dir, need>>20+1)
	}
	if full {
		return s.reopen()
	}
	return nil
}

// reopen opens for writing what is open for reading.
func (s *Store) reopen() error {
	s.swap.Lock()
	defer s.swap.Unlock()
	if !s.readOnly {
		return nil
	}
	if err := s.db.Close(); err != nil {
		s.log.Warn("close the store that was open for reading", "err", err)
	}
	db, err := openWritable(s.dir, s.log)
	if err == nil {
		s.log.Info("there is room on the disk again: the store is open for writing", "dir", s.dir)
		s.db, s.readOnly = db, false
		return nil
	}
	var again error
	if s.db, again = openFull(s.dir, s.log); again != nil {
		return fmt.Errorf("open the store again: %w; %w", err, again)
	}
	return fmt.Errorf("open the store for writing (restart the agent if this stays): %w", err)
}

// ReadOnly says whether the disk was full when the store was opened, and no write has found room since.
func (s *Store) ReadOnly() bool {
	s.swap.RLock()
	defer s.swap.RUnlock()
	return s.readOnly
}

func (s *Store) view(f func(*badger.Txn) error) error {
	s.swap.RLock()
	defer s.swap.RUnlock()
	return s.db.View(f)
}

func (s *Store) update(f func(*badger.Txn) error) error {
	s.swap.RLock()
	defer s.swap.RUnlock()
	return s.db.Update(f)
}

// Close flushes and closes. On a full disk it flushes nothing and leaves the files as they are, locked until the process ends:
// what was written is in Badger's log, and the next start finds it there. If the files are gone, or closing takes longer
// than 15 s, it is an error, and the caller should end the process.
func (s *Store) Close() error {
	if !s.closed.CompareAndSwap(false, true) {
		return nil
	}
	if !s.ReadOnly() {
		if _, err := os.Stat(filepath.Join(s.dir, badger.ManifestFilename)); err != nil {
			return fmt.Errorf("close store: its files in %s are gone: %w", s.dir, err)
		}
		free, _, err := space.Of(s.dir)
		if err != nil {
			return fmt.Errorf("close store: %w", err)
		}
		if free < s.reserve {
			s.log.Warn("the disk is full: the store is left to its log, which the next start reads", "dir", s.dir)
			return nil
		}
	}
	done := make(chan error, 1)
	go func() { // ends with Close, or with the process
		s.swap.RLock()
		defer s.swap.RUnlock()
		done <- s.db.Close()
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("close store: %w", err)
		}
		return nil
	case <-time.After(closeTime):
		return fmt.Errorf("close store: %s could not be written for %s; what was confirmed is in its log", s.dir, closeTime)
	}
}
