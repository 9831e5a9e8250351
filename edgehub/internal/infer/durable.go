package infer

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
)

// durableKey holds the records of all models, so that those of models long gone are found.
const durableKey = "infer/models"

// record is what must outlive the agent of one model.
type record struct {
	// LastGood is the spec (protobuf) whose Variant served well.
	LastGood []byte `json:"lastGood,omitempty"`
	Variant  string `json:"variant,omitempty"`
	// Failed is the spec that was given up, if any.
	Failed *failed `json:"failed,omitempty"`
}

// failed says what spec was given up, when and why.
type failed struct {
	Hash    string    `json:"hash"`
	At      time.Time `json:"at"`
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
}

// good returns the last good unit and its spec; ok is false if there is none.
func (r record) good(defaultMemory int64) (u unit, spec *longshorepb.Model, ok bool) {
	if r.LastGood == nil {
		return unit{}, nil, false
	}
	spec = new(longshorepb.Model)
	if err := proto.Unmarshal(r.LastGood, spec); err != nil {
		return unit{}, nil, false
	}
	for _, v := range spec.GetVariants() {
		if v.GetName() == r.Variant {
			return makeUnit(spec, v, defaultMemory), spec, true
		}
	}
	return unit{}, nil, false
}

// durable keeps records in the KV store. Safe for concurrent use.
type durable struct {
	kv KV

	mu      sync.Mutex
	records map[string]record
}

func openDurable(kv KV, log *slog.Logger) (*durable, error) {
	d := &durable{kv: kv, records: map[string]record{}}
	b, err := kv.Get(durableKey)
	if err != nil {
		return nil, fmt.Errorf("read the last good versions of models: %w", err)
	}
	if b == nil {
		return d, nil
	}
	err = json.Unmarshal(b, &d.records)
	if err != nil {
		log.Error("last good versions of models are unreadable, starting without", "error", err)
	}
	if err != nil || d.records == nil { // nil: it says "null"
		d.records = map[string]record{}
	}
	return d, nil
}

func (d *durable) get(key string) record {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.records[key]
}

// put is on disk when it returns nil; otherwise nothing changed.
func (d *durable) put(key string, r record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	old, had := d.records[key]
	d.records[key] = r
	if err := d.save(); err != nil {
		if delete(d.records, key); had {
			d.records[key] = old
		}
		return err
	}
	return nil
}

// retain drops the records of models that keep refuses. A store that can't be written keeps them until the next time.
func (d *durable) retain(keep func(key string) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	dropped := map[string]record{}
	for key, r := range d.records {
		if !keep(key) {
			dropped[key] = r
			delete(d.records, key)
		}
	}
	if len(dropped) == 0 {
		return
	}
	if err := d.save(); err != nil {
		for key, r := range dropped {
			d.records[key] = r
		}
	}
}

func (d *durable) save() error {
	b, err := json.Marshal(d.records)
	if err != nil {
		return fmt.Errorf("encode the last good versions of models: %w", err)
	}
	if err := d.kv.Put(durableKey, b); err != nil {
		return fmt.Errorf("keep the last good versions of models: %w", err)
	}
	return nil
}
