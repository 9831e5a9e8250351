package plain_test

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/sync/plain"
)

// TestReadme: who builds a device after ../README.md would parse what the hub does not send.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := make(map[string][]byte)
	for _, m := range regexp.MustCompile("(?s)<!-- (schema|example): (\\w+) -->\n```json\n(.*?)```").FindAllSubmatch(readme, -1) {
		blocks[string(m[1])+" "+string(m[2])] = m[3]
	}
	for name, v := range map[string]any{"index": &plain.Index{}, "pod": &plain.Pod{}, "model": &plain.Model{}} {
		d := json.NewDecoder(bytes.NewReader(blocks["example "+name]))
		d.DisallowUnknownFields()
		if err := d.Decode(v); err != nil {
			t.Errorf("example of %s: %v", name, err)
		}
		var schema struct {
			Required   []string       `json:"required"`
			Properties map[string]any `json:"properties"`
		}
		if err := json.Unmarshal(blocks["schema "+name], &schema); err != nil {
			t.Errorf("schema of %s: %v", name, err)
			continue
		}
		var named []string
		for field, required := range fields(reflect.TypeOf(v).Elem()) {
			named = append(named, field)
			if required != slices.Contains(schema.Required, field) {
				t.Errorf("schema of %s: field %q is always there: %v", name, field, required)
			}
		}
		for field := range schema.Properties {
			if !slices.Contains(named, field) {
				t.Errorf("schema of %s: there is no field %q", name, field)
			}
		}
		if len(named) != len(schema.Properties) {
			t.Errorf("schema of %s: %d fields, there are %v", name, len(schema.Properties), named)
		}
	}
}

// fields returns the JSON names of a struct's fields, and which are always present.
func fields(t reflect.Type) map[string]bool {
	all := make(map[string]bool)
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			for n, required := range fields(f.Type) {
				all[n] = required
			}
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		all[name] = options != "omitempty"
	}
	return all
}
