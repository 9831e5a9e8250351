package account

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

type pods = map[string]*longshorepb.PodReport

// Without it, a hub could take one account for another, and show what the edge never said.
func TestDigestTellsAccountsApart(t *testing.T) {
	one := &longshorepb.PodReport{Uid: "1", Status: []byte("up")}
	seen := map[string]string{}
	for name, d := range map[string][]byte{
		"nothing":         Digest(pods{}, nil, nil),
		"a node":          Digest(pods{}, nil, &longshorepb.NodeReport{}),
		"another node":    Digest(pods{}, nil, &longshorepb.NodeReport{BootId: "1"}),
		"a pod":           Digest(pods{"1": one}, nil, nil),
		"two pods":        Digest(pods{"1": one, "2": {Uid: "2", Status: []byte("up")}}, nil, nil),
		"another status":  Digest(pods{"1": {Uid: "1", Status: []byte("down")}}, nil, nil),
		"a finished pod":  Digest(pods{"1": {Uid: "1", Status: []byte("up"), Finished: true}}, nil, nil),
		"a model":         Digest(pods{}, map[string]*longshorepb.ModelReport{"n/m": {Namespace: "n", Name: "m"}}, nil),
		"a pod and a one": Digest(pods{"1": one}, map[string]*longshorepb.ModelReport{"n/m": {Namespace: "n", Name: "m"}}, nil),
	} {
		if len(d) != 32 || seen[string(d)] != "" {
			t.Errorf("%s: digest %x, as %q", name, d, seen[string(d)])
		}
		seen[string(d)] = name
	}
	figures := &longshorepb.NodeReport{DiskFreeBytes: 1, BacklogRecords: 2, BacklogBytes: 3}
	if !bytes.Equal(Digest(pods{}, nil, figures), Digest(pods{}, nil, &longshorepb.NodeReport{})) || figures.GetDiskFreeBytes() != 1 {
		t.Error("figures that change all the time are part of the account")
	}
	if d := Digest(pods{"1": {Uid: "\xff"}}, nil, nil); d != nil {
		t.Errorf("an account that cannot be sent has the digest %x", d)
	}
}

// Without it, the two sides would never agree: one has what it made, the other what it read.
func TestDigestIsTheSameOnBothSides(t *testing.T) {
	made := pods{}
	for i := range 50 {
		uid := fmt.Sprint(i)
		made[uid] = &longshorepb.PodReport{Namespace: "n", Name: uid, Uid: uid, Digest: make([]byte, 32), Status: []byte(strings.Repeat(uid, i))}
	}
	r := &longshorepb.Reported{}
	for _, p := range made {
		r.Pods = append(r.Pods, p)
	}
	payload, err := Encode(r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(payload)
	if err != nil {
		t.Fatal(err)
	}
	read := pods{}
	for _, p := range got.GetPods() {
		read[p.GetUid()] = p
	}
	if !bytes.Equal(Digest(made, nil, nil), Digest(read, nil, nil)) {
		t.Error("the digests differ")
	}
}

// Without it, a full account would cost a slow link kilobytes of the same text, or a short report more than it says.
func TestReportsTravelCompressedWhereItPays(t *testing.T) {
	long := &longshorepb.Reported{}
	for i := range 10 {
		long.Pods = append(long.Pods, &longshorepb.PodReport{Uid: fmt.Sprint(i), Status: []byte(strings.Repeat("waiting for a container runtime ", 20))})
	}
	noise := make([]byte, 4096)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	for name, c := range map[string]struct {
		report *longshorepb.Reported
		most   func(plain int) int
	}{
		"ten pods":       {long, func(plain int) int { return plain / 4 }},
		"a short report": {&longshorepb.Reported{Session: 1, Sequence: 1, List: make([]byte, 32)}, func(plain int) int { return plain + 4 }},
		"noise":          {&longshorepb.Reported{Pods: []*longshorepb.PodReport{{Uid: "1", Status: noise}}}, func(plain int) int { return plain + 4 }},
	} {
		payload, err := Encode(c.report)
		if err != nil {
			t.Fatal(err)
		}
		if most := c.most(proto.Size(c.report)); len(payload) > most {
			t.Errorf("%s: %d bytes on the wire, want at most %d", name, len(payload), most)
		}
		if got, err := Decode(payload); err != nil || !proto.Equal(got, c.report) {
			t.Errorf("%s: read %v, error %v", name, got, err)
		}
	}
}

// G4: without it, one message of a broken edge could take all of the hub's memory.
func TestG4BadReportsAreRefused(t *testing.T) {
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	wrap := func(enc longshorepb.Encoding, b []byte) []byte {
		p, err := proto.Marshal(&longshorepb.Report{Encoding: enc, Reported: b})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for name, payload := range map[string][]byte{
		"a bomb":              wrap(longshorepb.Encoding_ENCODING_ZSTD, z.EncodeAll(make([]byte, 64<<20), nil)),
		"too long":            wrap(longshorepb.Encoding_ENCODING_NONE, make([]byte, maxReport)),
		"another compression": wrap(7, nil),
		"not compressed":      wrap(longshorepb.Encoding_ENCODING_ZSTD, []byte("no")),
		"cut":                 wrap(longshorepb.Encoding_ENCODING_ZSTD, z.EncodeAll(make([]byte, 1000), nil)[:10]),
		"no report":           wrap(longshorepb.Encoding_ENCODING_NONE, []byte{0xff}),
		"nothing of ours":     {0xff},
	} {
		if r, err := Decode(payload); err == nil {
			t.Errorf("%s: read as %v", name, r)
		}
	}
}
