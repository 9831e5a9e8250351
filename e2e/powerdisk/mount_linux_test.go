package powerdisk

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// mapper is the environment of a process that writes through a map: one must not do that to a file system of one's own process.
const mapper = "POWERDISK_MAP"

func TestMain(m *testing.M) {
	if path := os.Getenv(mapper); path != "" {
		fmt.Println(writeMapped(path))
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	os.Exit(m.Run())
}

// writeMapped fills two pages of a file, the first one synced.
func writeMapped(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := f.Truncate(4 * page); err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(b, bytes.Repeat([]byte("a"), page))
	if err := unix.Msync(b, unix.MS_SYNC); err != nil {
		return err
	}
	copy(b[page:], bytes.Repeat([]byte("b"), page))
	return nil
}

func mount(t *testing.T, mode Mode, seed uint64) (*Disk, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root to mount a file system through /dev/fuse")
	}
	dir := t.TempDir()
	d, err := Mount(dir, mode, seed)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Unmount(); err != nil {
			t.Error(err)
		}
	})
	return d, dir
}

func cut(t *testing.T, d *Disk) {
	t.Helper()
	if err := d.Cut(); err != nil {
		t.Fatal(err)
	}
	if err := d.Restore(); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// write writes a file with flags of open(2), and syncs it if asked to.
func write(t *testing.T, path, text string, flags int, sync bool) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flags, 0o600)
	must(t, err)
	_, err = f.WriteString(text)
	if err == nil && sync {
		err = f.Sync()
	}
	must(t, err, f.Close())
}

func syncDir(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	must(t, f.Sync(), f.Close())
}

// fates counts what a file holds after a power cut, over many seeds; "" stands for a file that is gone.
func fates(t *testing.T, mode Mode, called string, history func(dir string)) map[string]int {
	t.Helper()
	seen := map[string]int{}
	for seed := range uint64(40) {
		d, dir := mount(t, mode, seed)
		history(dir)
		cut(t, d)
		b, err := os.ReadFile(filepath.Join(dir, called))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		seen[string(b)]++
		must(t, d.Unmount())
	}
	return seen
}

// What was synced is there after every power cut.
func TestWhatIsSyncedStays(t *testing.T) {
	for called, history := range map[string]func(dir string){
		"fsync": func(dir string) { write(t, filepath.Join(dir, "file"), "text", 0, true) },
		"dsync": func(dir string) { write(t, filepath.Join(dir, "file"), "text", unix.O_DSYNC, false) },
		"sync":  func(dir string) { write(t, filepath.Join(dir, "file"), "text", unix.O_SYNC, false) },
		"rename": func(dir string) {
			write(t, filepath.Join(dir, "new"), "text", 0, true)
			must(t, os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "file")))
		},
	} {
		t.Run(called, func(t *testing.T) {
			seen := fates(t, Strict, "file", func(dir string) {
				history(dir)
				syncDir(t, dir)
			})
			if seen["text"] != 40 {
				t.Errorf("%v", seen)
			}
		})
	}
}

// What was not synced may be there or not: a disk that never loses it finds no bug, one that always does finds others.
func TestWhatIsNotSyncedMayBeLost(t *testing.T) {
	seen := fates(t, Strict, "file", func(dir string) { write(t, filepath.Join(dir, "file"), "text", 0, false); syncDir(t, dir) })
	if seen["text"] == 0 || seen[""] == 0 || seen["\x00\x00\x00\x00"] == 0 {
		t.Errorf("a file without fsync: %v", seen)
	}
	seen = fates(t, Strict, "file", func(dir string) { write(t, filepath.Join(dir, "file"), "text", 0, true) })
	if seen["text"] == 0 || seen[""] == 0 {
		t.Errorf("a name without fsync of its directory: %v", seen)
	}
	seen = fates(t, Strict, "dir/file", func(dir string) {
		must(t, os.Mkdir(filepath.Join(dir, "dir"), 0o700))
		write(t, filepath.Join(dir, "dir", "file"), "text", 0, true)
		syncDir(t, filepath.Join(dir, "dir"))
	})
	if seen["text"] == 0 || seen[""] == 0 {
		t.Errorf("a directory without fsync of the one above: %v", seen)
	}
	seen = fates(t, Journaled, "file", func(dir string) {
		write(t, filepath.Join(dir, "file"), "old", 0, true)
		write(t, filepath.Join(dir, "new"), "text", 0, true)
		must(t, os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "file")))
	})
	if seen["text"] == 0 || seen["old"] == 0 || len(seen) != 2 {
		t.Errorf("a rename without fsync of its directory: %v", seen)
	}
	seen = fates(t, Journaled, "file", func(dir string) {
		write(t, filepath.Join(dir, "file"), "text", 0, true)
		must(t, os.Remove(filepath.Join(dir, "file")))
	})
	if seen["text"] == 0 || seen[""] == 0 {
		t.Errorf("a removal without fsync of its directory: %v", seen)
	}
}

// On file systems with a journal a synced file keeps its name, and so do the directories above.
func TestJournaledKeepsTheNameOfASyncedFile(t *testing.T) {
	seen := fates(t, Journaled, "dir/file", func(dir string) {
		must(t, os.Mkdir(filepath.Join(dir, "dir"), 0o700))
		write(t, filepath.Join(dir, "dir", "new"), "text", 0, false)
		must(t, os.Rename(filepath.Join(dir, "dir", "new"), filepath.Join(dir, "dir", "file")))
		write(t, filepath.Join(dir, "dir", "file"), "text", 0, true)
	})
	if seen["text"] != 40 {
		t.Errorf("%v", seen)
	}
}

// Writes are torn at sectors, and only there.
func TestWritesAreTorn(t *testing.T) {
	torn := 0
	for seed := range uint64(40) {
		d, dir := mount(t, Strict, seed)
		path := filepath.Join(dir, "file")
		write(t, path, string(bytes.Repeat([]byte("o"), 2*page)), 0, true)
		syncDir(t, dir)
		write(t, path, string(bytes.Repeat([]byte("n"), 2*page)), 0, false)
		cut(t, d)
		b, err := os.ReadFile(path)
		must(t, err, d.Unmount())
		if len(b) != 2*page {
			t.Fatalf("%d bytes", len(b))
		}
		if bytes.Contains(b, []byte("o")) && bytes.Contains(b, []byte("n")) {
			torn++
		}
		for ; len(b) > 0; b = b[sector:] {
			if c := bytes.Count(b[:sector], []byte("n")); c != 0 && c != sector {
				t.Fatal("a sector is torn")
			}
		}
	}
	if torn == 0 {
		t.Error("nothing was torn")
	}
}

// Badger writes through memory maps: what was msynced stays; what was not, which the kernel writes after the process was
// killed, may be lost.
func TestMemoryMaps(t *testing.T) {
	lost := 0
	for seed := range uint64(10) {
		d, dir := mount(t, Journaled, seed)
		path := filepath.Join(dir, "file")
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), mapper+"="+path)
		if out, _ := cmd.Output(); string(out) != "<nil>\n" {
			t.Fatal(string(out))
		}
		b, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Equal(b[page:2*page], bytes.Repeat([]byte("b"), page)) {
			t.Fatal("kill -9 alone loses nothing")
		}
		cut(t, d)
		b, err = os.ReadFile(path)
		must(t, err, d.Unmount())
		if len(b) != 4*page || !bytes.Equal(b[:page], bytes.Repeat([]byte("a"), page)) {
			t.Fatalf("seed %d lost what was synced", seed)
		}
		if !bytes.Equal(b[page:2*page], bytes.Repeat([]byte("b"), page)) {
			lost++
		}
	}
	if lost == 0 || lost == 10 {
		t.Errorf("what was not synced was lost in %d of 10 power cuts", lost)
	}
}
