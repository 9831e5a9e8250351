package infer

import (
	"log/slog"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// kept is a KV store of one value.
type kept struct{ value []byte }

func (k *kept) Get(string) ([]byte, error)       { return k.value, nil }
func (k *kept) Delete(string) error              { k.value = nil; return nil }
func (k *kept) Put(_ string, value []byte) error { k.value = value; return nil }

// FuzzDurable: whatever the disk says of last good models, the agent starts, and keeps the next one.
func FuzzDurable(f *testing.F) {
	for _, s := range []string{`{"n/m":{"lastGood":"AAAA","variant":"v"}}`, `{}`, `null`, `[]`, `{"n/m":null}`, `{"n/m":{"failed":{"hash":"x"}}}`} {
		f.Add([]byte(s))
	}
	spec, err := proto.Marshal(&longshorepb.Model{Namespace: "n", Name: "m", Variants: []*longshorepb.ModelVariant{{Name: "v", Digest: "sha256:x"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, stored []byte) {
		kv := &kept{stored}
		d, err := openDurable(kv, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range d.records {
			if u, spec, ok := r.good(1); ok && (spec == nil || u.variant != r.Variant) {
				t.Fatalf("good: %+v of %v", u, spec)
			}
		}
		if err := d.put("n/m", record{LastGood: spec, Variant: "v"}); err != nil {
			t.Fatal(err)
		}
		again, err := openDurable(kv, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if u, _, ok := again.get("n/m").good(1); !ok || u.digest != "sha256:x" {
			t.Fatalf("after a start the last good version is %+v", u)
		}
	})
}
