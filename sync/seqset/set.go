package seqset

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"sort"
)

// Max is the largest sequence number a set takes. It leaves room so that no sum of bounds overflows.
const Max = math.MaxInt64

// Range is the sequence numbers [First, Last].
type Range struct {
	First, Last uint64
}

// Len is the number of sequences in r.
func (r Range) Len() uint64 { return r.Last - r.First + 1 }

// Set is a set of sequence numbers from 1 to Max. The zero value is empty. Not safe for concurrent use; methods that
// return ranges return fresh ones.
type Set struct {
	// r is sorted; between two neighbours at least one number is missing.
	r []Range
}

// Add puts [first, last] into the set and returns the parts that were not in it before. A range outside 1 to Max, or
// an empty one, adds nothing.
func (s *Set) Add(first, last uint64) []Range {
	added := s.Missing(first, last)
	if len(added) == 0 {
		return nil
	}
	// i is the first range that touches [first, last], j the first beyond it.
	i := sort.Search(len(s.r), func(i int) bool { return s.r[i].Last+1 >= first })
	j := sort.Search(len(s.r), func(j int) bool { return s.r[j].First > last+1 })
	merged := Range{first, last}
	if i < j {
		merged.First = min(first, s.r[i].First)
		merged.Last = max(last, s.r[j-1].Last)
	}
	s.r = slices.Replace(s.r, i, j, merged)
	return added
}

// Missing returns the parts of [first, last] that are not in the set.
func (s *Set) Missing(first, last uint64) []Range {
	if first == 0 || first > last || last > Max {
		return nil
	}
	var out []Range
	i := sort.Search(len(s.r), func(i int) bool { return s.r[i].Last >= first })
	for ; i < len(s.r) && s.r[i].First <= last; i++ {
		if first < s.r[i].First {
			out = append(out, Range{first, s.r[i].First - 1})
		}
		first = s.r[i].Last + 1
	}
	if first <= last {
		out = append(out, Range{first, last})
	}
	return out
}

// Contains says whether the whole of [first, last] is in the set. An empty range is.
func (s *Set) Contains(first, last uint64) bool {
	if first > last {
		return true
	}
	i := sort.Search(len(s.r), func(i int) bool { return s.r[i].Last >= first })
	return i < len(s.r) && s.r[i].First <= first && last <= s.r[i].Last
}

// Touches says whether any number of [first, last] is in the set.
func (s *Set) Touches(first, last uint64) bool {
	i := sort.Search(len(s.r), func(i int) bool { return s.r[i].Last >= first })
	return first <= last && i < len(s.r) && s.r[i].First <= last
}

// Watermark is the smallest number from 1 that is not in the set: every number below it is.
func (s *Set) Watermark() uint64 {
	if len(s.r) == 0 || s.r[0].First > 1 {
		return 1
	}
	return s.r[0].Last + 1
}

// Count is how many numbers are in the set.
func (s *Set) Count() uint64 {
	var n uint64
	for _, r := range s.r {
		n += r.Len()
	}
	return n
}

// Last is the largest number in the set, 0 if it is empty.
func (s *Set) Last() uint64 {
	if len(s.r) == 0 {
		return 0
	}
	return s.r[len(s.r)-1].Last
}

// Ranges returns the ranges in order, with at least one missing number between neighbours.
func (s *Set) Ranges() []Range { return slices.Clone(s.r) }

// Len is the number of ranges.
func (s *Set) Len() int { return len(s.r) }

// Clone returns an independent copy.
func (s *Set) Clone() Set { return Set{slices.Clone(s.r)} }

// AppendBinary appends the encoding of s to b: the number of ranges, then for each the distance from the last one's
// end and its length, all as uvarints.
func (s *Set) AppendBinary(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(s.r)))
	var end uint64
	for _, r := range s.r {
		b = binary.AppendUvarint(b, r.First-end)
		b = binary.AppendUvarint(b, r.Len())
		end = r.Last
	}
	return b
}

// ErrEncoding says that bytes are not the encoding of a set.
var ErrEncoding = errors.New("not an encoded set of sequences")

// Decode reads a set from the start of b and returns what follows it. It fails with ErrEncoding.
func Decode(b []byte) (Set, []byte, error) {
	n, b, ok := uvarint(b)
	if !ok || n > uint64(len(b))/2 {
		return Set{}, nil, ErrEncoding
	}
	s := Set{make([]Range, 0, n)}
	var end uint64
	for range n {
		var gap, length uint64
		if gap, b, ok = uvarint(b); !ok {
			return Set{}, nil, ErrEncoding
		}
		if length, b, ok = uvarint(b); !ok {
			return Set{}, nil, ErrEncoding
		}
		if gap == 0 || gap > Max || length == 0 || length > Max || end+gap > Max || end+gap+length-1 > Max || end > 0 && gap < 2 {
			return Set{}, nil, ErrEncoding
		}
		first := end + gap
		end = first + length - 1
		s.r = append(s.r, Range{first, end})
	}
	return s, b, nil
}

func uvarint(b []byte) (uint64, []byte, bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}
