package intake

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/longshore-edge/longshore/sync/inbox"
)

// First bytes of keys; see doc.go.
const (
	keyEpoch    = 'e'
	keyAccount  = 'a'
	keyData     = 'd'
	keyConflict = 'c'
	keyLoss     = 'l'
	keyClock    = 'k'
	keyTime     = 't'
)

var errDamaged = errors.New("stored telemetry is damaged")

// place is an (edge, stream, epoch) as it stands in keys.
type place struct {
	edge, stream string
	ordinal      uint64
}

func edgePrefix(kind byte, edge string) []byte {
	b := append(make([]byte, 0, 128), kind)
	return append(append(b, edge...), 0)
}

func streamPrefix(kind byte, edge, stream string) []byte {
	return append(append(edgePrefix(kind, edge), stream...), 0)
}

func (p place) prefix(kind byte) []byte {
	return binary.BigEndian.AppendUint64(streamPrefix(kind, p.edge, p.stream), p.ordinal)
}

func (p place) key(kind byte, first uint64) []byte {
	return binary.BigEndian.AppendUint64(p.prefix(kind), first)
}

// parseKey reads a key of place and, for all kinds but keyAccount, first.
func parseKey(k []byte) (p place, first uint64, err error) {
	edge, rest, ok := bytes.Cut(k[1:], []byte{0})
	stream, rest, ok2 := bytes.Cut(rest, []byte{0})
	if !ok || !ok2 || len(rest) < 8 {
		return p, 0, errDamaged
	}
	p = place{string(edge), string(stream), binary.BigEndian.Uint64(rest)}
	if len(rest) >= 16 {
		first = binary.BigEndian.Uint64(rest[8:])
	}
	return p, first, nil
}

// timeKey names a transaction by time, number and the bytes it stored.
func timeKey(ns int64, number uint64, size int64) []byte {
	b := binary.BigEndian.AppendUint64([]byte{keyTime}, uint64(ns))
	b = binary.BigEndian.AppendUint64(b, number)
	return binary.BigEndian.AppendUint64(b, uint64(size))
}

func parseTimeKey(k []byte) (ns, size int64, err error) {
	if len(k) != 25 {
		return 0, 0, errDamaged
	}
	return int64(binary.BigEndian.Uint64(k[1:])), int64(binary.BigEndian.Uint64(k[17:])), nil
}

// data is the value of a frame's key.
type data struct {
	epoch      [16]byte
	historical bool
	// monotonic and wall times of the records: from, to
	mono, wall [2]int64
	frame      []byte
}

const dataVersion = 1

func (d data) encode() []byte {
	b := make([]byte, 0, 64+len(d.frame))
	b = append(b, dataVersion, 0)
	if d.historical {
		b[1] = 1
	}
	b = append(b, d.epoch[:]...)
	for _, v := range []int64{d.mono[0], d.mono[1], d.wall[0], d.wall[1]} {
		b = binary.AppendVarint(b, v)
	}
	return append(b, d.frame...)
}

// decodeData reads what encode wrote; frame is a part of b.
func decodeData(b []byte) (d data, err error) {
	if len(b) < 18 || b[0] != dataVersion {
		return d, errDamaged
	}
	d.historical = b[1] == 1
	d.epoch = [16]byte(b[2:18])
	b = b[18:]
	for _, v := range []*int64{&d.mono[0], &d.mono[1], &d.wall[0], &d.wall[1]} {
		n := 0
		if *v, n = binary.Varint(b); n <= 0 {
			return d, errDamaged
		}
		b = b[n:]
	}
	d.frame = b
	return d, nil
}

// accountID names an account of one edge.
type accountID struct {
	epoch  [16]byte
	stream string
}

// account is the books of one stream of one epoch, with where they stand.
type account struct {
	place
	epoch [16]byte
	*inbox.Account
	// conflicts is how many conflicting frames were kept since the account was loaded.
	conflicts int
}

func (a *account) clone() *account {
	c := *a
	c.Account = a.Clone()
	return &c
}

func (a *account) encode() ([]byte, error) {
	b, err := a.MarshalBinary()
	return append(a.epoch[:len(a.epoch):len(a.epoch)], b...), err
}

func decodeAccount(b []byte) (*inbox.Account, error) {
	if len(b) < 16 {
		return nil, errDamaged
	}
	a := new(inbox.Account)
	if err := a.UnmarshalBinary(b[16:]); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	return a, nil
}
