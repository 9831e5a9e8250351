package desired

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const headTag = "longshore/v1 head\x00"

// KeyID returns the name under which heads refer to a hub's key: the first 8 bytes of SHA-256 of the public key.
func KeyID(k ed25519.PublicKey) [8]byte {
	sum := sha256.Sum256(k)
	return [8]byte(sum[:8])
}

// signHead signs a head (Ed25519, RFC 8032) over a domain tag.
func signHead(key ed25519.PrivateKey, h *longshorepb.Head) *longshorepb.SignedHead {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(h)
	if err != nil {
		panic(fmt.Sprintf("encode head: %v", err)) // names were checked to be UTF-8 when the session began
	}
	id := KeyID(key.Public().(ed25519.PublicKey))
	return &longshorepb.SignedHead{Head: b, KeyId: id[:], Signature: ed25519.Sign(key, append([]byte(headTag), b...))}
}

// openHead verifies who signed a head and decodes it. Whether it is for this edge and session is for the replica to say.
func openHead(keys map[[8]byte]ed25519.PublicKey, s *longshorepb.SignedHead) (*longshorepb.Head, error) {
	if len(s.GetKeyId()) != 8 {
		return nil, errors.New("head without key id")
	}
	key, ok := keys[[8]byte(s.GetKeyId())]
	if !ok {
		return nil, fmt.Errorf("head signed with the unknown key %x: is the credential file of this hub?", s.GetKeyId())
	}
	if !ed25519.Verify(key, append([]byte(headTag), s.GetHead()...), s.GetSignature()) {
		return nil, errors.New("head with a wrong signature")
	}
	h := &longshorepb.Head{}
	if err := proto.Unmarshal(s.GetHead(), h); err != nil {
		return nil, fmt.Errorf("decode head: %w", err)
	}
	return h, nil
}

// checkHead judges a verified head against the replica's identity and session.
func (r *Replica) checkHead(h *longshorepb.Head) error {
	switch {
	case h.GetEdge() != r.cfg.Edge:
		return fmt.Errorf("head for edge %q", h.GetEdge())
	case !bytes.Equal(h.GetEdgeKey(), r.cfg.EdgeKey):
		return errors.New("head for another credential of this edge")
	case !bytes.Equal(h.GetNonce(), r.nonce[:]):
		return errors.New("head of another session")
	case h.GetCounter() <= r.counter:
		return fmt.Errorf("head %d after head %d: repeated or out of order", h.GetCounter(), r.counter)
	case h.GetCluster() == "":
		return errors.New("head without cluster")
	case r.cluster != "" && h.GetCluster() != r.cluster:
		return fmt.Errorf("this edge holds the state of cluster %s, the hub serves cluster %s: "+
			"if that is meant, stop the agent, run 'edgehub leave' and start it again", r.cluster, h.GetCluster())
	}
	if h.GetSuperseded() || h.GetUnknown() {
		return nil
	}
	_, err := toDigest(h.GetList())
	return err
}
