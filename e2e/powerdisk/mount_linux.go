package powerdisk

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Disk is a mounted file system. Its methods are for one goroutine.
type Disk struct {
	dir    string
	random *rand.Rand
	disk   *disk
	server *fuse.Server // nil while there is no power
}

// Mount makes an empty file system at a folder that exists. Cuts come out the same for one seed and one history. The caller
// unmounts it.
func Mount(dir string, mode Mode, seed uint64) (*Disk, error) {
	d := &Disk{dir: dir, random: rand.New(rand.NewPCG(seed, 1)), disk: newDisk(mode)}
	return d, d.Restore()
}

// Cut unmounts the file system and forgets what was not synced. No process may use it any more: kill it first, so that what the
// kernel still writes for it comes after its last fsync.
func (d *Disk) Cut() error {
	if err := d.Unmount(); err != nil {
		return err
	}
	d.disk.cut(d.random)
	return nil
}

// Restore mounts the file system again.
func (d *Disk) Restore() error {
	server, err := fuse.NewServer(&bridge{RawFileSystem: fuse.NewDefaultRawFileSystem(), disk: d.disk}, d.dir, &fuse.MountOptions{
		DirectMountStrict: true, FsName: "powerdisk", Name: "powerdisk",
		DisableXAttrs: true, ExplicitDataCacheControl: true, DisableReadDirPlus: true,
	})
	if err != nil {
		return fmt.Errorf("mount a file system through /dev/fuse at %s: %w", d.dir, err)
	}
	go server.Serve() // ends with Unmount
	if err := server.WaitMount(); err != nil {
		return fmt.Errorf("mount a file system through /dev/fuse at %s: %w", d.dir, err)
	}
	d.server = server
	return nil
}

// Unmount ends the mount and loses nothing. Without a mount it does nothing.
func (d *Disk) Unmount() error {
	if d.server == nil {
		return nil
	}
	if err := d.server.Unmount(); err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir, err)
	}
	d.server.Wait()
	d.server = nil
	return nil
}

// bridge answers the kernel. The kernel is the only one who changes anything, so it may cache all it likes.
type bridge struct {
	fuse.RawFileSystem
	disk *disk
}

const cacheTime = time.Minute

// with runs f on an inode that the kernel knows.
func (b *bridge) with(number uint64, f func(*inode) fuse.Status) fuse.Status {
	b.disk.mu.Lock()
	defer b.disk.mu.Unlock()
	i := b.disk.inodes[number]
	if i == nil {
		return fuse.Status(unix.ESTALE)
	}
	return f(i)
}

func (i *inode) attr(out *fuse.Attr) {
	*out = fuse.Attr{
		Ino: i.number, Mode: i.mode, Nlink: 1, Owner: fuse.Owner{Uid: i.uid, Gid: i.gid}, Blksize: page,
		Size: uint64(i.now.size), Blocks: uint64(len(i.now.pages)) * page / sector,
	}
	out.SetTimes(&i.changed, &i.changed, &i.changed)
}

func (i *inode) entry(out *fuse.EntryOut) {
	out.NodeId, out.Generation = i.number, 1
	out.SetEntryTimeout(cacheTime)
	out.SetAttrTimeout(0)
	i.attr(&out.Attr)
}

func (b *bridge) String() string { return "powerdisk" }

func (b *bridge) Lookup(_ <-chan struct{}, h *fuse.InHeader, called string, out *fuse.EntryOut) fuse.Status {
	return b.with(h.NodeId, func(dir *inode) fuse.Status {
		i := b.disk.inodes[dir.entries[called]]
		if i == nil {
			return fuse.ENOENT
		}
		i.entry(out)
		return fuse.OK
	})
}

func (b *bridge) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return b.with(in.NodeId, func(i *inode) fuse.Status {
		i.attr(&out.Attr)
		return fuse.OK
	})
}

func (b *bridge) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	return b.with(in.NodeId, func(i *inode) fuse.Status {
		if size, ok := in.GetSize(); ok && int64(size) != i.now.size {
			i.change(change{at: int64(size)})
		}
		if mode, ok := in.GetMode(); ok {
			i.mode = i.mode&modeType | mode&^modeType
		}
		if uid, ok := in.GetUID(); ok {
			i.uid = uid
		}
		if gid, ok := in.GetGID(); ok {
			i.gid = gid
		}
		if at, ok := in.GetMTime(); ok {
			i.changed = at
		}
		i.attr(&out.Attr)
		return fuse.OK
	})
}

// make adds an inode under a name that is free.
func (b *bridge) make(h *fuse.InHeader, called string, mode uint32, out *fuse.EntryOut) fuse.Status {
	return b.with(h.NodeId, func(dir *inode) fuse.Status {
		if dir.entries[called] != 0 {
			return fuse.Status(unix.EEXIST)
		}
		i := b.disk.add(mode, h.Uid, h.Gid)
		b.disk.rename(renaming{{name{dir.number, called}, i.number}})
		i.entry(out)
		return fuse.OK
	})
}

func (b *bridge) Mknod(_ <-chan struct{}, in *fuse.MknodIn, called string, out *fuse.EntryOut) fuse.Status {
	return b.make(&in.InHeader, called, in.Mode, out)
}

func (b *bridge) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, called string, out *fuse.EntryOut) fuse.Status {
	return b.make(&in.InHeader, called, modeDir|in.Mode&^modeType, out)
}

func (b *bridge) Create(_ <-chan struct{}, in *fuse.CreateIn, called string, out *fuse.CreateOut) fuse.Status {
	out.OpenOut.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return b.make(&in.InHeader, called, unix.S_IFREG|in.Mode&^modeType, &out.EntryOut)
}

func (b *bridge) Unlink(_ <-chan struct{}, h *fuse.InHeader, called string) fuse.Status {
	return b.with(h.NodeId, func(dir *inode) fuse.Status {
		i := b.disk.inodes[dir.entries[called]]
		switch {
		case i == nil:
			return fuse.ENOENT
		case len(i.entries) > 0:
			return fuse.Status(unix.ENOTEMPTY)
		}
		b.disk.rename(renaming{{name{dir.number, called}, 0}})
		return fuse.OK
	})
}

func (b *bridge) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, called string) fuse.Status {
	return b.Unlink(cancel, h, called)
}

func (b *bridge) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if in.Flags&^unix.RENAME_NOREPLACE != 0 {
		return fuse.EINVAL
	}
	return b.with(in.NodeId, func(dir *inode) fuse.Status {
		target := b.disk.inodes[in.Newdir]
		if dir.entries[from] == 0 || target == nil {
			return fuse.ENOENT
		}
		if there := b.disk.inodes[target.entries[to]]; there != nil && in.Flags&unix.RENAME_NOREPLACE != 0 {
			return fuse.Status(unix.EEXIST)
		} else if there != nil && len(there.entries) > 0 {
			return fuse.Status(unix.ENOTEMPTY)
		}
		b.disk.rename(renaming{{name{dir.number, from}, 0}, {name{target.number, to}, dir.entries[from]}})
		return fuse.OK
	})
}

func (b *bridge) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return b.with(in.NodeId, func(i *inode) fuse.Status {
		if in.Flags&unix.O_TRUNC != 0 {
			i.change(change{at: 0})
		}
		return fuse.OK
	})
}

func (b *bridge) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (res fuse.ReadResult, code fuse.Status) {
	code = b.with(in.NodeId, func(i *inode) fuse.Status {
		res = fuse.ReadResultData(buf[:i.now.read(buf, int64(in.Offset))])
		return fuse.OK
	})
	return res, code
}

func (b *bridge) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (written uint32, code fuse.Status) {
	code = b.with(in.NodeId, func(i *inode) fuse.Status {
		if len(data) > 0 {
			i.change(change{data: slices.Clone(data), at: int64(in.Offset)})
		}
		return fuse.OK
	})
	return uint32(len(data)), code
}

func (b *bridge) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.Mode != 0 {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	return b.with(in.NodeId, func(i *inode) fuse.Status {
		if end := int64(in.Offset + in.Length); end > i.now.size {
			i.change(change{at: end})
		}
		return fuse.OK
	})
}

func (b *bridge) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Fsync also answers fdatasync, msync and writes with O_SYNC and O_DSYNC: the kernel sends it for each.
func (b *bridge) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return b.with(in.NodeId, func(i *inode) fuse.Status {
		b.disk.sync(i)
		return fuse.OK
	})
}

func (b *bridge) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return b.Fsync(cancel, in)
}

func (b *bridge) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.OK }

func (b *bridge) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return b.with(in.NodeId, func(dir *inode) fuse.Status {
		// Inodes are never used twice, so their numbers are positions that hold while the directory changes.
		byNumber := map[uint64]string{}
		for called, number := range dir.entries {
			byNumber[number] = called
		}
		for _, number := range slices.Sorted(maps.Keys(byNumber)) {
			if number <= in.Offset {
				continue
			}
			e := fuse.DirEntry{Name: byNumber[number], Ino: number, Mode: b.disk.inodes[number].mode, Off: number}
			if !out.AddDirEntry(e) {
				break
			}
		}
		return fuse.OK
	})
}

func (b *bridge) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	const blocks = 4 << 30 / page
	*out = fuse.StatfsOut{Blocks: blocks, Bfree: blocks, Bavail: blocks, Files: 1 << 20, Ffree: 1 << 20, Bsize: page, Frsize: page, NameLen: 255}
	return fuse.OK
}
