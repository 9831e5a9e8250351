package outbox

import (
	"crypto/rand"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// clock tells the time of one boot.
type clock interface {
	// Boot names the boot; the same for every start of the agent within it.
	Boot() string
	// Mono is nanoseconds of CLOCK_BOOTTIME.
	Mono() int64
	// Wall is nanoseconds since 1970 UTC as the system believes.
	Wall() int64
}

type systemClock struct{ boot string }

// newSystemClock reads the kernel's boot id. Where there is none, every start counts as a boot of its own, which only makes
// records look younger.
func newSystemClock() systemClock {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	boot := strings.TrimSpace(string(b))
	if err != nil || boot == "" {
		boot = rand.Text()
	}
	return systemClock{boot}
}

func (c systemClock) Boot() string { return c.boot }
func (c systemClock) Wall() int64  { return time.Now().UnixNano() }

func (c systemClock) Mono() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return ts.Nano()
}
