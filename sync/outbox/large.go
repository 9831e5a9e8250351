package outbox

import (
	"errors"
	"fmt"
)

// ErrTooLarge is the verdict on a record that no append will ever store: its payload is above Config.MaxRecord, its topic too long,
// or it takes more than half of its stream's quota.
var ErrTooLarge = errors.New("record is too large")

// maxLargeLosses bounds the ledger entries of one stream up to which records that are too large get more: a producer must not be
// able to fill the disk with what is said about its records.
const maxLargeLosses = 256

// LoseTooLarge accepts n records of a stream only to ledger them, durably, as lost with the reason TooLarge. It is for producers that
// cannot be told that a record was refused, and would send it again for ever: so they are answered as if it was accepted, and
// what they believe accepted is still what is delivered and what is ledgered. An error means that nothing was ledgered.
func (l *Log) LoseTooLarge(stream string, n int) error {
	w, err := l.writer(stream)
	if err != nil {
		return fmt.Errorf("ledger records of stream %q: %w", stream, err)
	}
	w.io.Lock()
	defer w.io.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return ErrClosed
	}
	t := l.track(stream)
	if len(t.losses) >= maxLargeLosses {
		return fmt.Errorf("ledger records of stream %q: %d entries wait for the cloud already", stream, len(t.losses))
	}
	first := t.next
	t.next += uint64(n)
	if _, err := l.ledger(t, first, t.next-1, reasonTooLarge); err != nil {
		t.next = first
		return fmt.Errorf("ledger records of stream %q: %w", stream, err)
	}
	return nil
}
