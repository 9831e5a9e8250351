package desired

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// Digest names content: SHA-256 over a domain tag, the kind and the canonical bytes; for a Secret HMAC-SHA-256 under the
// edge's digest key instead, so that a digest says nothing about the plaintext.
type Digest [32]byte

// Ref names an object.
type Ref struct {
	Kind            longshorepb.Kind
	Namespace, Name string
	UID             string
}

// Object is one content-addressed object. Body is its canonical encoding: for Kubernetes kinds the API object without
// status, managedFields, resourceVersion and generation in deterministic protobuf; for models a longshorepb.Model.
type Object struct {
	Ref
	Digest Digest
	Body   []byte
}

// FromPod, FromConfigMap, FromSecret and FromModel make objects; they do not change or keep their arguments.
func FromPod(p *corev1.Pod) (Object, error)             { panic("TODO") }
func FromConfigMap(c *corev1.ConfigMap) (Object, error) { panic("TODO") }
func FromModel(m *longshorepb.Model) (Object, error)    { panic("TODO") }

// FromSecret needs the digest key of the edge it is for.
func FromSecret(s *corev1.Secret, key [32]byte) (Object, error) { panic("TODO") }

// SecretKey derives an edge's digest key from its credential (Identity.Key) with HKDF.
func SecretKey(edgeKey []byte) [32]byte { panic("TODO") }

// Pod, ConfigMap, Secret and Model decode Body.
func (o Object) Pod() (*corev1.Pod, error)             { panic("TODO") }
func (o Object) ConfigMap() (*corev1.ConfigMap, error) { panic("TODO") }
func (o Object) Secret() (*corev1.Secret, error)       { panic("TODO") }
func (o Object) Model() (*longshorepb.Model, error)    { panic("TODO") }
