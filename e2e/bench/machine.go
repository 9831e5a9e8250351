package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// describeMachine says on what the figures were measured.
func describeMachine() string {
	memory := "unknown memory"
	if kib, err := procField("/proc/meminfo", "MemTotal"); err == nil {
		memory = fmt.Sprintf("%.0f GiB", float64(kib)/(1<<20))
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		kernel = []byte("of unknown version")
	}
	load, _, _ := strings.Cut(readText("/proc/loadavg"), " ")
	return fmt.Sprintf("Measured on %s: %d cores (%s), %s, %s kernel %s, %s, load %s at the start. Everything, clients included, shares these cores.",
		time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), memory, runtime.GOOS, strings.TrimSpace(string(kernel)), runtime.Version(), load)
}

func cpuModel() string {
	for line := range strings.Lines(readText("/proc/cpuinfo")) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func readText(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return string(b)
}

// procField reads a line like "VmHWM:  1234 kB", in KiB.
func procField(file, key string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == key {
			return strconv.ParseInt(strings.Fields(v)[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, key)
}

const mib = 1 << 10 // in KiB

// rss and pss of a process in KiB.
func rss(pid int) (int64, error) { return procField(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Rss") }
func pss(pid int) (int64, error) { return procField(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss") }

// resetPeak makes peak, the most a process held, start anew.
func resetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

func peak(pid int) (int64, error) { return procField(fmt.Sprintf("/proc/%d/status", pid), "VmHWM") }
