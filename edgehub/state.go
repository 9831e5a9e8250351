package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/sync/durable"
)

// stateDir is the folder of everything the agent keeps.
type stateDir string

func (d stateDir) desired() string { return filepath.Join(string(d), "desired") }
func (d stateDir) outbox() string  { return filepath.Join(string(d), "outbox") }
func (d stateDir) models() string  { return filepath.Join(string(d), "models") }
func (d stateDir) socket() string  { return filepath.Join(string(d), "agent.sock") }
func (d stateDir) lock() string    { return filepath.Join(string(d), "lock") }

// errInUse says that another process has the state folder.
var errInUse = errors.New("is in use")

// maxSocketPath is what Linux takes as the path of a Unix socket, less room for the models' sockets.
const maxSocketPath = 107

// open makes the folder if need be and locks it for this process. The caller closes the file, which unlocks it.
func (d stateDir) open() (*os.File, error) {
	if n := len(d.socket()); n > maxSocketPath {
		return nil, fmt.Errorf("state folder %s: its path is too long for a Unix socket (%d of at most %d characters): choose a shorter one", d, n, maxSocketPath)
	}
	if err := durable.MkdirAll(string(d), 0o700); err != nil {
		return nil, d.explain(err)
	}
	f, err := os.OpenFile(d.lock(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, d.explain(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := os.ReadFile(d.lock()) // best effort: it only words the error
		return nil, errors.Join(fmt.Errorf("state folder %s %w by process %s: an agent runs already; stop it first, or set another state folder (--state)",
			d, errInUse, strings.TrimSpace(string(pid))), f.Close())
	}
	pid := fmt.Sprintf("%d\n", os.Getpid())
	if _, err = f.WriteAt([]byte(pid), 0); err == nil { // over what stands there, which has its block on a full disk
		err = f.Truncate(int64(len(pid)))
	}
	if err != nil && !errors.Is(err, unix.ENOSPC) { // the number only words an error
		return nil, errors.Join(d.explain(err), f.Close())
	}
	return f, nil
}

// held says why the folder is not this process's own any more: somebody removed it, or its lock.
func (d stateDir) held(lock *os.File) error {
	mine, err := lock.Stat()
	if err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	if now, err := os.Stat(d.lock()); err != nil || !os.SameFile(mine, now) {
		return fmt.Errorf("state folder: %s is not the file that this agent locked: the folder was removed or replaced; restart the agent", d.lock())
	}
	return nil
}

func (d stateDir) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("state folder: %w: run the agent as root or as the folder's owner, or set another state folder (--state)", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("state folder: %w: set one on a disk that can be written (--state)", err)
	}
	return explainDisk(fmt.Errorf("state folder: %w", err))
}

// explainDisk adds what to do to an error about a full disk.
func explainDisk(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: the disk is full: free some space and start again", err)
	}
	return err
}

// wipe removes what the agent keeps, and nothing else that may stand in the folder. The caller holds the lock.
func (d stateDir) wipe() error {
	var errs []error
	moved, err := filepath.Glob(d.desired() + ".corrupt-*")
	errs = append(errs, err)
	for _, p := range append(moved, d.outbox(), d.models(), d.socket(), d.desired(), d.lock()) {
		errs = append(errs, os.RemoveAll(p))
	}
	if err := os.Remove(string(d)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
