package outbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/sync/space"
)

// disk is the file operations of a Log, so that tests can cut the power between any two of them.
type disk interface {
	MkdirAll(path string) error
	// Create makes a file that must not exist.
	Create(path string) (file, error)
	Open(path string) (file, error)
	Rename(from, to string) error
	// Remove deletes a file or an empty directory.
	Remove(path string) error
	// List returns the names in a directory, none if it does not exist.
	List(path string) ([]string, error)
	// SyncDir makes creations, renames and removals in a directory durable.
	SyncDir(path string) error
	// Free returns the bytes that may still be written to the file system of path, and its size.
	Free(path string) (free, size int64, err error)
	// Lock takes a file's lock until the closer is closed; it fails with errLocked.
	Lock(path string) (io.Closer, error)
}

type file interface {
	io.Writer
	io.ReaderAt
	io.Closer
	Sync() error
	Truncate(size int64) error
	Size() (int64, error)
}

var errLocked = errors.New("locked by another process")

type osDisk struct{}

func (osDisk) MkdirAll(path string) error { return os.MkdirAll(path, 0o700) }

func (osDisk) Create(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) Open(path string) (file, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) Rename(from, to string) error { return os.Rename(from, to) }
func (osDisk) Remove(path string) error     { return os.Remove(path) }

func (osDisk) List(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (osDisk) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (osDisk) Free(path string) (free, size int64, err error) { return space.Of(path) }

func (osDisk) Lock(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errLocked
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// readFile reads the whole of a file of at most limit bytes.
func readFile(d disk, path string, limit int64) (_ []byte, err error) {
	f, err := d.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, size, limit)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

// replaceFile makes path hold b, atomically and durably: after a power cut it holds either its old content or b.
func replaceFile(d disk, path string, b []byte) error {
	tmp := path + ".new"
	if err := d.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := d.Create(tmp)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, d.Remove(tmp))
	}
	if err := d.Rename(tmp, path); err != nil {
		return err
	}
	return d.SyncDir(filepath.Dir(path))
}
