package powerdisk

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Mode says what the fsync of a file does for its name.
type Mode int

const (
	// Journaled file systems make the present name of a file durable with the file.
	Journaled Mode = iota
	// Strict ones make names durable at the fsync of their directory alone.
	Strict
)

const (
	root = 1
	// modeType and modeDir are S_IFMT and S_IFDIR.
	modeType = 0o170000
	modeDir  = 0o040000
)

// disk is the state of a file system: as it is, and as far as it is durable. Its methods but cut are for callers
// that hold mu.
type disk struct {
	mode Mode

	mu     sync.Mutex
	inodes map[uint64]*inode
	last   uint64
	// names are changes of directories that are not durable, in order.
	names []renaming
}

// inode is a file, a directory or a socket. Those without a name stay until the next cut, which may bring their name back.
type inode struct {
	number   uint64
	mode     uint32
	uid, gid uint32
	changed  time.Time
	// now is a file's content, kept what of it is durable, and changes lead from the one to the other.
	now, kept content
	changes   []change
	// entries are a directory's, and safe those of them that are durable.
	entries, safe map[string]uint64
}

// name is a place in a directory.
type name struct {
	dir  uint64
	name string
}

// entry gives a name to an inode, or to none.
type entry struct {
	name
	number uint64
}

// renaming is one change of directories: all of its entries or none.
type renaming []entry

func (r renaming) touches(dir uint64) bool {
	return slices.ContainsFunc(r, func(e entry) bool { return e.dir == dir })
}

func (r renaming) names(number uint64) bool {
	return slices.ContainsFunc(r, func(e entry) bool { return e.number == number })
}

func (r renaming) meets(o renaming) bool {
	return slices.ContainsFunc(r, func(a entry) bool {
		return slices.ContainsFunc(o, func(b entry) bool { return a.name == b.name })
	})
}

func newDisk(mode Mode) *disk {
	d := &disk{mode: mode, inodes: map[uint64]*inode{}}
	d.add(modeDir|0o755, 0, 0)
	return d
}

func (d *disk) add(mode, uid, gid uint32) *inode {
	d.last++
	i := &inode{number: d.last, mode: mode, uid: uid, gid: gid, changed: time.Now(), now: newContent(), kept: newContent()}
	if mode&modeType == modeDir {
		i.entries, i.safe = map[string]uint64{}, map[string]uint64{}
	}
	d.inodes[i.number] = i
	return i
}

// rename changes entries now, and durably later.
func (d *disk) rename(r renaming) {
	for _, e := range r {
		dir := d.inodes[e.dir]
		dir.changed = time.Now()
		set(dir.entries, e)
	}
	d.names = append(d.names, r)
}

func set(entries map[string]uint64, e entry) {
	if e.number == 0 {
		delete(entries, e.name.name)
	} else {
		entries[e.name.name] = e.number
	}
}

// change changes a file now, and durably later.
func (i *inode) change(w change) {
	w.apply(&i.now)
	i.changes = append(i.changes, w)
	i.changed = time.Now()
}

// sync makes durable what fsync promises of a file or a directory.
func (d *disk) sync(i *inode) {
	for _, w := range i.changes {
		w.apply(&i.kept)
	}
	i.changes = nil
	if i.entries != nil {
		d.settle(func(r renaming) bool { return r.touches(i.number) })
	}
	if d.mode == Journaled {
		d.settleName(i.number)
	}
}

// settleName makes the present name of an inode durable, and those of the directories above it.
func (d *disk) settleName(number uint64) {
	above := map[uint64]bool{}
	for _, r := range d.names {
		for _, e := range r {
			if e.number == number {
				above[e.dir] = true
			}
		}
	}
	d.settle(func(r renaming) bool { return r.names(number) })
	for dir := range above {
		d.settleName(dir)
	}
}

// settle makes changes of names durable, and those before them that concern the same names.
func (d *disk) settle(which func(renaming) bool) {
	chosen := make([]bool, len(d.names))
	for n := len(d.names) - 1; n >= 0; n-- {
		chosen[n] = which(d.names[n])
		for later := n + 1; later < len(d.names) && !chosen[n]; later++ {
			chosen[n] = chosen[later] && d.names[n].meets(d.names[later])
		}
	}
	var rest []renaming
	for n, r := range d.names {
		if chosen[n] {
			d.keep(r)
		} else {
			rest = append(rest, r)
		}
	}
	d.names = rest
}

func (d *disk) keep(r renaming) {
	for _, e := range r {
		set(d.inodes[e.dir].safe, e)
	}
}

// cut forgets what is not durable. Nothing is open.
func (d *disk) cut(random *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutNames(random)
	reached := map[uint64]*inode{}
	d.reach(root, reached)
	d.inodes = reached
	for _, number := range slices.Sorted(maps.Keys(reached)) { // in this order, so that a seed repeats it
		i := reached[number]
		if i.entries != nil {
			i.entries = maps.Clone(i.safe)
			continue
		}
		i.kept.survive(i.changes, random)
		i.changes, i.now = nil, i.kept.clone()
	}
}

// cutNames keeps the changes of every directory up to a random point.
func (d *disk) cutNames(random *rand.Rand) {
	left := map[uint64]int{}
	var dirs []uint64
	for _, r := range d.names {
		for _, dir := range r.dirs() {
			if left[dir] == 0 {
				dirs = append(dirs, dir)
			}
			left[dir]++
		}
	}
	for _, dir := range dirs {
		left[dir] = random.IntN(left[dir] + 1)
	}
	for _, r := range d.names {
		lost := slices.ContainsFunc(r.dirs(), func(dir uint64) bool { return left[dir] == 0 })
		for _, dir := range r.dirs() {
			left[dir] = max(0, left[dir]-1)
			if lost {
				left[dir] = 0
			}
		}
		if !lost {
			d.keep(r)
		}
	}
	d.names = nil
}

func (r renaming) dirs() []uint64 {
	var dirs []uint64
	for _, e := range r {
		if !slices.Contains(dirs, e.dir) {
			dirs = append(dirs, e.dir)
		}
	}
	return dirs
}

// reach collects what durable names lead to.
func (d *disk) reach(number uint64, reached map[uint64]*inode) {
	i := d.inodes[number]
	reached[number] = i
	for _, child := range i.safe {
		if reached[child] == nil {
			d.reach(child, reached)
		}
	}
}
