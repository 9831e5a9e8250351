package mirror_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/broker/mqttconn"
	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/inbox"
	"github.com/longshore-edge/longshore/sync/outbox"
	"github.com/longshore-edge/longshore/sync/topic"
)

// G3: without it, telemetry would be lost between the broker and the sink, or edges would keep it for ever because nobody
// acknowledges it.
func TestG3TelemetryIsAcknowledgedOnceItIsStored(t *testing.T) {
	in, err := intake.Open(intake.Config{Logger: logger(t), Dir: filepath.Join(t.TempDir(), "telemetry")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := in.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()

	f := newFleet()
	h := f.hub(t, "hub", newCache("e1"), &source{}, in)
	defer h.stop()
	log, err := outbox.Open(t.TempDir(), outbox.Config{Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	const records = 500
	var batch []outbox.Record
	for i := range records {
		batch = append(batch, outbox.Record{Stream: "vibration", Topic: "a/b", Payload: fmt.Appendf(nil, "reading %d", i)})
	}
	if _, err := log.Append(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	connected, disconnect := context.WithTimeout(t.Context(), patience)
	defer disconnect()
	err = mqttconn.Run(connected, client(t, "e1", h.address), func(ctx context.Context, s *mqttconn.Session) error {
		hello := &longshorepb.Hello{Wire: longshorepb.Wire, Nonce: make([]byte, 16), Session: 1, Instance: make([]byte, 16), Outboxes: log.Heads()}
		if err := s.Publish(ctx, topic.Topic{Kind: topic.Hello, Edge: "e1"}.String(), marshal(t, hello)); err != nil {
			return err
		}
		if err := s.Subscribe(ctx, topic.Topic{Kind: topic.Ack, Edge: "e1"}.String()); err != nil {
			return err
		}
		_, backlog := log.NewReaders()
		for {
			m, err := backlog.Next(16 << 10)
			if err != nil {
				return err
			}
			if m == nil {
				break
			}
			payload, err := proto.Marshal(m)
			if err != nil {
				return err
			}
			if err := s.Publish(ctx, topic.Topic{Kind: topic.Telemetry, Edge: "e1"}.String(), payload); err != nil {
				return err
			}
		}
		for m := range s.Messages() {
			if m.Topic != (topic.Topic{Kind: topic.Ack, Edge: "e1"}).String() {
				continue
			}
			signed, ack := &longshorepb.SignedAck{}, &longshorepb.Ack{}
			unmarshal(t, m.Payload, signed)
			unmarshal(t, signed.GetAck(), ack)
			if err := log.Ack(ack); err != nil {
				return err
			}
			if held(log) == 0 {
				disconnect()
				return nil
			}
		}
		return nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := held(log); n != 0 {
		t.Fatalf("%d records are not acknowledged", n)
	}
	seen := map[uint64]bool{}
	err = in.Records(t.Context(), intake.Query{Edge: "e1", To: time.Now().Add(time.Hour), Limit: 10 * records}, func(r inbox.Record) error {
		if seen[r.Seq] {
			t.Errorf("record %d twice", r.Seq)
		}
		seen[r.Seq] = true
		return nil
	})
	if err != nil || len(seen) != records {
		t.Errorf("%d records in the sink (%v), want %d", len(seen), err, records)
	}
}

// held counts the records that are not acknowledged.
func held(log *outbox.Log) (n uint64) {
	for _, epoch := range log.Heads() {
		for _, s := range epoch.Streams {
			n += s.Next - s.Low
		}
	}
	return n
}
