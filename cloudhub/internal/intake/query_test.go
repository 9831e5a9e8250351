package intake

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/inbox"
)

// Queries must give what was asked for: one edge and not those whose names begin like it, one stream, a limit, and an end when
// the reader goes away.
func TestQueriesSelect(t *testing.T) {
	s := openStore(t, Config{Dir: t.TempDir()})
	for _, edge := range []string{"a", "a.b", "a-b", "b"} {
		c := s.hello(edge)
		for _, stream := range []string{"s", "st"} {
			mustReceive(t, c, message(t, makeFrame(t, stream, 1, edge, stream)))
		}
		c.Close()
	}
	s.idle(t)
	for _, q := range []struct {
		Query
		want int
	}{
		{Query{}, 16}, {Query{Edge: "a"}, 4}, {Query{Edge: "a", Stream: "s"}, 2}, {Query{Stream: "st"}, 8}, {Query{Edge: "c"}, 0},
		{Query{Limit: 3}, 3}, {Query{Stream: "s", Limit: 100}, 8},
	} {
		r := s.records(t, q.Query)
		if len(r) != q.want {
			t.Errorf("%+v: %d records, want %d", q.Query, len(r), q.want)
		}
		for _, rec := range r {
			if q.Edge != "" && rec.Edge != q.Edge || q.Stream != "" && rec.Stream != q.Stream {
				t.Errorf("%+v gave %+v", q.Query, rec.ID)
			}
		}
	}
	gone := errors.New("the reader is gone")
	if err := s.Records(context.Background(), Query{}, func(inbox.Record) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("reader's error became %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Records(ctx, Query{}, func(inbox.Record) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled query: %v", err)
	}
}

// Without it, whoever reads telemetry in parts would miss records, or read some twice, where a part ends inside a frame, at the
// end of a stream, or between records of one time; and whoever wants the newest would get others.
func TestQueriesGoOnAfterARecordAndFromTheEnd(t *testing.T) {
	s := openStore(t, Config{Dir: t.TempDir()})
	for _, edge := range []string{"a", "a-b", "b"} {
		for range 2 { // two starts of the edge
			c := s.hello(edge)
			epoch := make([]byte, 16)
			if _, err := rand.Read(epoch); err != nil {
				t.Fatal(err)
			}
			for _, stream := range []string{"s", "st"} {
				mustReceive(t, c, marshal(t, &longshorepb.Telemetry{Epoch: epoch, Frames: [][]byte{
					makeFrame(t, stream, 1, "1", "2", "3"), makeFrame(t, stream, 4, "4"), makeFrame(t, stream, 9, "9", "10"),
				}}))
			}
			s.idle(t)
			c.Close()
		}
	}
	for _, q := range []Query{{}, {Edge: "a"}, {Stream: "st"}, {Edge: "a-b", Stream: "s"}} {
		all := s.records(t, q)
		for limit := range 8 {
			var parts []inbox.ID
			next := q
			next.Limit = limit + 1
			for {
				part := s.records(t, next)
				for _, r := range part {
					parts = append(parts, r.ID)
				}
				if len(part) < next.Limit {
					break
				}
				next.After = part[len(part)-1].ID
			}
			same := slices.EqualFunc(parts, all, func(id inbox.ID, r inbox.Record) bool { return id == r.ID })
			if !same || len(all) == 0 {
				t.Errorf("%+v in parts of %d: %d records, want the same %d", q, next.Limit, len(parts), len(all))
			}
		}
	}
	for _, q := range []Query{{}, {Edge: "a"}, {Stream: "st"}, {Edge: "a-b", Stream: "s"}, {Edge: "b", To: time.Unix(0, 9)}} {
		all := s.records(t, q)
		for n := range 14 {
			var want, got []inbox.ID
			for k, r := range all {
				later := 0
				for _, o := range all[k+1:] {
					if o.Edge == r.Edge && o.Stream == r.Stream {
						later++
					}
				}
				if later < n {
					want = append(want, r.ID)
				}
			}
			err := s.Tail(t.Context(), q, n, func(r inbox.Record) error { got = append(got, r.ID); return nil })
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("the newest %d of %+v: %d records, error %v; want %d", n, q, len(got), err, len(want))
			}
		}
	}
	first := s.records(t, Query{Limit: 1})[0].ID
	between := first
	between.Seq = 7
	if r := s.records(t, Query{After: between, Limit: 1}); len(r) != 1 || r[0].Seq != 9 || r[0].Epoch != first.Epoch {
		t.Errorf("after a record that is not there (any more): %+v", r)
	}
	strange := first
	strange.Epoch[0]++
	for _, q := range []Query{{After: strange}, {After: first, Edge: "b"}, {After: first, Stream: "st"}} {
		if err := s.Records(t.Context(), q, func(inbox.Record) error { return errors.New("called") }); !errors.Is(err, ErrNoPosition) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}
