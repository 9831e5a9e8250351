package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/edgehub/worker/internal/engine"
)

// The limit is on resident memory, which is what a small machine runs out of. The kernel has no such limit for one
// process, so the worker looks itself, and the agent beside it. Between two looks an allocation may be larger than the
// machine: therefore private writable memory (RLIMIT_DATA) is limited as well, with room for what is reserved and never
// touched. ONNX Runtime turns a refused allocation into an error, so that such a request fails and the worker lives.
const (
	memoryInterval = 100 * time.Millisecond
	dataFactor     = 2
	dataSlack      = 256 << 20
)

// limitMemory sets the limits of the process; limit is in bytes.
func limitMemory(limit int64) error {
	debug.SetMemoryLimit(limit / 2)
	data := uint64(limit)*dataFactor + dataSlack
	if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: data, Max: data}); err != nil {
		return fmt.Errorf("limit memory: %w", err)
	}
	return nil
}

// watchMemory returns an engine.ErrOutOfMemory as soon as the process is larger than limit bytes, or nil when ctx ends.
func watchMemory(ctx context.Context, limit int64) error {
	tick := time.NewTicker(memoryInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		resident, err := residentMemory()
		if err != nil {
			return err
		}
		if resident > limit {
			return fmt.Errorf("%w: the worker uses %d MiB, its limit is %d MiB", engine.ErrOutOfMemory, resident>>20, limit>>20)
		}
	}
}

// residentMemory of this process in bytes: the second field of /proc/self/statm, in pages.
func residentMemory() (int64, error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, fmt.Errorf("read memory use: %w", err)
	}
	fields := bytes.Fields(text)
	if len(fields) < 2 {
		return 0, errors.New("read memory use: /proc/self/statm is malformed")
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read memory use: %w", err)
	}
	return pages * int64(os.Getpagesize()), nil
}
