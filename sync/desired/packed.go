package desired

import (
	"fmt"
	"slices"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// Packed is an object with its body compressed, for those who keep many. The zero value holds none.
type Packed struct {
	Ref
	Digest Digest
	// Size of the body, in bytes.
	Size int

	encoding longshorepb.Encoding
	data     []byte
}

// Pack compresses the object's body where that saves something.
func (o Object) Pack() Packed {
	encoding, data := encode(o.Body)
	return Packed{Ref: o.Ref, Digest: o.Digest, Size: len(o.Body), encoding: encoding, data: slices.Clone(data)}
}

// Holds reports whether there is an object.
func (p *Packed) Holds() bool { return p.data != nil }

// Open returns the object as it was.
func (p *Packed) Open() Object {
	body, err := decode(p.encoding, p.data, uint64(p.Size))
	if err != nil {
		panic(fmt.Sprintf("open %s: %v", p.Ref, err)) // it was made here
	}
	return Object{Ref: p.Ref, Digest: p.Digest, Body: body}
}

// Entry returns the list entry that names the object.
func (p *Packed) Entry() *longshorepb.Entry { return p.entry(p.Digest, p.Size) }
