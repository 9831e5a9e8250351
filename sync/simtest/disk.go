package simtest

import (
	"errors"
	"fmt"
	"math/rand/v2"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/desired"
)

// disk is an edge's store that can lose power: what was written after the last sync is lost, from some point on.
type disk struct {
	kept    image
	unsaved []desired.EdgeAction
	// now is kept with unsaved applied: what a reader sees while the power is on.
	now image
	// fail makes the next write fail, as a full disk does.
	fail bool
	// reached is the position in the cluster's history that the committed list is known to have reached.
	reached int
}

// image is what stands on a disk.
type image struct {
	session        uint64
	cluster        string
	list, previous *desired.List
	objects        map[desired.Digest]desired.Object
	parts          map[desired.Digest][]desired.SavePart
}

func newDisk() *disk {
	return &disk{
		kept: image{objects: map[desired.Digest]desired.Object{}, parts: map[desired.Digest][]desired.SavePart{}},
		now:  image{objects: map[desired.Digest]desired.Object{}, parts: map[desired.Digest][]desired.SavePart{}},
	}
}

func (i image) clone() image {
	c := i
	c.objects = make(map[desired.Digest]desired.Object, len(i.objects))
	for d, o := range i.objects {
		c.objects[d] = o
	}
	c.parts = make(map[desired.Digest][]desired.SavePart, len(i.parts))
	for d, p := range i.parts {
		c.parts[d] = append([]desired.SavePart(nil), p...)
	}
	return c
}

func (d *disk) clone() *disk {
	return &disk{kept: d.now.clone(), now: d.now.clone(), reached: d.reached}
}

func (i *image) apply(a desired.EdgeAction) error {
	switch a := a.(type) {
	case desired.SavePart:
		if a.Offset == 0 {
			delete(i.parts, a.Digest)
		}
		i.parts[a.Digest] = append(i.parts[a.Digest], a)
	case desired.SaveObject:
		i.objects[a.Object.Digest] = a.Object
		delete(i.parts, a.Object.Digest)
	case desired.Drop:
		for _, d := range a.Digests {
			delete(i.objects, d)
			delete(i.parts, d)
		}
	case desired.Commit:
		if i.list != nil && i.list.Digest != a.List.Digest {
			i.previous = i.list
		}
		i.list, i.cluster = a.List, a.Cluster
	default:
		return fmt.Errorf("%T is not for the store", a)
	}
	return nil
}

// apply executes an action; a commit is on disk when it returns.
func (d *disk) apply(a desired.EdgeAction) error {
	if d.fail {
		d.fail = false
		return errors.New("disk full")
	}
	if err := d.now.apply(a); err != nil {
		return err
	}
	d.unsaved = append(d.unsaved, a)
	if _, ok := a.(desired.Commit); ok {
		d.sync()
	}
	return nil
}

func (d *disk) sync() {
	for _, a := range d.unsaved {
		_ = d.kept.apply(a) // it was applied to now without an error
	}
	d.unsaved = nil
}

// cut keeps what was synced, and of the rest what reached the disk before the power went, parts only by chance.
func (d *disk) cut(rng *rand.Rand) {
	for _, a := range d.unsaved[:rng.IntN(len(d.unsaved)+1)] {
		if _, part := a.(desired.SavePart); !part || rng.IntN(2) == 0 {
			_ = d.kept.apply(a)
		}
	}
	d.unsaved, d.now, d.fail = nil, d.kept.clone(), false
}

func (d *disk) nextSession() uint64 {
	d.now.session++
	d.kept.session = d.now.session
	return d.now.session
}

func (d *disk) load() desired.Stored {
	i := d.now
	s := desired.Stored{
		List: i.list, Previous: i.previous, Cluster: i.cluster, Objects: make(map[desired.Digest]struct{}),
		Lists: make(map[desired.Digest]*desired.List), Parts: make(map[desired.Digest]desired.Part),
	}
	for dg, o := range i.objects {
		s.Objects[dg] = struct{}{}
		var l longshorepb.List
		if o.Kind == longshorepb.Kind_KIND_LIST && proto.Unmarshal(o.Body, &l) == nil {
			s.Lists[dg] = &desired.List{Entries: l.GetEntries(), Digest: dg}
		}
	}
	for dg, parts := range i.parts {
		p := desired.Part{}
		for _, a := range parts {
			switch {
			case a.Offset == 0:
				p = desired.Part{Data: append([]byte(nil), a.Data...), Total: a.Total, Kind: a.Kind, Enc: a.Enc}
			case a.Offset == uint64(len(p.Data)) && a.Total == p.Total && a.Enc == p.Enc:
				p.Data = append(p.Data, a.Data...)
			}
		}
		if len(p.Data) > 0 {
			s.Parts[dg] = p
		}
	}
	return s
}

// whole reports what of the committed state is missing or differs from what the cluster ever had.
func (d *disk) whole(c *cluster) error {
	l := d.kept.list
	if l == nil {
		return nil
	}
	check := func(dg desired.Digest) error {
		o, ok := d.kept.objects[dg]
		if !ok {
			return fmt.Errorf("%s is committed, %s is not on disk", c.name(l.Digest), c.name(dg))
		}
		if want, known := c.bodies[dg]; known && string(want) != string(o.Body) {
			return fmt.Errorf("%s differs from what the cluster had", c.name(dg))
		}
		return nil
	}
	if err := check(l.Digest); err != nil {
		return err
	}
	for _, e := range l.Entries {
		if err := check(desired.Digest(e.GetDigest())); err != nil {
			return err
		}
	}
	return nil
}
