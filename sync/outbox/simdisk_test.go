package outbox

import (
	"errors"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

var errPower = errors.New("the power is off")

// simDisk is a disk in memory that forgets, when the power is cut, what was not synced: of a file any part written since its
// last Sync, of a directory any of the last creations, renames and removals since its last SyncDir.
type simDisk struct {
	mu   sync.Mutex
	rand *rand.Rand
	// now is what programs see, kept what would survive, pending the changes of now not in kept, by directory.
	now, kept map[string]*simInode
	pending   map[string][]func(map[string]*simInode)
	locked    map[string]bool
	// ops counts operations that change something; at cut the power goes, in the middle of it.
	ops, cut int
	off      bool
	// space left in bytes, if limited.
	limited bool
	space   int
	// failSyncs is how many of the next Syncs of files fail.
	failSyncs int
}

type simInode struct {
	data, kept []byte
	dir        bool
	// poisoned: a Sync failed, and the kernel has thrown the dirty pages away. Later Syncs succeed and mean nothing.
	poisoned bool
}

func newSimDisk(seed uint64) *simDisk {
	return &simDisk{
		rand: rand.New(rand.NewPCG(seed, 1)), now: map[string]*simInode{}, kept: map[string]*simInode{},
		pending: map[string][]func(map[string]*simInode){}, locked: map[string]bool{},
	}
}

// step counts an operation; it says whether the power goes now, and fails once it has gone.
func (d *simDisk) step() (cut bool, err error) {
	if d.off {
		return false, errPower
	}
	d.ops++
	if d.cut > 0 && d.ops >= d.cut {
		d.off = true
	}
	return d.off, nil
}

// reboot returns the disk as the next boot finds it.
func (d *simDisk) reboot() *simDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := newSimDisk(d.rand.Uint64())
	for _, dir := range slices.Sorted(maps.Keys(d.pending)) {
		changes := d.pending[dir]
		for _, change := range changes[:d.rand.IntN(len(changes)+1)] {
			change(d.kept)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(d.kept)) {
		in := d.kept[path]
		lost := false
		for dir := filepath.Dir(path); dir != "/"; dir = filepath.Dir(dir) {
			lost = lost || d.kept[dir] == nil
		}
		if lost {
			continue
		}
		data := slices.Clone(in.kept)
		if !in.poisoned && len(in.data) > len(data) {
			fresh := slices.Clone(in.data[len(data):][:d.rand.IntN(len(in.data)-len(data)+1)])
			if d.rand.IntN(2) == 0 && len(fresh) > 0 { // a page in the middle that was not written
				from := d.rand.IntN(len(fresh))
				clear(fresh[from:min(from+512, len(fresh))])
			}
			data = append(data, fresh...)
		}
		i := &simInode{data: data, kept: slices.Clone(data), dir: in.dir}
		n.now[path], n.kept[path] = i, i
	}
	return n
}

func (d *simDisk) change(path string, f func(map[string]*simInode)) {
	f(d.now)
	dir := filepath.Dir(path)
	d.pending[dir] = append(d.pending[dir], f)
}

func (d *simDisk) MkdirAll(path string) error {
	if path == "/" {
		return nil
	}
	if err := d.MkdirAll(filepath.Dir(path)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now[path] != nil {
		return nil
	}
	cut, err := d.step()
	if err != nil {
		return err
	}
	in := &simInode{dir: true}
	d.change(path, func(m map[string]*simInode) { m[path] = in })
	if cut {
		return errPower
	}
	return nil
}

func (d *simDisk) Create(path string) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now[path] != nil {
		return nil, os.ErrExist
	}
	if d.now[filepath.Dir(path)] == nil {
		return nil, os.ErrNotExist
	}
	cut, err := d.step()
	if err != nil {
		return nil, err
	}
	in := &simInode{}
	d.change(path, func(m map[string]*simInode) { m[path] = in })
	if cut {
		return nil, errPower
	}
	return &simFile{d: d, in: in}, nil
}

func (d *simDisk) Open(path string) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off {
		return nil, errPower
	}
	if d.now[path] == nil {
		return nil, os.ErrNotExist
	}
	return &simFile{d: d, in: d.now[path]}, nil
}

func (d *simDisk) Rename(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	cut, err := d.step()
	if err != nil {
		return err
	}
	in := d.now[from]
	if in == nil {
		return os.ErrNotExist
	}
	d.change(to, func(m map[string]*simInode) {
		delete(m, from)
		m[to] = in
	})
	if cut {
		return errPower
	}
	return nil
}

func (d *simDisk) Remove(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off {
		return errPower
	}
	in := d.now[path]
	if in == nil {
		return os.ErrNotExist
	}
	cut, err := d.step()
	if err != nil {
		return err
	}
	d.space += len(in.data)
	d.change(path, func(m map[string]*simInode) { delete(m, path) })
	if cut {
		return errPower
	}
	return nil
}

func (d *simDisk) List(path string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off {
		return nil, errPower
	}
	var names []string
	for p := range d.now {
		if rest, ok := strings.CutPrefix(p, path+"/"); ok {
			name, _, _ := strings.Cut(rest, "/")
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func (d *simDisk) Free(string) (free, size int64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.limited {
		return math.MaxInt64, math.MaxInt64, nil
	}
	return int64(d.space), math.MaxInt64, nil
}

func (d *simDisk) SyncDir(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	cut, err := d.step()
	if err != nil {
		return err
	}
	if cut {
		return errPower
	}
	for _, change := range d.pending[path] {
		change(d.kept)
	}
	delete(d.pending, path)
	return nil
}

func (d *simDisk) Lock(path string) (io.Closer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.locked[path] {
		return nil, errLocked
	}
	d.locked[path] = true
	return simLock{d, path}, nil
}

type simLock struct {
	d    *simDisk
	path string
}

func (l simLock) Close() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	delete(l.d.locked, l.path)
	return nil
}

type simFile struct {
	d  *simDisk
	in *simInode
}

func (f *simFile) Write(b []byte) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	cut, err := f.d.step()
	if err != nil {
		return 0, err
	}
	n, err := len(b), error(nil)
	if f.d.limited && n > f.d.space {
		n, err = max(f.d.space, 0), syscall.ENOSPC
	}
	if cut {
		n, err = f.d.rand.IntN(n+1), errPower
	}
	f.d.space -= n
	f.in.data = append(f.in.data, b[:n]...)
	return n, err
}

func (f *simFile) ReadAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.off {
		return 0, errPower
	}
	n := copy(b, f.in.data[min(off, int64(len(f.in.data))):])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *simFile) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	cut, err := f.d.step()
	if err != nil {
		return err
	}
	if cut {
		return errPower
	}
	if f.d.failSyncs > 0 {
		f.d.failSyncs--
		f.in.poisoned = true
		return syscall.EIO
	}
	if !f.in.poisoned {
		f.in.kept = slices.Clone(f.in.data)
	}
	return nil
}

func (f *simFile) Truncate(size int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	cut, err := f.d.step()
	if err != nil {
		return err
	}
	f.d.space += len(f.in.data) - int(size)
	f.in.data = f.in.data[:size]
	if cut {
		return errPower
	}
	return nil
}

func (f *simFile) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.in.data)), nil
}

func (f *simFile) Close() error { return nil }

// simClock is a clock whose boots begin at 0.
type simClock struct {
	mu   sync.Mutex
	boot string
	mono int64
}

func (c *simClock) Boot() string { return c.boot }
func (c *simClock) Wall() int64  { return 0 }

func (c *simClock) Mono() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mono++
	return c.mono
}

func (c *simClock) pass(ns int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mono += ns
}
