package broker

import (
	"fmt"
	"testing"
	"time"
)

// On a full disk every device is refused, comes back and is refused again. A line for each would fill the disk that is left and
// bury what else the log says.
func TestRefusalsAreLoggedOncePerMinute(t *testing.T) {
	c, now := complaints{}, time.Unix(1_000_000, 0)
	expect := func(client string, log bool, skipped int) {
		t.Helper()
		if gotLog, got := c.about(client, now); gotLog != log || got != skipped {
			t.Errorf("%s: log %v with %d skipped, want %v with %d", client, gotLog, got, log, skipped)
		}
	}
	expect("press", true, 0)
	for range 500 {
		now = now.Add(100 * time.Millisecond)
		expect("press", false, 0)
	}
	expect("lathe", true, 0)
	now = now.Add(10 * time.Second)
	expect("press", true, 500)
	now = now.Add(complainEvery)
	expect("press", true, 0)

	for n := range 10 * maxComplaints {
		c.about(fmt.Sprint("new-", n), now)
	}
	if len(c) != maxComplaints {
		t.Errorf("%d clients are remembered, want at most %d", len(c), maxComplaints)
	}
	expect("another", false, 0)
	now = now.Add(complainEvery)
	expect("another", true, 0)
}
