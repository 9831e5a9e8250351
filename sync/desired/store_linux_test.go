package desired

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fullDir tells the test binary to do something to the store there, fullDo what: what Badger leaves behind in a process ends
// with it then.
const (
	fullDir = "LONGSHORE_TEST_FULL_DIR"
	fullDo  = "LONGSHORE_TEST_FULL_DO"
)

// inProcess does something to the store in dir in a process of its own.
func inProcess(t *testing.T, do, dir string) (out string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), fullDir+"="+dir, fullDo+"="+do)
	b, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(b)), err
}

// beProcess is the whole of that process.
func beProcess(dir string) {
	do := map[string]func(string) error{"read": readFull, "close": closeFull, "remove": closeGone}[os.Getenv(fullDo)]
	if err := do(dir); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// readFull says which list is committed.
func readFull(dir string) error {
	s, _, err := OpenStore(dir, quiet())
	if err != nil {
		return err
	}
	l, objects, err := s.Current()
	if err != nil || len(objects) != 3 || !s.ReadOnly() {
		return fmt.Errorf("%d objects, read-only %t: %w", len(objects), s.ReadOnly(), err)
	}
	fmt.Println(l.Digest)
	return s.Close()
}

// smallDisk mounts a file system of so many MiB until the test ends.
func smallDisk(t *testing.T, mib int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("longshore-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
		t.Fatal("mount a small file system:", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes every byte that is free on the disk of dir; the returned function gives them back.
func fill(dir string) (free func(), err error) {
	path := filepath.Join(dir, "others")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	block := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = os.Remove(path) }, f.Close()
}

// killWriter starts the writer on dir, kills it after some commits and returns what it said to have committed.
func killWriter(t *testing.T, dir string) (said []string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), writerDir+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if said = append(said, lines.Text()); len(said) == 6 {
			_ = cmd.Process.Kill() // Wait says how it ended
		}
	}
	_ = cmd.Wait() // killed
	return said
}

// G2: a box that is cut off on a full disk would serve nothing until somebody drives there, because its store can't be opened.
func TestG2OpenedOnFullDisk(t *testing.T) {
	disk := smallDisk(t, 64)
	dir := filepath.Join(disk, "store")
	said := killWriter(t, dir)
	free, err := fill(disk)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := inProcess(t, "read", dir)
	if i := slices.Index(said, committed); err != nil || i >= 0 && i < len(said)-1 {
		t.Fatalf("%v: committed %q, said %q", err, committed, said)
	}
	s := open(t, dir)
	if !s.ReadOnly() {
		t.Error("open for writing on a full disk")
	}
	list, objects, err := s.Current()
	if err != nil || len(objects) != 3 || list.Digest.String() != committed {
		t.Fatalf("%d objects: %v", len(objects), err)
	}
	if st, err := s.Load(); err != nil || st.List == nil || st.List.Digest != list.Digest {
		t.Errorf("load: %v", err)
	}
	first, err := s.NextSession()
	if second, err2 := s.NextSession(); err != nil || err2 != nil || first == 0 || second <= first {
		t.Errorf("sessions %d, %d: %v %v", first, second, err, err2)
	}
	if err := s.Put("k", []byte("v")); !errors.Is(err, ErrDiskFull) {
		t.Errorf("put on a full disk: %v", err)
	}
	free()
	if err := s.Put("k", []byte("v")); err != nil || s.ReadOnly() {
		t.Fatalf("put with room again: %v", err)
	}
	if now, _, err := s.Current(); err != nil || now.Digest != list.Digest {
		t.Errorf("after it was opened for writing: %v %v", now, err)
	}
	l, err := commitPods(s, 10)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if now, _, err := s.Current(); err != nil || now.Digest != l.Digest {
		t.Errorf("after a restart: %v %v", now, err)
	}
	if v, err := s.Get("k"); err != nil || string(v) != "v" {
		t.Errorf("after a restart: %q %v", v, err)
	}
}

// A box whose disk was full before its agent first ran must start working when there is room, without another hand.
func TestMadeOnFullDisk(t *testing.T) {
	disk := smallDisk(t, 64)
	dir := filepath.Join(disk, "store")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	free, err := fill(disk)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if l, _, err := s.Current(); l != nil || err != nil {
		t.Errorf("current %v: %v", l, err)
	}
	if _, err := commitPods(s, 10); !errors.Is(err, ErrDiskFull) {
		t.Errorf("commit on a full disk: %v", err)
	}
	free()
	l, err := commitPods(s, 10)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if now, _, err := open(t, dir).Current(); err != nil || now.Digest != l.Digest {
		t.Errorf("after a restart: %v %v", now, err)
	}
}

// closeFull commits, fills the disk and closes.
func closeFull(dir string) error {
	s, _, err := OpenStore(dir, quiet())
	if err != nil {
		return err
	}
	l, err := commitPods(s, 10, 200_000)
	if err != nil {
		return err
	}
	if _, err := fill(filepath.Dir(dir)); err != nil {
		return err
	}
	fmt.Println(l.Digest)
	return s.Close()
}

// G2: stopping the agent on a full disk would end it with SIGBUS, in the middle of whatever it does last.
func TestG2ClosedOnFullDisk(t *testing.T) {
	disk := smallDisk(t, 64)
	dir := filepath.Join(disk, "store")
	out, err := inProcess(t, "close", dir)
	if err != nil {
		t.Fatalf("closed on a full disk: %v\n%s", err, out)
	}
	if err := os.Remove(filepath.Join(disk, "others")); err != nil {
		t.Fatal(err)
	}
	l, objects, err := open(t, dir).Current()
	if err != nil || len(objects) != 2 || l.Digest.String() != out {
		t.Errorf("with room again: %d objects, %v", len(objects), err)
	}
}

// A store whose folder somebody removed would keep the agent from ending, for ever.
func TestCloseWithoutFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	out, err := inProcess(t, "remove", dir)
	if err == nil || !strings.Contains(out, "are gone") {
		t.Errorf("%v: %s", err, out)
	}
}

// closeGone commits, removes everything and closes.
func closeGone(dir string) error {
	s, _, err := OpenStore(dir, quiet())
	if err != nil {
		return err
	}
	if _, err := commitPods(s, 10); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return s.Close()
}
