package e2e

import (
	"os"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// bin holds the commands under test, built with the race detector.
var bin rig.Bin

func TestMain(m *testing.M) {
	os.Exit(rigtest.Main(m, "..", &bin))
}
