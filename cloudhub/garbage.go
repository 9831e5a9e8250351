package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// garbageFor is how long garbage may gather before it is collected, within the bounds below.
	garbageFor = 2 * time.Second
	// minGarbage and maxGarbage bound it, in percent of what is in use. Go's own default is 100.
	minGarbage, maxGarbage = 20, 50
	// garbageLook is how often the pace is set anew.
	garbageLook = time.Second
)

// limitGarbage is the pace to start with, unless the environment says how much garbage may gather (GOGC).
func limitGarbage() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(maxGarbage)
	}
}

// paceGarbage lets as much garbage gather as is made in garbageFor, until ctx ends. A hub with many edges makes little while
// nothing happens: collecting it at once costs next to nothing and saves a third of the memory. Under load it may cost more
// memory and less time.
func paceGarbage(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(samples)
	before, percent := samples[0].Value.Uint64(), maxGarbage
	tick := time.NewTicker(garbageLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(samples)
		made, live := samples[0].Value.Uint64()-before, samples[1].Value.Uint64()
		before += made
		if next := garbagePercent(made, live); next > percent || next < percent*3/4 {
			percent = next
			debug.SetGCPercent(percent)
		}
	}
}

// garbagePercent of live bytes is what is made in garbageFor, when so much was made in garbageLook.
func garbagePercent(made, live uint64) int {
	if live == 0 {
		return maxGarbage
	}
	expected := made * uint64(garbageFor/garbageLook)
	return int(min(max(100*expected/live, minGarbage), maxGarbage))
}
