package intake

import (
	"fmt"
	"testing"

	"github.com/longshore-edge/longshore/sync/outbox"
)

// BenchmarkReplay replays a backlog of 1,000,000 records of about 100 bytes from one edge's outbox into the store: read,
// receive, commit with fsync, acknowledge.
func BenchmarkReplay(b *testing.B) {
	const records, group = 1_000_000, 500
	for b.Loop() {
		b.StopTimer()
		l := openOutbox(b, b.TempDir(), outbox.Config{Default: outbox.Quota{MaxBytes: 4 << 30}})
		recs := make([]outbox.Record, group)
		for n := 0; n < records; n += group {
			for i := range recs {
				recs[i] = outbox.Record{Stream: "vibration", Topic: "plant/press-7/vibration", Payload: fmt.Appendf(nil,
					`{"seq":%d,"rms":%.4f,"peak":%.4f,"kurtosis":%.4f,"temperature":%.2f,"state":"running"}`,
					n+i, float64((n+i)*7919%1000)/1000, float64((n+i)*104729%5000)/1000, 3+float64((n+i)*1299709%700)/1000, 40+float64((n+i)%400)/20)}
			}
			appendAll(b, l, recs...)
		}
		_, disk := l.Stats()
		s := openStore(b, Config{Dir: b.TempDir()})
		c := connect(b, s, "press-7", l)
		b.StartTimer()
		c.drain()
		c.acks(false)
		b.StopTimer()
		b.ReportMetric(float64(disk)/records, "bytes/record")
		if got := s.sum(b, Query{}); got != (Sum{Accepted: records, Delivered: records}) {
			b.Fatalf("sum %+v", got)
		}
		if stats, _ := l.Stats(); stats[0].Held != 0 {
			b.Fatalf("%d records still held", stats[0].Held)
		}
		s.stop()
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(records*float64(b.N)/b.Elapsed().Seconds(), "records/s")
}
