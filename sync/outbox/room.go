package outbox

import (
	"errors"
	"fmt"
	"syscall"
)

// ErrDiskLow is ErrFull because of Config.Reserve.
var ErrDiskLow = fmt.Errorf("%w: the disk is nearly full, free some space", ErrFull)

// scale fits the reserve to the size of the disk.
func (l *Log) scale() error {
	if l.cfg.Reserve == 0 {
		return nil
	}
	_, size, err := l.disk.Free(l.dir)
	if err != nil {
		return fmt.Errorf("ask for the free space of %s: %w", l.dir, err)
	}
	l.cfg.Reserve = min(l.cfg.Reserve, max(size/4, l.cfg.Reserve/4))
	return nil
}

// low says whether n bytes more would leave less than keep bytes free.
func (l *Log) low(n, keep int64) (bool, error) {
	if l.cfg.Reserve == 0 {
		return false, nil
	}
	free, _, err := l.disk.Free(l.dir)
	if err != nil {
		return false, fmt.Errorf("ask for the free space of %s: %w", l.dir, err)
	}
	return free-n < keep, nil
}

// floor is the part of the reserve that not even a stream with nothing left to drop may use.
func (l *Log) floor() int64 { return l.cfg.Reserve / 4 * 3 }

// keepReserve drops the oldest segments of the stream as long as n bytes more would eat into the reserve. A stream with nothing
// left to drop may use a little of it, so that telemetry still flows past a disk that others have filled. Callers hold io.
func (l *Log) keepReserve(w *writer, n int64) error {
	for {
		low, err := l.low(n, l.cfg.Reserve)
		if err != nil || !low {
			return err
		}
		dropped, err := l.dropOldest(w)
		if err != nil {
			return fmt.Errorf("make room for stream %q: %w", w.stream, err)
		}
		if !dropped {
			break
		}
	}
	low, err := l.low(n, l.floor())
	if low {
		return fmt.Errorf("%w: %d MiB are kept free", syscall.ENOSPC, l.floor()>>20)
	}
	return err
}

// dropOldest drops the oldest segment of a stream with policy DropOldest, but not a small one that is still written to. Callers
// hold io.
func (l *Log) dropOldest(w *writer) (dropped bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.quota.Policy == Refuse {
		return false, nil
	}
	for _, t := range l.tracksOf(w.stream) {
		if len(t.segs) > 0 && (t.segs[0] != w.seg || w.seg.bytes >= idleSegment) {
			before := len(t.segs)
			err := l.drop(w, t, reasonBytes)
			return len(t.segs) < before, err
		}
	}
	return false, nil
}

// full says whether an error is that of a full disk.
func full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// Failing returns why the newest append failed because of the disk, nil once the disk takes records again.
func (l *Log) Failing() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failing
}

// settle notes how an append ended.
func (l *Log) settle(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !errors.Is(err, ErrClosed) {
		l.failing = err
	}
}

// recovered forgets a failure if the disk takes the state file again. Callers hold Log.mu.
func (l *Log) recovered() {
	if low, err := l.low(0, l.floor()); l.failing != nil && err == nil && !low && l.save() == nil {
		l.failing = nil
	}
}
