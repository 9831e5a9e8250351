package broker

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// A peer so slow that not even one piece of a message gets through within the stall timeout is alive as long as it
// takes bytes: a field device on a bad day must get its update.
func TestWriteLivesOnProgress(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	var stats counters
	w := newWire(near, 200*time.Millisecond, &stats)
	read := make(chan int64, 1)
	go func() {
		pace := time.NewTicker(20 * time.Millisecond)
		defer pace.Stop()
		var n int64
		for range pace.C {
			m, err := io.CopyN(io.Discard, far, 512)
			if n += m; err != nil {
				read <- n
				return
			}
		}
	}()
	const size = writeChunk + 1000 // some 700 ms
	n, err := w.Write(make([]byte, size))
	if err != nil || n != size || stats.stalled.Load() != 0 {
		t.Errorf("wrote %d of %d bytes, stalled %d: %v", n, size, stats.stalled.Load(), err)
	}
	_ = w.Close()
	if got := <-read; got != size {
		t.Errorf("peer read %d bytes", got)
	}
}

// A peer that takes nothing must be given up, and the connection closed: half a packet can't be taken back.
func TestWriteWithoutProgressCloses(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	var stats counters
	w := newWire(near, 50*time.Millisecond, &stats)
	if _, err := w.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) || stats.stalled.Load() != 1 {
		t.Errorf("stalled %d: %v", stats.stalled.Load(), err)
	}
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("connection still open: %v", err)
	}
}
