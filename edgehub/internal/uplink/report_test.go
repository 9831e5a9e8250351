package uplink

import (
	"testing"
	"time"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
)

// figures drives a reporter by a clock of its own through the figures of a node, one for each second.
type figures struct {
	t        *testing.T
	reporter *reporter
	now      time.Time
}

func newFigures(t *testing.T) *figures {
	return &figures{t: t, reporter: newReporter(1), now: time.Unix(1_800_000_000, 0)}
}

// second lets a second pass and returns the backlog reported in it, if there is a report.
func (f *figures) second(backlog uint64) (reported uint64, ok bool) {
	f.t.Helper()
	f.now = f.now.Add(time.Second)
	look := func() Account {
		return Account{Node: &longshorepb.NodeReport{Hostname: "box", BacklogRecords: backlog, BacklogBytes: 100 * backlog}}
	}
	messages, wait, err := f.reporter.next(look, f.now)
	if err != nil {
		f.t.Fatal(err)
	}
	if len(messages) == 0 {
		if wait <= 0 {
			f.t.Fatal("nothing to report, and no time to wait: the writer would spin")
		}
		return 0, false
	}
	m, err := account.Decode(messages[0])
	if err != nil || m.GetNode() == nil {
		f.t.Fatalf("report %v without a node, error %v", m, err)
	}
	return m.GetNode().GetBacklogRecords(), true
}

// Without this, people who wait for a box to drain would look at a backlog that has been gone for a minute.
func TestDrainedBacklogIsReportedAtOnce(t *testing.T) {
	for _, c := range []struct {
		name       string
		rest       uint64
		before, at uint64
	}{
		{"nothing is left", 0, 3, 3},
		{"readings go on", 40, 70_000, 70_000},
	} {
		f := newFigures(t)
		if got, ok := f.second(c.before); !ok || got != c.before {
			t.Fatalf("%s: first report %d, %t", c.name, got, ok)
		}
		if got, ok := f.second(c.at); ok {
			t.Errorf("%s: reported %d again", c.name, got)
		}
		if got, ok := f.second(c.rest); !ok || got != c.rest {
			t.Errorf("%s: after it was drained: reported %d, %t; want %d", c.name, got, ok, c.rest)
		}
	}
}

// Without this, the edge would pay for reports of nothing but a few records under way, second for second.
func TestSteadyTelemetryIsNoNews(t *testing.T) {
	for _, under := range [][]uint64{{0, 3, 1, 0, 5}, {40, 0, 12, 90, 3}, {900, 20, 400}} {
		f := newFigures(t)
		reports := 0
		for i := range 600 {
			if _, ok := f.second(under[i%len(under)]); ok {
				reports++
			}
		}
		if reports > 2*11 {
			t.Errorf("%v records under way made %d reports in ten minutes, want at most two a minute", under, reports)
		}
	}
}
