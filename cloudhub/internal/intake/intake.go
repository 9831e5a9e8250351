package intake

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"
	compression "github.com/dgraph-io/badger/v4/options"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/durable"
	"github.com/longshore-edge/longshore/sync/frame"
	"github.com/longshore-edge/longshore/sync/space"
)

// Config of the embedded store.
type Config struct {
	Logger *slog.Logger
	Dir    string
	// Retention of records by age since they came (30 days) and bytes as stored (4 GiB); the accounting is kept. The files may
	// be larger by what is deleted and not yet compacted.
	MaxAge   time.Duration
	MaxBytes int64
	// PendingBytes bounds telemetry received and not yet committed, over all edges (32 MiB); past it edges are slowed. One edge
	// may have an eighth of it.
	PendingBytes int64
	// MinFreeBytes of disk space below which nothing is taken in (256 MiB).
	MinFreeBytes int64
}

// ErrBusy says that a message was dropped because too much waits to be committed; the edge sends it again.
var ErrBusy = errors.New("too much telemetry waits to be stored")

// ErrClosed says that the store is closed.
var ErrClosed = errors.New("telemetry store is closed")

const (
	// groupBytes and groupUnits bound what one transaction holds, which Badger bounds at 15% of memTable; shareBytes bounds what
	// an edge adds to it in one turn.
	groupBytes = 512 << 10
	groupUnits = 1000
	shareBytes = 128 << 10
	// memTable is what Badger gathers before it writes a table.
	memTable = 4 << 20
	// blockSize is that of the tables: smaller blocks than frames cost compaction three times its memory.
	blockSize = 64 << 10
	// minTable and maxTable bound tables in bytes. Compaction holds some 13 at a time in memory.
	minTable = 1 << 20
	maxTable = 8 << 20
	// maxTables are about as many as a store may have: each is a mapping and an open file.
	maxTables = 4096
	// retryFirst and retryMax are the pauses after a commit that failed.
	retryFirst = 500 * time.Millisecond
	retryMax   = 30 * time.Second
	// retainEvery is the time between two looks at retention.
	retainEvery = time.Minute
)

// Intake is the cloud side of telemetry with the embedded Badger sink. Safe for concurrent use.
type Intake struct {
	cfg     Config
	db      *badger.DB
	encoder *frame.Encoder
	decoder *frame.Decoder
	// kick is a 1-slot signal: something is queued.
	kick chan struct{}

	// life is held for reading while the store is used, for writing to close it.
	life   sync.RWMutex
	closed bool

	// mu guards what follows and the fields of edges and sessions that say so.
	mu    sync.Mutex
	edges map[string]*edge
	// busy are the edges with something queued, in the order of their turns.
	busy []*edge
	// pending bytes over all edges.
	pending int64
	// blocked is why the newest commit failed, nil if it did not.
	blocked error

	// Only Run uses what follows.
	stored  int64 // bytes of records in the store
	freed   int64 // bytes deleted since the last compaction
	counter uint64
}

// edge is what is known of an edge that is connected or has something queued.
type edge struct {
	name string
	// Guarded by Intake.mu.
	sessions map[*Session]bool
	queue    []*unit
	queued   int64
	// accounts as committed; never changed, only replaced.
	accounts map[accountID]*account

	// Only Run uses what follows.
	ordinals map[[16]byte]uint64
	clocks   map[string]clockState
}

// Open opens the store; errors say what to do. It starts no goroutine of its own; Badger's run until Run or Close ends.
func Open(cfg Config) (*Intake, error) {
	for _, d := range []struct {
		v        *int64
		standard int64
	}{{(*int64)(&cfg.MaxAge), int64(30 * 24 * time.Hour)}, {&cfg.MaxBytes, 4 << 30}, {&cfg.PendingBytes, 32 << 20}, {&cfg.MinFreeBytes, 256 << 20}} {
		if *d.v == 0 {
			*d.v = d.standard
		}
		if *d.v < 0 {
			return nil, errors.New("open telemetry store: retention and bounds must not be negative")
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	i := &Intake{cfg: cfg, kick: make(chan struct{}, 1), edges: map[string]*edge{}}
	var err error
	if i.encoder, err = frame.NewEncoder(); err != nil {
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	if err := durable.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open telemetry store: %w (choose a data folder that this user may write to)", err)
	}
	if err := durable.RepairBadger(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open telemetry store: %w", err)
	}
	if i.db, err = badger.Open(options(cfg)); err != nil {
		return nil, openError(cfg.Dir, err)
	}
	if i.decoder, err = frame.NewDecoder(); err == nil {
		err = i.measure()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open telemetry store: %w", err), i.Close())
	}
	return i, nil
}

// options of Badger, for little memory: all tables have one size, and few are built at a time.
func options(cfg Config) badger.Options {
	// Frames are compressed already, so Badger does not; then it needs no block cache. All values stand in the tables, none in
	// the value log: what retention deletes there would come back to the disk only after the tables have been compacted too.
	o := badger.DefaultOptions(cfg.Dir).WithLogger(badgerLog{cfg.Logger}).WithSyncWrites(true).WithDetectConflicts(false).
		WithMemTableSize(memTable).WithNumMemtables(1).WithNumLevelZeroTables(2).WithNumLevelZeroTablesStall(6).WithNumCompactors(2).
		WithBaseTableSize(min(max(cfg.MaxBytes/maxTables, minTable), maxTable)).WithBlockSize(blockSize).
		WithValueThreshold(512 << 10).WithValueLogFileSize(1 << 20).WithCompression(compression.None).WithBlockCacheSize(0).
		WithIndexCacheSize(16 << 20).WithMetricsEnabled(false)
	o.TableSizeMultiplier = 1
	return o
}

func openError(dir string, err error) error {
	switch {
	case strings.Contains(err.Error(), "Cannot acquire directory lock"):
		return fmt.Errorf("open telemetry store: %s is in use by another cloud hub: stop it, or give this one a data folder of its own", dir)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("open telemetry store: %w (run as the user that owns %s)", err, dir)
	}
	return fmt.Errorf("open telemetry store: %w (if %s is damaged, move it away: the hub starts an empty store, edges send again what they still hold)", err, dir)
}

// Run commits what Receive queued, until ctx ends; then commits what is left and closes the store.
func (i *Intake) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, i.Close()) }()
	tick := time.NewTicker(retainEvery)
	defer tick.Stop()
	i.retainAndLog(ctx)
	for {
		select {
		case <-ctx.Done():
			return i.flush()
		case <-tick.C:
			i.retainAndLog(ctx)
		case <-i.kick:
			if err := i.commitQueued(ctx); err != nil {
				return i.flush()
			}
		}
	}
}

// commitQueued commits group after group until nothing is queued. A group that fails is tried again; it fails only when
// ctx ends.
func (i *Intake) commitQueued(ctx context.Context) error {
	for {
		group := i.gather()
		if len(group) == 0 {
			return nil
		}
		pause := retryFirst
		for err := i.commit(group); err != nil; err = i.commit(group) {
			i.setBlocked(err)
			i.cfg.Logger.Error("telemetry can't be stored and is not acknowledged", "err", err, "retry", pause)
			select {
			case <-ctx.Done():
				i.putBack(group)
				return ctx.Err()
			case <-time.After(pause):
			}
			pause = min(2*pause, retryMax)
		}
		i.setBlocked(nil)
		i.mu.Lock()
		for _, u := range group {
			i.pending -= u.cost
		}
		i.mu.Unlock()
		if i.stored > i.cfg.MaxBytes+i.cfg.MaxBytes/16 {
			i.retainAndLog(ctx)
		}
	}
}

func (i *Intake) setBlocked(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.blocked = err
}

// Blocked returns why telemetry cannot be stored now, such as a full disk, with what to do; nil if it can, as far as is known.
// Meanwhile edges keep what they have.
func (i *Intake) Blocked() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.blocked
}

// flush commits what is left, each group once.
func (i *Intake) flush() error {
	for {
		group := i.gather()
		if len(group) == 0 {
			return nil
		}
		if err := i.commit(group); err != nil {
			return fmt.Errorf("store the last telemetry: %w", err)
		}
	}
}

// gather takes the next group from the queues: edges take turns, and a share of the group in each.
func (i *Intake) gather() (group []*unit) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var size int64
	fits := func(e *edge) bool {
		return len(e.queue) > 0 && len(group) < groupUnits && (len(group) == 0 || size+e.queue[0].cost <= groupBytes)
	}
	for len(i.busy) > 0 && fits(i.busy[0]) {
		e := i.busy[0]
		i.busy = i.busy[1:]
		for share := int64(0); share < shareBytes && fits(e); {
			u := e.queue[0]
			e.queue[0] = nil
			e.queue = e.queue[1:]
			e.queued -= u.cost
			group = append(group, u)
			share += u.cost
			size += u.cost
		}
		if len(e.queue) > 0 {
			i.busy = append(i.busy, e)
		}
	}
	return group
}

// putBack returns a group to the front of the queues.
func (i *Intake) putBack(group []*unit) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for n := len(group) - 1; n >= 0; n-- {
		u := group[n]
		if len(u.edge.queue) == 0 {
			i.busy = append(i.busy, u.edge)
		}
		u.edge.queue = append([]*unit{u}, u.edge.queue...)
		u.edge.queued += u.cost
	}
}

// Close closes the store. Run does so itself; Close is for an Intake that never ran.
func (i *Intake) Close() error {
	i.life.Lock()
	defer i.life.Unlock()
	if i.closed {
		return nil
	}
	i.closed = true
	if i.decoder != nil {
		i.decoder.Close()
	}
	if err := i.db.Close(); err != nil {
		return fmt.Errorf("close telemetry store: %w", err)
	}
	return nil
}

// use keeps the store open until done is called.
func (i *Intake) use() (done func(), err error) {
	i.life.RLock()
	if i.closed {
		i.life.RUnlock()
		return nil, ErrClosed
	}
	return i.life.RUnlock, nil
}

// room fails if the disk is nearly full: Badger writes through memory maps and would crash the process on a full one.
func (i *Intake) room() error {
	free, _, err := space.Of(i.cfg.Dir)
	if err != nil {
		return err
	}
	if free < i.cfg.MinFreeBytes {
		return fmt.Errorf("only %d MiB are free below %s, %d are kept in reserve: free space or lower the retention",
			free>>20, i.cfg.Dir, i.cfg.MinFreeBytes>>20)
	}
	return nil
}

// clockState is a stored clock mapping.
type clockState struct {
	offset  int64
	quality longshorepb.ClockQuality
}

func (c clockState) encode() []byte {
	return append(binary.BigEndian.AppendUint64(nil, uint64(c.offset)), byte(c.quality))
}

func decodeClock(b []byte) (c clockState, err error) {
	if len(b) != 9 {
		return c, errors.New("stored clock mapping is damaged")
	}
	return clockState{int64(binary.BigEndian.Uint64(b)), longshorepb.ClockQuality(b[8])}, nil
}

// badgerLog passes Badger's log on: its debug and info lines are for its developers.
type badgerLog struct{ *slog.Logger }

func (l badgerLog) Errorf(format string, a ...any)   { l.Error("badger", "text", badgerText(format, a)) }
func (l badgerLog) Warningf(format string, a ...any) { l.Warn("badger", "text", badgerText(format, a)) }
func (l badgerLog) Infof(format string, a ...any)    { l.Debug("badger", "text", badgerText(format, a)) }
func (l badgerLog) Debugf(format string, a ...any)   { l.Debug("badger", "text", badgerText(format, a)) }

func badgerText(format string, a []any) string {
	return strings.TrimSpace(fmt.Sprintf(format, a...))
}
