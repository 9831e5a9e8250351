package desired

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

const ackTag = "longshore/v1 ack\x00"

// signedAck returns what the signature of an acknowledgement covers.
func signedAck(nonce, ack []byte) []byte { return slices.Concat([]byte(ackTag), nonce, ack) }

// SignAck returns the payload that acknowledges telemetry in this session: signed as heads are, and worthless in another one.
func (s *Session) SignAck(a *longshorepb.Ack) []byte {
	b := marshal(a)
	id := KeyID(s.cfg.Key.Public().(ed25519.PublicKey))
	return marshal(&longshorepb.SignedAck{Ack: b, KeyId: id[:], Signature: ed25519.Sign(s.cfg.Key, signedAck(s.nonce, b))})
}

// OpenAck returns an acknowledgement that the hub signed in this session. What it acknowledges is for the outbox to judge.
func (r *Replica) OpenAck(payload []byte) (*longshorepb.Ack, error) {
	var s longshorepb.SignedAck
	if err := proto.Unmarshal(payload, &s); err != nil {
		return nil, fmt.Errorf("decode signed acknowledgement: %w", err)
	}
	if len(s.GetKeyId()) != 8 {
		return nil, errors.New("acknowledgement without key id")
	}
	key, ok := r.keys[[8]byte(s.GetKeyId())]
	if !ok {
		return nil, fmt.Errorf("acknowledgement signed with the unknown key %x", s.GetKeyId())
	}
	if !ed25519.Verify(key, signedAck(r.nonce[:], s.GetAck()), s.GetSignature()) {
		return nil, errors.New("acknowledgement with a wrong signature, or of another session")
	}
	a := &longshorepb.Ack{}
	if err := proto.Unmarshal(s.GetAck(), a); err != nil {
		return nil, fmt.Errorf("decode acknowledgement: %w", err)
	}
	return a, nil
}
