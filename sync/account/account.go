package account

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const digestTag = "longshore/v1 account\x00"

// Digest names an account: SHA-256 over a domain tag, the pods sorted by UID, the models sorted by key and the facts of the node,
// each report in deterministic protobuf behind its kind and length. Two sides whose encodings differ get other digests, never
// equal ones for other accounts. It is nil for an account that cannot be encoded.
func Digest[UID ~string](pods map[UID]*longshorepb.PodReport, models map[string]*longshorepb.ModelReport, node *longshorepb.NodeReport) []byte {
	h := sha256.New()
	h.Write([]byte(digestTag))
	for _, uid := range slices.Sorted(maps.Keys(pods)) {
		if !add(h, 'p', pods[uid]) {
			return nil
		}
	}
	for _, key := range slices.Sorted(maps.Keys(models)) {
		if !add(h, 'm', models[key]) {
			return nil
		}
	}
	if node != nil && !add(h, 'n', Facts(node)) {
		return nil
	}
	return h.Sum(nil)
}

func add(h hash.Hash, kind byte, m proto.Message) bool {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return false
	}
	h.Write(binary.AppendUvarint([]byte{kind}, uint64(len(b))))
	h.Write(b)
	return true
}

// Facts is a node's report without the figures that change all the time: free disk and backlog. They are no part of an account.
func Facts(n *longshorepb.NodeReport) *longshorepb.NodeReport {
	if n == nil {
		return nil
	}
	n = proto.CloneOf(n)
	n.DiskFreeBytes, n.BacklogRecords, n.BacklogBytes = 0, 0, 0
	return n
}
