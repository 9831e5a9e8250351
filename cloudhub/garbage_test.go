package main

import "testing"

// A hub that let all the garbage gather that Go allows would take twice the memory while nothing happens; one that never let any
// would spend its time collecting.
func TestGarbagePercent(t *testing.T) {
	for _, c := range []struct {
		name       string
		made, live uint64
		want       int
	}{
		{"at the start", 5 << 20, 0, maxGarbage},
		{"quiet", 1 << 20, 100 << 20, minGarbage},
		{"some", 15 << 20, 100 << 20, 30},
		{"a backlog", 500 << 20, 100 << 20, maxGarbage},
	} {
		if got := garbagePercent(c.made, c.live); got != c.want {
			t.Errorf("%s: %d%%, want %d%%", c.name, got, c.want)
		}
	}
}
