package outbox

import (
	"context"
	"fmt"
	"testing"
)

// BenchmarkAppend appends records of 100 bytes, one for each call and fsync or group of callers.
func BenchmarkAppend(b *testing.B) {
	for _, producers := range []int{1, 64} {
		b.Run(fmt.Sprint("producers-", producers), func(b *testing.B) {
			l := openLog(b, b.TempDir(), Config{})
			recs := []Record{{Stream: "s", Topic: "plant/press-7/vibration", Payload: randomText(100)}}
			b.SetParallelism(max(producers/2, 1))
			if producers == 1 {
				for b.Loop() {
					appendAll(b, l, recs...)
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if v, err := l.Append(context.Background(), recs); err != nil || v[0] != nil {
						b.Error(v, err)
						return
					}
				}
			})
		})
	}
}
