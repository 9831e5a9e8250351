package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// smallDisk makes the box's state folder a file system of its own, of so many MiB, until the test ends.
func (b *testBox) smallDisk(mib int) {
	b.t.Helper()
	if os.Geteuid() != 0 {
		b.t.Skip("mounting a small file system needs root")
	}
	if err := os.MkdirAll(b.state, 0o700); err != nil {
		b.t.Fatal(err)
	}
	if err := unix.Mount("longshore-test", b.state, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
		b.t.Fatal("mount a small file system:", err)
	}
	b.t.Cleanup(func() {
		if err := unix.Unmount(b.state, unix.MNT_DETACH); err != nil {
			b.t.Error(err)
		}
	})
}

// fill takes every byte that is free on the box's disk and returns the file that holds them.
func (b *testBox) fill() string {
	b.t.Helper()
	path := filepath.Join(b.state, "others")
	f, err := os.Create(path)
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		b.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// publishNoise publishes n messages of 80 KiB that do not compress much.
func (b *testBox) publishNoise(n int) {
	b.t.Helper()
	host, port, _ := strings.Cut(b.broker, ":")
	cmd := exec.CommandContext(b.t.Context(), "mosquitto_pub", "-h", host, "-p", port, "-q", "1", "-t", "sensors/1", "-l")
	random := rand.NewChaCha8([32]byte{})
	pipe, err := cmd.StdinPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	block := make([]byte, 60<<10)
	for range n {
		_, _ = random.Read(block) // never fails
		if _, err := fmt.Fprintln(pipe, base64.StdEncoding.EncodeToString(block)); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := errors.Join(pipe.Close(), cmd.Wait()); err != nil {
		b.t.Fatal("mosquitto_pub:", err)
	}
}

func (b *testBox) kill() {
	b.t.Helper()
	if err := b.cmd.Process.Kill(); err != nil {
		b.t.Fatal(err)
	}
	_ = b.cmd.Wait() // killed
}

// ready asks whether the agent says it does its work.
func (b *testBox) ready() (ok bool, body string) {
	b.t.Helper()
	resp, err := http.Get("http://" + b.http + "/readyz")
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.StatusCode == http.StatusOK, string(text)
}

// G2, G3, G4: readings of a long time without a link would fill the disk to the end, and after the next loss of power the agent
// would never start again: no pods, no models, and the backlog that fills the disk would never leave it.
func TestG2G3BacklogLeavesRoomToStart(t *testing.T) {
	b := newTestBox(t)
	b.smallDisk(60)
	b.start()
	b.publishNoise(900)
	s := b.status().Outbox.Streams[0]
	if s.Accepted != 900 || s.Dropped == 0 || s.Dropped+s.Held != 900 || s.Held < 100 {
		t.Errorf("%+v", s)
	}
	b.kill()
	b.start()
	if b.status().Disk.FreeBytes < 10<<20 {
		t.Errorf("%d bytes are free", b.status().Disk.FreeBytes)
	}
	if ok, why := b.ready(); !ok {
		t.Error(why)
	}
	b.stop()
}

// G2, G3: others fill the disk. An agent that ends with a crash then, or can't start, would take the box's pods and models with
// it; and it has to go on by itself when there is room.
func TestG2G3OthersFillTheDisk(t *testing.T) {
	b := newTestBox(t)
	b.smallDisk(60)
	b.start()
	b.publish("promised")
	others := b.fill()
	if took := b.stop(); took > 15*time.Second { // also fails if it crashed
		t.Errorf("SIGTERM took %s", took)
	}
	for _, end := range []func(){b.kill, func() { b.stop() }} {
		b.start()
		st := b.status()
		if w := strings.Join(st.Warnings, "\n"); !strings.Contains(w, "free some space") || !strings.Contains(w, "full at the start") {
			t.Errorf("warnings: %s", w)
		}
		if o := st.Outbox.Streams[0]; o.Held != 1 {
			t.Errorf("%+v", o)
		}
		if ok, why := b.ready(); ok || !strings.Contains(why, "free some space") {
			t.Errorf("ready %t: %s", ok, why)
		}
		end()
	}
	b.start()
	if err := os.Remove(others); err != nil {
		t.Fatal(err)
	}
	b.publish("with room again")
	if ok, why := b.ready(); !ok {
		t.Error(why)
	}
	if o := b.status().Outbox.Streams[0]; o.Held != 2 {
		t.Errorf("%+v", o)
	}
	b.stop()
	b.start()
	if w := strings.Join(b.status().Warnings, "\n"); strings.Contains(w, "full at the start") {
		t.Error(w)
	}
	b.stop()
}

// Without this, an agent whose state folder somebody removed would say that all is well, and never end.
func TestRemovedStateFolder(t *testing.T) {
	b := newTestBox(t)
	b.start()
	b.publish("one")
	if err := os.RemoveAll(b.state); err != nil {
		t.Fatal(err)
	}
	if ok, why := b.ready(); ok || !strings.Contains(why, "removed") {
		t.Errorf("ready %t: %s", ok, why)
	}
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- b.cmd.Wait() }()
	select {
	case err := <-ended:
		if out := b.cmd.Stderr.(*bytes.Buffer).String(); err == nil || !strings.Contains(out, "are gone") {
			t.Errorf("ended with %v:\n%s", err, out)
		}
	case <-time.After(40 * time.Second):
		_ = b.cmd.Process.Kill()
		<-ended
		t.Error("the agent does not end")
	}
}
