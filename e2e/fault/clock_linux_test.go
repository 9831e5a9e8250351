package fault

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// shiftVariable names the file with the seconds to add to the edge's wall clock, 8 bytes in the machine's order.
const shiftVariable = "TEST_CLOCK_SHIFT_FILE"

// shiftSource goes into package time of the edge under test. The file is mapped, because the runtime asks for the time also
// where no system call may be made.
const shiftSource = `package time

import (
	"syscall"
	"unsafe"
)

var testShiftPage = mapTestShift()

func mapTestShift() []byte {
	name, ok := syscall.Getenv("` + shiftVariable + `")
	if !ok {
		return nil
	}
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("open the clock's shift: " + err.Error())
	}
	page, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("map the clock's shift: " + err.Error())
	}
	return page
}

func testShift() (seconds int64) {
	if testShiftPage == nil {
		return 0
	}
	return *(*int64)(unsafe.Pointer(&testShiftPage[0]))
}
`

// buildShifted builds an edge hub whose wall clock a test can set: its sources are the product's, and Go's own package time
// adds what the file says to the wall clock (and not to the monotonic one).
//
// The changed sources stand in the cache folder, since their paths are part of what is built: elsewhere each run would build
// everything anew.
func buildShifted(t *testing.T) rig.Bin {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "longshore", "clocktest")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	pkg := filepath.Join(strings.TrimSpace(string(out)), "src/time")
	source, err := os.ReadFile(filepath.Join(pkg, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const read = "sec, nsec, mono := runtimeNow()"
	if strings.Count(string(source), read) != 1 {
		t.Fatal("time.Now of this Go reads the clock in another way: adapt this test")
	}
	overlay := map[string]string{}
	for name, text := range map[string]string{"time.go": strings.Replace(string(source), read, read+"\n\tsec += testShift()", 1), "testshift.go": shiftSource} {
		overlay[filepath.Join(pkg, name)] = filepath.Join(dir, name)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", filepath.Join(bin, "edgehub"), "./edgehub")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return rig.Bin(bin)
}

// G3: a box without a battery comes up in 1970 with no link, twice; the second time it is told the time before the link is
// there. Readings of the boot that never knew the time arrive in order, in 1970, and say that their time is worth nothing;
// those of the boot that came to know it have their right time, also the ones taken before. Nothing is too old because the
// clock jumped by half a century.
//
// Real: hub, edge hub and everything it is built of, but for what time.Now says (see buildShifted); the boot id, in a mount
// namespace of the edge's own. Not real: the monotonic clock goes on over the power cut between the boots, and the edge is built
// without the race detector, because that would build all it is made of once more.
func TestG3BootedIn1970(t *testing.T) {
	t.Parallel()
	rigtest.NeedRoot(t, "a boot id of its own")
	unshare := rigtest.Need(t, "unshare")
	s := rigtest.NewSite(t, bin)
	s.StartHub()
	// What this machine was on before counts as if the box had been on for so long before each start of the agent.
	var on unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &on); err != nil {
		t.Fatal(err)
	}
	e := s.Edge("dock-1", fmt.Sprintf("streams:\n- {name: readings, topics: [\"sensors/#\"], maxAge: %ds}\n", on.Sec+600))
	e.Bin = buildShifted(t)
	shift := filepath.Join(t.TempDir(), "shift")
	setClock := func(right bool) {
		t.Helper()
		seconds := int64(0)
		if !right {
			seconds = 3600 - time.Now().Unix() // 1970-01-01 01:00
		}
		f, err := os.OpenFile(shift, os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(seconds)), 0)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	e.Env = []string{shiftVariable + "=" + shift}
	boot := func(id string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "boot_id")
		if err := os.WriteFile(file, []byte(id+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := e.Start(t.Context(), unshare, "--mount", "sh", "-c", `mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"`, file)
		if err != nil {
			t.Fatal(err)
		}
		s.EndWithTest(e.Process)
		clockIs(t, e, "unset")
	}
	s.Cut("dock-1")
	setClock(false)
	boot("11111111-1111-4111-8111-111111111111")
	n := rigtest.NewNumbers(t, e, "press")
	publishNow(t, n, 20)
	e.Kill()

	setClock(false)
	boot("22222222-2222-4222-8222-222222222222")
	second := time.Now()
	publishNow(t, n, 20)
	setClock(true)
	clockIs(t, e, "plausible", "synced")
	publishOver(t, n, 12*time.Second) // the outbox looks for what is too old every 10 s
	last := time.Now()
	s.Restore("dock-1")
	settled(t, s, e)
	s.CheckRecords("dock-1", n)
	if sum := account(t, s, "dock-1"); sum.Ledgered > 0 || sum.Duplicates > 0 || sum.Delivered != uint64(n.Count()) {
		t.Errorf("%d readings were acknowledged; the account: %+v", n.Count(), sum)
	}
	records, err := s.Hub.Records(t.Context(), "dock-1", "readings")
	if err != nil {
		t.Fatal(err)
	}
	var before time.Time
	for i, r := range records {
		if want := fmt.Sprintf("press-%06d", i+1); !strings.HasPrefix(r.Payload, want) {
			t.Fatalf("record %d is %q, want %s", i, r.Payload, want)
		}
		known := i >= 20
		switch {
		case r.Time.Before(before):
			t.Errorf("%s at %v comes after one at %v", r.Payload, r.Time, before)
		case !known && (r.Clock != "Unset" || r.Time.Year() != 1970):
			t.Errorf("%s is of a boot that never knew the time, and says %v, %s", r.Payload, r.Time, r.Clock)
		case known && (r.Clock == "Unset" || r.Time.Before(second.Add(-time.Second)) || r.Time.After(last.Add(time.Second))):
			t.Errorf("%s says %v (%s), it was taken between %v and %v", r.Payload, r.Time, r.Clock, second, last)
		}
		before = r.Time
	}
}

// clockIs waits until the agent thinks so of its clock.
func clockIs(t *testing.T, e *rig.Edge, qualities ...string) {
	t.Helper()
	rigtest.Eventually(t, fmt.Sprintf("the clock is one of %v", qualities), func() error {
		st, err := e.Status(t.Context())
		if err != nil {
			return err
		}
		for _, q := range qualities {
			if st.Clock.Quality == q {
				return nil
			}
		}
		return fmt.Errorf("it is %q", st.Clock.Quality)
	})
}

// publishOver publishes readings for a while.
func publishOver(t *testing.T, n *rigtest.Numbers, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), rigtest.Soon)
	defer cancel()
	over := make(chan struct{})
	timer := time.AfterFunc(d, func() { close(over) })
	defer timer.Stop()
	if err := publish(ctx, n, over); err != nil {
		t.Fatal(err)
	}
}
