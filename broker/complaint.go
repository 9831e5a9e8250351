package broker

import "time"

const (
	// complainEvery is the time between two log lines about one client's refused messages.
	complainEvery = time.Minute
	// maxComplaints bounds the clients remembered; past it no line is logged of another until some are old.
	maxComplaints = 1024
)

// complaints keep a full disk, on which every message of every device is refused, from filling the log as well. Not safe for
// concurrent use.
type complaints map[string]complaint

type complaint struct {
	at      time.Time // of the last line
	skipped int       // refusals since then
}

// about counts a refused message of a client. It says whether to log it, and how many were not logged since the last line.
func (c complaints) about(client string, now time.Time) (log bool, skipped int) {
	last, known := c[client]
	if known && now.Sub(last.at) < complainEvery {
		last.skipped++
		c[client] = last
		return false, 0
	}
	if !known && len(c) >= maxComplaints && !c.forget(now) {
		return false, 0
	}
	c[client] = complaint{at: now}
	return true, last.skipped
}

// forget drops clients without a line for long, and says whether there were any.
func (c complaints) forget(now time.Time) bool {
	n := len(c)
	for client, last := range c {
		if now.Sub(last.at) >= complainEvery {
			delete(c, client)
		}
	}
	return len(c) < n
}
