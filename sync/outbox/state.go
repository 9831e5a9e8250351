package outbox

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/longshore-edge/longshore/sync/seqset"
)

// state is the state file: a line with the CRC32C of the rest, then JSON.
type state struct {
	Version int `json:"version"`
	// Boot in which the state was written; Base turns its CLOCK_BOOTTIME into log time; Clock is the last log time known.
	Boot  string `json:"boot"`
	Base  int64  `json:"base"`
	Clock int64  `json:"clock"`
	// Totals of epochs that are gone.
	Totals map[string]total `json:"totals,omitempty"`
	Epochs []epochState     `json:"epochs"`
}

type total struct {
	Accepted uint64 `json:"accepted"`
	Acked    uint64 `json:"acked"`
	Dropped  uint64 `json:"dropped"`
}

type epochState struct {
	ID     string       `json:"id"`
	Tracks []trackState `json:"streams,omitempty"`
}

type trackState struct {
	Stream string `json:"stream"`
	// Next is a lower bound where the epoch was not closed.
	Next    uint64  `json:"next"`
	Acked   uint64  `json:"acked"`
	Dropped uint64  `json:"dropped"`
	Done    string  `json:"done"` // base64 of the encoded set
	Losses  []*loss `json:"losses,omitempty"`
}

const (
	stateVersion = 1
	maxState     = 64 << 20
)

var errNoState = errors.New("no state")

// save makes what is known of the epochs durable. Callers hold Log.mu.
func (l *Log) save() error {
	st := state{Version: stateVersion, Boot: l.clock.Boot(), Base: l.base, Clock: l.now(), Totals: l.totals}
	for _, e := range l.epochs {
		es := epochState{ID: hex.EncodeToString(e.id[:])}
		for _, name := range slices.Sorted(maps.Keys(e.tracks)) {
			t := e.tracks[name]
			es.Tracks = append(es.Tracks, trackState{
				Stream: name, Next: t.next, Acked: t.acked, Dropped: t.dropped, Losses: t.losses,
				Done: base64.StdEncoding.EncodeToString(t.done.AppendBinary(nil)),
			})
		}
		st.Epochs = append(st.Epochs, es)
	}
	body, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode outbox state: %w", err)
	}
	line := fmt.Appendf(nil, "%08x\n", crc32.Checksum(body, castagnoli))
	if err := replaceFile(l.disk, filepath.Join(l.dir, "state"), append(line, body...)); err != nil {
		return fmt.Errorf("write outbox state: %w", err)
	}
	l.dirty = false
	return nil
}

// loadState reads the state file. It fails with errNoState if there is none.
func (l *Log) loadState() (*state, error) {
	b, err := readFile(l.disk, filepath.Join(l.dir, "state"), maxState)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoState
	}
	if err != nil {
		return nil, fmt.Errorf("read outbox state: %w", err)
	}
	sum, body, _ := strings.Cut(string(b), "\n")
	if sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(body), castagnoli)) {
		return nil, errDamaged
	}
	st := new(state)
	if err := json.Unmarshal([]byte(body), st); err != nil {
		return nil, errDamaged
	}
	if st.Version != stateVersion {
		return nil, fmt.Errorf("outbox state has version %d, this build reads %d: use the build that wrote it", st.Version, stateVersion)
	}
	return st, nil
}

var errDamaged = errors.New("the outbox state file is damaged")

func (es epochState) restore() (*epoch, error) {
	e := &epoch{tracks: map[string]*track{}}
	id, err := parseEpoch(es.ID)
	if err != nil {
		return nil, err
	}
	e.id = id
	for _, ts := range es.Tracks {
		b, err := base64.StdEncoding.DecodeString(ts.Done)
		if err != nil {
			return nil, errDamaged
		}
		done, _, err := seqset.Decode(b)
		if err != nil {
			return nil, errDamaged
		}
		e.tracks[ts.Stream] = &track{
			epoch: e, stream: ts.Stream, next: max(ts.Next, 1), done: done, acked: ts.Acked, dropped: ts.Dropped, losses: ts.Losses,
		}
	}
	return e, nil
}

func parseEpoch(s string) (id [16]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%q is no epoch", s)
	}
	return [16]byte(b), nil
}
