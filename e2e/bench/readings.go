package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// readings publishes 600 readings within one second, as one device at QoS 1, and waits until all are durable in the sink.
func readings(ctx context.Context, b *bench) (err error) {
	const count, within = 600, time.Second
	s, err := b.newSite("readings")
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
	e, err := s.box(ctx, "dock", "streams:\n- name: readings\n  topics: [\"sensors/#\"]\n")
	if err != nil {
		return err
	}
	if err := s.synced(ctx, e, 0, 0); err != nil {
		return err
	}
	device, err := dialMQTT(ctx, e.Broker, "press-7")
	if err != nil {
		return err
	}
	defer device.close()
	for run := range b.runs {
		target := uint64(count * (run + 1))
		begin := time.Now()
		var last time.Time
		pace := func(i int) {
			due := begin.Add(within * time.Duration(i) / count)
			_ = pause(ctx, time.Until(due)) // publish notices the end of ctx
			last = time.Now()
		}
		if err := device.publish(ctx, "sensors/press-7", count, count, func(i int) []byte { return reading(7, count*run+i) }, pace); err != nil {
			return err
		}
		acknowledged := time.Since(last)
		err := poll(ctx, 5*time.Millisecond, func() error {
			sum, err := s.hub.Sum(ctx, e.Name, "readings")
			if err == nil && sum.Delivered < target {
				err = fmt.Errorf("%d of %d delivered", sum.Delivered, target)
			}
			return err
		})
		if err != nil {
			return err
		}
		b.record(figure{
			Name: "readings", What: "600 readings published within 1 s on one edge by one device, until the last is durable in the sink", Unit: "s",
			Reach: atMost(2), Compare: "about 18 s, and 600 API writes",
		}, time.Since(begin).Seconds())
		b.record(figure{Name: "readings-lag", What: "the same, counted from the last publish", Unit: "ms"}, ms(time.Since(last)))
		b.record(figure{Name: "readings-puback", What: "last publish until its PUBACK, that is until it is on the edge's disk", Unit: "ms"}, ms(acknowledged))
	}
	sum, err := s.hub.Sum(ctx, e.Name, "readings")
	if err == nil && !sum.Balanced() {
		err = errors.New("the account is not balanced")
	}
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// reading is about 100 bytes of JSON as a sensor sends them, with values that nothing but chance connects.
func reading(machine, n int) []byte {
	x := chance(uint64(machine)<<32 + uint64(n))
	return fmt.Appendf(nil, `{"machine":"press-%d","n":%07d,"temperature":%d.%02d,"pressure":%d.%03d,"vibration":0.%06d}`,
		machine, n, 40+x>>60, x>>48%100, 3+x>>46%4, x>>36%1000, x>>10%1000000)
}

// noise is 100 bytes.
func noise(machine, n int) []byte {
	b := make([]byte, 0, 104)
	for i := range uint64(13) {
		b = binary.BigEndian.AppendUint64(b, chance(uint64(machine)<<40+uint64(n)<<8+i))
	}
	return b[:100]
}

// chance is the output function of SplitMix64: different for each x, and seemingly random.
func chance(x uint64) uint64 {
	x *= 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
