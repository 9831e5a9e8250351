package fault

import (
	"fmt"
	"os"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// bin holds the commands under test, built with the race detector.
var bin rig.Bin

func TestMain(m *testing.M) {
	os.Exit(rigtest.Main(m, "../..", &bin))
}

// account says what the hub has of an edge's readings, for tests that look at more than that it is balanced.
func account(t *testing.T, s *rigtest.Site, edge string) rig.Sum {
	t.Helper()
	sum, err := s.Hub.Sum(t.Context(), edge, "readings")
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// settled waits until an edge holds exactly these pods and everything it took is in the sink or in the ledger.
func settled(t *testing.T, s *rigtest.Site, e *rig.Edge, pods ...string) {
	t.Helper()
	rigtest.Eventually(t, fmt.Sprintf("%s holds what the folder says", e.Name), func() error { return s.Holds(e, true, pods...) })
	rigtest.Eventually(t, fmt.Sprintf("the account of %s is balanced", e.Name), func() error { return s.Drained(e, "readings") })
}
