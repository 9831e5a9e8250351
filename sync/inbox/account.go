package inbox

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/seqset"
)

const (
	// MaxRanges bounds the separate ranges of sequences one account holds, so that an edge that sends every other record
	// costs little.
	MaxRanges = 4096
	// MaxAckRanges bounds the ranges above the watermark that one acknowledgement names.
	MaxAckRanges = 64
)

// ErrScattered says that booking would leave more than MaxRanges separate ranges.
var ErrScattered = errors.New("too many gaps between sequences")

// Account is the books of one (edge, epoch, stream): which sequences were delivered, and which the edge ledgered as
// lost; no sequence is both. The zero value is an account in which nothing happened. Not safe for concurrent use.
type Account struct {
	delivered, ledgered seqset.Set
	// held is the union of both.
	held seqset.Set
	// next is the highest "next sequence to be written" that the edge stated, low the highest "oldest held".
	next, low uint64
	// stored counts the records written to the sink; more than delivered means duplicates.
	stored uint64
	// resent counts records received again and not booked, conflicts those that came again with other content.
	resent, conflicts uint64
}

// Book notes [first, last] as delivered and returns the parts that were not held before: exactly those are to be
// stored. The rest is counted as resent. It fails with ErrScattered, and on sequences outside 1 to seqset.Max, without
// a change.
func (a *Account) Book(first, last uint64) ([]seqset.Range, error) {
	if err := a.check(first, last); err != nil {
		return nil, err
	}
	fresh := a.held.Add(first, last)
	total := last - first + 1
	for _, r := range fresh {
		a.delivered.Add(r.First, r.Last)
		a.stored += r.Len()
		total -= r.Len()
	}
	a.resent += total
	return fresh, nil
}

// Lose notes that the edge lost [first, last] and returns the parts that were neither delivered nor ledgered before:
// exactly those enter the ledger. It fails as Book does.
func (a *Account) Lose(first, last uint64) ([]seqset.Range, error) {
	if err := a.check(first, last); err != nil {
		return nil, err
	}
	fresh := a.held.Add(first, last)
	for _, r := range fresh {
		a.ledgered.Add(r.First, r.Last)
	}
	return fresh, nil
}

func (a *Account) check(first, last uint64) error {
	if first == 0 || first > last || last > seqset.Max {
		return fmt.Errorf("sequences %d to %d are no range", first, last)
	}
	if a.held.Contains(first, last) {
		return nil
	}
	// Filling a gap stays possible when nothing else is; only an edge that alternates delivered and lost meets the second bound.
	opens := a.held.Len() >= MaxRanges && !a.held.Touches(max(first, 2)-1, min(last, seqset.Max-1)+1)
	if opens || a.delivered.Len()+a.ledgered.Len() >= 4*MaxRanges {
		return ErrScattered
	}
	return nil
}

// State notes what the edge says of the stream: the oldest sequence it still holds and the next it will write; 0 means
// not said. Absurd values are ignored.
func (a *Account) State(low, next uint64) {
	if low <= seqset.Max {
		a.low = max(a.low, low)
	}
	if next <= seqset.Max {
		a.next = max(a.next, next)
	}
}

// Conflict counts n records that came again under the same identity with other content.
func (a *Account) Conflict(n uint64) { a.conflicts += n }

// Holds says whether the whole of [first, last] is delivered or ledgered.
func (a *Account) Holds(first, last uint64) bool { return a.held.Contains(first, last) }

// Accepted is how many records the edge accepted, as far as is known here.
func (a *Account) Accepted() uint64 {
	return max(a.next, a.low, a.held.Last()+1, 1) - 1
}

// Delivered is how many records the sink holds or held.
func (a *Account) Delivered() uint64 { return a.delivered.Count() }

// Ledgered is how many records the edge lost, by its ledger.
func (a *Account) Ledgered() uint64 { return a.ledgered.Count() }

// Duplicates is how many records were written to the sink more than once: always 0, or this code is wrong.
func (a *Account) Duplicates() uint64 { return a.stored - a.delivered.Count() }

// Resent is how many records came again and were not booked again.
func (a *Account) Resent() uint64 { return a.resent }

// Conflicts is how many records came again with other content.
func (a *Account) Conflicts() uint64 { return a.conflicts }

// Ack is what the edge may forget: the watermark and at most MaxAckRanges ranges above it.
func (a *Account) Ack(stream string) *longshorepb.StreamAck {
	ack := &longshorepb.StreamAck{Stream: stream, Watermark: a.held.Watermark()}
	for _, r := range a.held.Ranges() {
		if r.First > ack.Watermark && len(ack.Above) < MaxAckRanges {
			ack.Above = append(ack.Above, &longshorepb.Range{First: r.First, Last: r.Last})
		}
	}
	return ack
}

// Clone returns an independent copy.
func (a *Account) Clone() *Account {
	c := *a
	c.delivered, c.ledgered, c.held = a.delivered.Clone(), a.ledgered.Clone(), a.held.Clone()
	return &c
}

// accountVersion is the first byte of an encoded account.
const accountVersion = 1

// MarshalBinary encodes a for storage. The error is always nil.
func (a *Account) MarshalBinary() ([]byte, error) {
	b := []byte{accountVersion}
	b = a.delivered.AppendBinary(b)
	b = a.ledgered.AppendBinary(b)
	for _, v := range []uint64{a.next, a.low, a.stored, a.resent, a.conflicts} {
		b = binary.AppendUvarint(b, v)
	}
	return b, nil
}

// UnmarshalBinary reads what MarshalBinary wrote.
func (a *Account) UnmarshalBinary(b []byte) (err error) {
	if len(b) == 0 || b[0] != accountVersion {
		return errors.New("account is of an unknown version")
	}
	var n Account
	if n.delivered, b, err = seqset.Decode(b[1:]); err != nil {
		return fmt.Errorf("delivered: %w", err)
	}
	if n.ledgered, b, err = seqset.Decode(b); err != nil {
		return fmt.Errorf("ledgered: %w", err)
	}
	for _, v := range []*uint64{&n.next, &n.low, &n.stored, &n.resent, &n.conflicts} {
		size := 0
		if *v, size = binary.Uvarint(b); size <= 0 {
			return errors.New("account is cut short")
		}
		b = b[size:]
	}
	if n.stored < n.delivered.Count() {
		return errors.New("account delivered more records than it stored")
	}
	n.held = n.delivered.Clone()
	for _, r := range n.ledgered.Ranges() {
		if n.held.Touches(r.First, r.Last) {
			return errors.New("account has sequences both delivered and ledgered")
		}
		n.held.Add(r.First, r.Last)
	}
	*a = n
	return nil
}
