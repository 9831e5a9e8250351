package desired

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// MaxObjectBytes and MaxListBytes bound canonical bytes: a hub leaves larger objects out, an edge refuses them.
const (
	MaxObjectBytes = 4 << 20
	MaxListBytes   = 16 << 20
)

// ErrTooLarge says that an object has more than MaxObjectBytes.
var ErrTooLarge = errors.New("object too large")

// Digest names content: SHA-256 over a domain tag, the kind and the canonical bytes; for a Secret HMAC-SHA256 under the
// edge's digest key instead, so that a digest says nothing about the plaintext.
type Digest [32]byte

// String returns 64 lower-case hexadecimal digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Short returns the first 12 hexadecimal digits, enough for people.
func (d Digest) Short() string { return hex.EncodeToString(d[:6]) }

// IsZero reports whether d is the zero digest, which names nothing.
func (d Digest) IsZero() bool { return d == Digest{} }

// toDigest takes 32 bytes.
func toDigest(b []byte) (Digest, error) {
	if len(b) != len(Digest{}) {
		return Digest{}, fmt.Errorf("digest of %d bytes, must be 32", len(b))
	}
	return Digest(b), nil
}

const (
	digestTag    = "longshore/v1 object\x00"
	secretKeyTag = "longshore/v1 secret digest"
)

// digestOf computes an object's digest. key is used for Secrets only.
func digestOf(kind longshorepb.Kind, body []byte, key [32]byte) Digest {
	var h hash.Hash
	if kind == longshorepb.Kind_KIND_SECRET {
		h = hmac.New(sha256.New, key[:])
	} else {
		h = sha256.New()
	}
	h.Write([]byte(digestTag))
	h.Write([]byte{byte(kind)})
	h.Write(body)
	return Digest(h.Sum(nil))
}

// SecretKey derives an edge's digest key from its credential (Identity.Key) with HKDF (RFC 5869).
func SecretKey(edgeKey []byte) [32]byte {
	k, err := hkdf.Key(sha256.New, edgeKey, nil, secretKeyTag, 32)
	if err != nil {
		panic(fmt.Sprintf("derive 32 bytes with HKDF-SHA256: %v", err)) // only a length above 255 hashes fails
	}
	return [32]byte(k)
}

// Ref names an object.
type Ref struct {
	Kind            longshorepb.Kind
	Namespace, Name string
	UID             string
}

// String names the object for logs: "pod default/web".
func (r Ref) String() string {
	return kindName(r.Kind) + " " + r.Namespace + "/" + r.Name
}

func kindName(k longshorepb.Kind) string {
	switch k {
	case longshorepb.Kind_KIND_POD:
		return "pod"
	case longshorepb.Kind_KIND_CONFIG_MAP:
		return "configmap"
	case longshorepb.Kind_KIND_SECRET:
		return "secret"
	case longshorepb.Kind_KIND_MODEL:
		return "model"
	case longshorepb.Kind_KIND_LIST:
		return "list"
	}
	return "object of kind " + k.String()
}

// Object is one content-addressed object. Body is its canonical encoding: for Kubernetes kinds the API object without
// status, managedFields, resourceVersion and generation in deterministic protobuf; for models a longshorepb.Model.
type Object struct {
	Ref
	Digest Digest
	Body   []byte
}

// Entry returns the list entry that names o.
func (o Object) Entry() *longshorepb.Entry { return o.entry(o.Digest, len(o.Body)) }

func (r Ref) entry(d Digest, size int) *longshorepb.Entry {
	return &longshorepb.Entry{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, Uid: r.UID, Digest: d[:], Size: uint64(size)}
}

// FromPod makes an object of a pod; it does not change or keep its argument. It fails with ErrTooLarge.
func FromPod(p *corev1.Pod) (Object, error) {
	c := corev1.Pod{ObjectMeta: strip(p.ObjectMeta), Spec: p.Spec}
	return fromMeta(longshorepb.Kind_KIND_POD, &c.ObjectMeta, c.Marshal, [32]byte{})
}

// FromConfigMap makes an object of a ConfigMap; it does not change or keep its argument. It fails with ErrTooLarge.
func FromConfigMap(m *corev1.ConfigMap) (Object, error) {
	c := *m
	c.ObjectMeta = strip(m.ObjectMeta)
	return fromMeta(longshorepb.Kind_KIND_CONFIG_MAP, &c.ObjectMeta, c.Marshal, [32]byte{})
}

// FromSecret makes an object of a Secret under the digest key of the edge it is for (SecretKey); it does not change or
// keep its argument. It fails with ErrTooLarge.
func FromSecret(s *corev1.Secret, key [32]byte) (Object, error) {
	c := *s
	c.ObjectMeta = strip(s.ObjectMeta)
	return fromMeta(longshorepb.Kind_KIND_SECRET, &c.ObjectMeta, c.Marshal, key)
}

// FromModel makes an object of a model; it does not change or keep its argument. It fails with ErrTooLarge.
func FromModel(m *longshorepb.Model) (Object, error) {
	ref := Ref{Kind: longshorepb.Kind_KIND_MODEL, Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid()}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return newObject(ref, body, err, [32]byte{})
}

// strip drops what changes without the desired state changing.
func strip(m metav1.ObjectMeta) metav1.ObjectMeta {
	m.ManagedFields, m.ResourceVersion, m.Generation = nil, "", 0
	return m
}

func fromMeta(kind longshorepb.Kind, m *metav1.ObjectMeta, marshal func() ([]byte, error), key [32]byte) (Object, error) {
	body, err := marshal()
	return newObject(Ref{Kind: kind, Namespace: m.Namespace, Name: m.Name, UID: string(m.UID)}, body, err, key)
}

func newObject(ref Ref, body []byte, err error, key [32]byte) (Object, error) {
	if err != nil {
		return Object{}, fmt.Errorf("encode %s: %w", ref, err)
	}
	if len(body) > MaxObjectBytes {
		return Object{}, fmt.Errorf("%w: %s has %d bytes, at most %d can be mirrored", ErrTooLarge, ref, len(body), MaxObjectBytes)
	}
	return Object{Ref: ref, Digest: digestOf(ref.Kind, body, key), Body: body}, nil
}

// verifyObject checks received canonical bytes against the entry that names them.
func verifyObject(e *longshorepb.Entry, body []byte, key [32]byte) (Object, error) {
	want := Ref{Kind: e.GetKind(), Namespace: e.GetNamespace(), Name: e.GetName(), UID: e.GetUid()}
	o := Object{Ref: want, Digest: digestOf(e.GetKind(), body, key), Body: body}
	if string(o.Digest[:]) != string(e.GetDigest()) {
		return Object{}, fmt.Errorf("%s: %w", want, errWrongDigest)
	}
	got, err := o.decodeRef()
	if err != nil {
		return Object{}, refusal{err}
	}
	if got != want || uint64(len(body)) != e.GetSize() {
		return Object{}, refusal{fmt.Errorf("the list names %s (uid %s, %d bytes), the object is %s (uid %s, %d bytes)",
			want, want.UID, e.GetSize(), got, got.UID, len(body))}
	}
	return o, nil
}

// decodeRef reads the name out of Body.
func (o Object) decodeRef() (Ref, error) {
	switch o.Kind {
	case longshorepb.Kind_KIND_POD:
		p, err := o.Pod()
		return metaRef(o.Kind, p, err)
	case longshorepb.Kind_KIND_CONFIG_MAP:
		c, err := o.ConfigMap()
		return metaRef(o.Kind, c, err)
	case longshorepb.Kind_KIND_SECRET:
		s, err := o.Secret()
		return metaRef(o.Kind, s, err)
	case longshorepb.Kind_KIND_MODEL:
		m, err := o.Model()
		return Ref{Kind: o.Kind, Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid()}, err
	}
	return Ref{}, fmt.Errorf("no object has the kind %s", o.Kind)
}

func metaRef(kind longshorepb.Kind, m metav1.Object, err error) (Ref, error) {
	if err != nil {
		return Ref{}, err
	}
	return Ref{Kind: kind, Namespace: m.GetNamespace(), Name: m.GetName(), UID: string(m.GetUID())}, nil
}

// Pod decodes Body.
func (o Object) Pod() (*corev1.Pod, error) {
	p := &corev1.Pod{}
	return p, o.decode(longshorepb.Kind_KIND_POD, p)
}

// ConfigMap decodes Body.
func (o Object) ConfigMap() (*corev1.ConfigMap, error) {
	c := &corev1.ConfigMap{}
	return c, o.decode(longshorepb.Kind_KIND_CONFIG_MAP, c)
}

// Secret decodes Body.
func (o Object) Secret() (*corev1.Secret, error) {
	s := &corev1.Secret{}
	return s, o.decode(longshorepb.Kind_KIND_SECRET, s)
}

// Model decodes Body.
func (o Object) Model() (*longshorepb.Model, error) {
	m := &longshorepb.Model{}
	return m, o.decode(longshorepb.Kind_KIND_MODEL, unmarshaler{m})
}

// unmarshaler gives a protobuf message the method that the Kubernetes types have.
type unmarshaler struct{ m proto.Message }

func (u unmarshaler) Unmarshal(b []byte) error { return proto.Unmarshal(b, u.m) }

func (o Object) decode(kind longshorepb.Kind, into interface{ Unmarshal([]byte) error }) error {
	if o.Kind != kind {
		return fmt.Errorf("decode %s as a %s", o.Ref, kindName(kind))
	}
	if err := into.Unmarshal(o.Body); err != nil {
		return fmt.Errorf("decode %s: %w", o.Ref, err)
	}
	return nil
}
