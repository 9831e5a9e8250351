package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// replayStream has room for the whole backlog.
const replayStream = "streams:\n- name: readings\n  topics: [\"sensors/#\"]\n  maxBytes: 2GiB\ntelemetry: {backlogRate: 0}\n"

// load is what a backlog consists of.
type load struct {
	name, what string
	payload    func(device, n int) []byte
}

// replay has an edge collect a backlog while its link is cut, and measures how fast, and at what cost, it reaches the sink.
func replay(ctx context.Context, b *bench) error {
	for _, l := range []load{
		{"replay", "JSON readings of about 100 bytes", reading},
		{"replay-noise", "100 random bytes each", noise},
	} {
		for run := range min(b.runs, 3) {
			if err := b.replayOnce(ctx, l, run); err != nil {
				return fmt.Errorf("%s: %w", l.name, err)
			}
		}
	}
	return nil
}

func (b *bench) replayOnce(ctx context.Context, l load, run int) (err error) {
	s, err := b.newSite(fmt.Sprintf("%s-%d", l.name, run))
	if err != nil {
		return err
	}
	defer s.close(&err)
	if err := s.hub.Write("edge.yaml", edgeManifest("dock", 0, "")); err != nil {
		return err
	}
	if err := s.hub.Start(ctx); err != nil {
		return err
	}
	e, err := s.box(ctx, "dock", replayStream)
	if err != nil {
		return err
	}
	if err := s.synced(ctx, e, 0, 0); err != nil {
		return err
	}
	e.cut()
	begin := time.Now()
	if err := fill(ctx, e, b.records, l.payload); err != nil {
		return fmt.Errorf("fill the backlog: %w", err)
	}
	b.record(figure{Name: l.name + "-collect", What: "records (" + l.what + ") taken by the edge's broker without a link, PUBACK after the disk has them, 8 devices", Unit: "records/s"},
		float64(b.records)/time.Since(begin).Seconds())
	st, err := e.Status(ctx)
	if err != nil {
		return err
	}
	if held := st.Stream("readings").Held; held != uint64(b.records) {
		return fmt.Errorf("the edge holds %d records of %d", held, b.records)
	}
	full := st.Outbox.DiskBytes
	for _, pid := range []int{s.hub.PID(), e.PID()} {
		if err := resetPeak(pid); err != nil {
			return err
		}
	}
	took, err := b.drain(ctx, s, e)
	if err != nil {
		return err
	}
	b.record(figure{
		Name: l.name, What: fmt.Sprintf("replay of a backlog of %s records (%s) from one edge, without a rate limit", number(float64(b.records)), l.what),
		Unit: "records/s", Reach: atLeast(50_000), Compare: "readings taken offline never arrive",
	}, float64(b.records)/took.Seconds())
	for _, m := range []struct {
		name, what string
		pid        int
	}{
		{l.name + "-hub-peak", "the hub's highest RSS meanwhile", s.hub.PID()},
		{l.name + "-edge-peak", "the edge agent's highest RSS meanwhile", e.PID()},
	} {
		kib, err := peak(m.pid)
		if err != nil {
			return err
		}
		b.record(figure{Name: m.name, What: m.what, Unit: "MiB"}, float64(kib)/mib)
	}
	left, err := settledDisk(ctx, e, full)
	if err != nil {
		return err
	}
	b.record(figure{Name: l.name + "-backlog-disk", What: "the backlog on the edge's disk", Unit: "MiB"}, float64(full)/(1<<20))
	b.record(figure{Name: l.name + "-disk-freed", What: "part of it given back to the disk after the replay", Unit: "%", Reach: atLeast(99)}, 100*(1-float64(left)/float64(full)))
	return nil
}

// fill publishes records on several connections, many unacknowledged at a time.
func fill(ctx context.Context, e *box, records int, payload func(device, n int) []byte) error {
	const devices = 8
	g, ctx := errgroup.WithContext(ctx)
	for d := range devices {
		count := records / devices
		if d < records%devices {
			count++
		}
		g.Go(func() error {
			c, err := dialMQTT(ctx, e.Broker, fmt.Sprintf("press-%d", d))
			if err != nil {
				return err
			}
			defer c.close()
			return c.publish(ctx, fmt.Sprintf("sensors/press-%d", d), count, 250, func(i int) []byte { return payload(d, i) }, nil)
		})
	}
	return g.Wait()
}

// drain restores the link and returns the time from the last look at which the link was down until everything was delivered.
// The time until the edge tries again is not part of it.
func (b *bench) drain(ctx context.Context, s *site, e *box) (time.Duration, error) {
	e.restore()
	begin := time.Now()
	err := poll(ctx, 10*time.Millisecond, func() error {
		look := time.Now()
		st, err := e.Status(ctx)
		if err == nil && st.Link.State != "up" {
			begin = look
			err = fmt.Errorf("link is %s (%s)", st.Link.State, st.Link.Error)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	err = poll(ctx, 20*time.Millisecond, func() error {
		sum, err := s.hub.Sum(ctx, e.Name, "readings")
		if err == nil && sum.Delivered < uint64(b.records) {
			err = fmt.Errorf("%d of %d delivered", sum.Delivered, b.records)
		}
		if err == nil && !sum.Balanced() {
			err = fmt.Errorf("the account is not balanced: %+v", sum)
		}
		return err
	})
	return time.Since(begin), err
}

// settledDisk gives the edge's outbox some time to give back its segments, and returns what it still takes.
func settledDisk(ctx context.Context, e *box, full int64) (left int64, err error) {
	for range 100 {
		st, err := e.Status(ctx)
		if err != nil {
			return 0, err
		}
		if left = st.Outbox.DiskBytes; left <= full/100 {
			break
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return 0, err
		}
	}
	return left, nil
}
