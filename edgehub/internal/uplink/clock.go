package uplink

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const (
	clocksKey = "uplink/clocks"
	// maxBoots bounds the boots whose clock is remembered.
	maxBoots = 256
	// clockPause is how often the clock is looked at.
	clockPause = time.Minute
	// clockDrift is the change of a mapping that is worth a write, in nanoseconds.
	clockDrift = int64(time.Second)
	// firstPlausible is 2025-01-01 UTC: a wall clock that reads less was never set.
	firstPlausible = 1735689600
)

// mapping is what is known of one boot's clock. Offset is wall time minus CLOCK_BOOTTIME, in nanoseconds.
type mapping struct {
	Boot    string                   `json:"boot"`
	Offset  int64                    `json:"offset"`
	Quality longshorepb.ClockQuality `json:"quality"`
}

func (m mapping) proto() *longshorepb.Clock {
	return &longshorepb.Clock{BootId: m.Boot, OffsetNs: m.Offset, Quality: m.Quality}
}

// clocks remembers how the monotonic time of each boot maps to wall time, also of boots that are over: records of such a
// boot may still wait for the link. Safe for concurrent use.
type clocks struct {
	store Store
	log   *slog.Logger
	read  func() mapping

	mu    sync.Mutex
	boots []mapping // guarded by mu; oldest first
}

func newClocks(store Store, log *slog.Logger) (*clocks, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read boot id: %w", err)
	}
	id := strings.TrimSpace(string(boot))
	c := &clocks{store: store, log: log, read: func() mapping { return readClock(id) }}
	b, err := store.Get(clocksKey)
	if err != nil {
		return nil, fmt.Errorf("read remembered clocks: %w", err)
	}
	if b != nil {
		if err := json.Unmarshal(b, &c.boots); err != nil {
			log.Warn("remembered clocks are unreadable; records of earlier boots keep the time they were given", "error", err)
		}
	}
	return c, nil
}

// readClock reads this boot's mapping. The quality comes from the kernel: adjtimex(2) says whether something
// disciplines the clock.
func readClock(boot string) mapping {
	m := mapping{Boot: boot, Quality: longshorepb.ClockQuality_CLOCK_QUALITY_PLAUSIBLE}
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &mono); err != nil {
		m.Quality = longshorepb.ClockQuality_CLOCK_QUALITY_UNSET
		return m
	}
	wall := time.Now()
	m.Offset = wall.UnixNano() - mono.Nano()
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	switch {
	case wall.Unix() < firstPlausible:
		m.Quality = longshorepb.ClockQuality_CLOCK_QUALITY_UNSET
	case err == nil && state != unix.TIME_ERROR && tx.Status&unix.STA_UNSYNC == 0:
		m.Quality = longshorepb.ClockQuality_CLOCK_QUALITY_SYNCED
	}
	return m
}

// run keeps this boot's mapping in the store, so that records of this boot get a right time even if they are sent in a
// later one.
func (c *clocks) run(ctx context.Context) error {
	t := time.NewTicker(clockPause)
	defer t.Stop()
	for {
		if err := c.remember(); err != nil {
			c.log.Warn("cannot remember this boot's clock", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// remember writes the mapping down if it differs enough from what stands there. A worse quality never replaces a better one.
func (c *clocks) remember() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.read()
	boots := c.boots
	if n := len(boots); n > 0 && boots[n-1].Boot == now.Boot {
		old := boots[n-1]
		drift := max(now.Offset-old.Offset, old.Offset-now.Offset)
		if now.Quality < old.Quality || now.Quality == old.Quality && drift < clockDrift {
			return nil
		}
		boots = boots[:n-1]
	}
	boots = append(boots[:len(boots):len(boots)], now)
	boots = boots[max(0, len(boots)-maxBoots):]
	b, err := json.Marshal(boots)
	if err != nil {
		return fmt.Errorf("encode clocks: %w", err)
	}
	if err := c.store.Put(clocksKey, b); err != nil {
		return err
	}
	c.boots = boots
	return nil
}

// current reads this boot's mapping.
func (c *clocks) current() *longshorepb.Clock { return c.read().proto() }

// of returns the mappings of boots, of those that are known.
func (c *clocks) of(boots []string) []*longshorepb.Clock {
	var out []*longshorepb.Clock
	for _, b := range boots {
		if now := c.read(); now.Boot == b {
			out = append(out, now.proto())
			continue
		}
		c.mu.Lock()
		for _, m := range c.boots {
			if m.Boot == b {
				out = append(out, m.proto())
			}
		}
		c.mu.Unlock()
	}
	return out
}
