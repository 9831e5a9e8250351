package seqset

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A wrong range set acknowledges records that were never stored, or stores them twice: G3 rests on it. The model is a
// map of single numbers.
func TestSetMatchesMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s Set
		model := map[uint64]bool{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			first := rapid.Uint64Range(1, 60).Draw(t, "first")
			last := first + rapid.Uint64Range(0, 12).Draw(t, "length")
			var want []uint64
			all, any := true, false
			for n := first; n <= last; n++ {
				if !model[n] {
					want = append(want, n)
				}
				all, any = all && model[n], any || model[n]
			}
			if s.Contains(first, last) != all || s.Touches(first, last) != any {
				t.Fatalf("Contains or Touches(%d, %d) wrong for %v", first, last, s.r)
			}
			if rapid.Bool().Draw(t, "only look") {
				continue
			}
			var got []uint64
			for _, r := range s.Add(first, last) {
				for n := r.First; n <= r.Last; n++ {
					got = append(got, n)
					model[n] = true
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("Add(%d, %d) = %v, want %v", first, last, got, want)
			}
			mark := uint64(1)
			for model[mark] {
				mark++
			}
			if s.Watermark() != mark || s.Count() != uint64(len(model)) {
				t.Fatalf("watermark %d count %d, want %d %d", s.Watermark(), s.Count(), mark, len(model))
			}
			back, rest, err := Decode(s.AppendBinary(nil))
			if err != nil || len(rest) != 0 || !slices.Equal(back.r, s.r) {
				t.Fatalf("decode gave %v %v %v, want %v", back.r, rest, err, s.r)
			}
		}
	})
}

// A hostile peer's numbers at the edge of 64 bits must not wrap around and mark everything as held.
func TestSetRefusesAbsurdRanges(t *testing.T) {
	var s Set
	for _, r := range []Range{{0, 5}, {5, 4}, {1, 1<<64 - 1}, {1<<64 - 1, 1<<64 - 1}} {
		if added := s.Add(r.First, r.Last); added != nil {
			t.Errorf("Add(%d, %d) added %v", r.First, r.Last, added)
		}
	}
	if s.Count() != 0 {
		t.Errorf("set holds %d numbers", s.Count())
	}
	if s.Add(Max, Max); s.Watermark() != 1 || s.Last() != Max {
		t.Errorf("after Add(Max): %v", s.r)
	}
}

// A damaged store must give an error, not a crash or a set that claims what it does not hold.
func FuzzDecode(f *testing.F) {
	var s Set
	s.Add(1, 10)
	s.Add(20, 20)
	f.Add(s.AppendBinary(nil))
	f.Add([]byte{2, 1, 1, 1, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, rest, err := Decode(b)
		if err != nil {
			return
		}
		again, _, err := Decode(s.AppendBinary(nil))
		if err != nil || !slices.Equal(again.r, s.r) || len(rest) > len(b) {
			t.Fatalf("%v does not survive a round: %v %v", s.r, again.r, err)
		}
	})
}
