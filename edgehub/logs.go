package main

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
)

// logKeep bounds what is kept of the newest log lines for a support bundle, in bytes.
const logKeep = 256 << 10

// logRing keeps the newest lines written to it. Safe for concurrent use.
type logRing struct {
	mu  sync.Mutex
	buf []byte // guarded by mu; whole lines
}

// Write implements io.Writer. Each call is one or more whole lines, as slog's handlers write them.
func (r *logRing) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.buf = append(r.buf, p...)
	if over := len(r.buf) - logKeep; over > 0 {
		// Half goes at once, so that this copying is rare.
		if cut := bytes.IndexByte(r.buf[max(over, logKeep/2):], '\n'); cut >= 0 {
			r.buf = append(r.buf[:0], r.buf[max(over, logKeep/2)+cut+1:]...)
		} else {
			r.buf = r.buf[:0]
		}
	}
	return len(p), nil
}

// Bytes returns a copy of the lines kept.
func (r *logRing) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.buf)
}

// newLogger writes to w; the configuration is valid.
func newLogger(c LogConfig, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
