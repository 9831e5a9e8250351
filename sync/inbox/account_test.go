package inbox

import (
	"errors"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/longshore-edge/longshore/sync/seqset"
)

// model is the books kept the dumb way: one entry for each sequence.
type model struct {
	delivered, ledgered map[uint64]bool
	next                uint64
	resent              uint64
}

// G3: if the books differ from one entry per record, a record is lost in silence or counted twice.
func TestG3AccountMatchesMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := new(Account)
		m := model{delivered: map[uint64]bool{}, ledgered: map[uint64]bool{}, next: 1}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			first := rapid.Uint64Range(1, 50).Draw(t, "first")
			last := first + rapid.Uint64Range(0, 10).Draw(t, "length")
			fresh := func(into map[uint64]bool) (n uint64) {
				for s := first; s <= last; s++ {
					if !m.delivered[s] && !m.ledgered[s] {
						into[s] = true
						n++
					}
				}
				return n
			}
			var got []seqset.Range
			var want uint64
			var err error
			switch rapid.SampledFrom([]string{"book", "lose", "state", "store"}).Draw(t, "step") {
			case "book":
				want = fresh(m.delivered)
				m.resent += last - first + 1 - want
				got, err = a.Book(first, last)
			case "lose":
				want = fresh(m.ledgered)
				got, err = a.Lose(first, last)
			case "state":
				a.State(first, last)
				m.next = max(m.next, last)
			case "store":
				b, _ := a.MarshalBinary()
				a = new(Account)
				err = a.UnmarshalBinary(b)
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range got {
				want -= r.Len()
			}
			if want != 0 {
				t.Fatalf("booked %v, off by %d", got, want)
			}
			m.compare(t, a)
		}
	})
}

func (m *model) compare(t *rapid.T, a *Account) {
	var top, mark uint64 = 0, 1
	for m.delivered[mark] || m.ledgered[mark] {
		mark++
	}
	for s := range m.delivered {
		top = max(top, s)
	}
	for s := range m.ledgered {
		top = max(top, s)
	}
	if a.Delivered() != uint64(len(m.delivered)) || a.Ledgered() != uint64(len(m.ledgered)) || a.Resent() != m.resent || a.Duplicates() != 0 {
		t.Fatalf("delivered %d ledgered %d resent %d duplicates %d, want %d %d %d 0", a.Delivered(), a.Ledgered(), a.Resent(), a.Duplicates(),
			len(m.delivered), len(m.ledgered), m.resent)
	}
	if a.Accepted() < top || a.Accepted() < m.next-1 || a.Accepted() < a.Delivered()+a.Ledgered() {
		t.Fatalf("accepted %d, seen up to %d, next %d", a.Accepted(), top, m.next)
	}
	ack := a.Ack("s")
	covered := ack.GetWatermark() - 1
	for _, r := range ack.GetAbove() {
		covered += r.GetLast() - r.GetFirst() + 1
		if r.GetFirst() <= ack.GetWatermark() {
			t.Fatalf("range %v is not above the watermark %d", r, ack.GetWatermark())
		}
	}
	if ack.GetWatermark() != mark || covered != a.Delivered()+a.Ledgered() {
		t.Fatalf("ack %v covers %d, want watermark %d", ack, covered, mark)
	}
}

// G4: an edge that leaves a gap after every record must not grow its account without bound; filling gaps still works.
func TestG4ScatteredSequencesAreRefused(t *testing.T) {
	var a Account
	var err error
	n := uint64(0)
	for err == nil && n < 3*MaxRanges {
		n++
		_, err = a.Book(2*n, 2*n)
	}
	if !errors.Is(err, ErrScattered) || n != MaxRanges+1 {
		t.Fatalf("after %d scattered records: %v", n, err)
	}
	if _, err := a.Book(3, 3); err != nil {
		t.Fatalf("filling a gap: %v", err)
	}
	if got := len(a.Ack("s").GetAbove()); got != MaxAckRanges {
		t.Errorf("ack names %d ranges", got)
	}

	var b Account
	for n = 1; n < 10*MaxRanges; n += 2 {
		if _, err = b.Book(n, n); err != nil {
			break
		}
		if _, err = b.Lose(n+1, n+1); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrScattered) {
		t.Errorf("alternating delivered and lost %d times: %v", n, err)
	}
}

// Sequences from a hostile edge must not wrap around the books.
func TestAbsurdRangesAreRefused(t *testing.T) {
	var a Account
	for _, r := range [][2]uint64{{0, 1}, {2, 1}, {1, 1<<64 - 1}, {1 << 63, 1 << 63}} {
		if _, err := a.Book(r[0], r[1]); err == nil {
			t.Errorf("Book(%d, %d) succeeded", r[0], r[1])
		}
		if _, err := a.Lose(r[0], r[1]); err == nil {
			t.Errorf("Lose(%d, %d) succeeded", r[0], r[1])
		}
		a.State(1<<63, 1<<63)
	}
	if a.Accepted() != 0 {
		t.Errorf("accepted %d", a.Accepted())
	}
}

// A damaged store must be an error, never an account that claims records it does not hold.
func FuzzAccount(f *testing.F) {
	var a Account
	_, _ = a.Book(1, 5)
	_, _ = a.Lose(8, 9)
	b, _ := a.MarshalBinary()
	f.Add(b)
	f.Add([]byte{1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0})
	f.Add([]byte{1, 1, 1, 48, 1, 48, 48, 0, 0, 0, 0, 0}) // 48 is both delivered and ledgered
	f.Fuzz(func(t *testing.T, b []byte) {
		var a Account
		if a.UnmarshalBinary(b) != nil {
			return
		}
		if a.Accepted() < a.Delivered()+a.Ledgered() {
			t.Fatalf("accepted %d < %d + %d", a.Accepted(), a.Delivered(), a.Ledgered())
		}
		stored, err := a.MarshalBinary()
		var again Account
		if err == nil {
			err = again.UnmarshalBinary(stored)
		}
		if err != nil || !reflect.DeepEqual(again, a) {
			t.Fatalf("%+v is read again as %+v, %v", a, again, err)
		}
	})
}
